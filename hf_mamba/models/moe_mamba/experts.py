"""The feed-forward layers of MoE-Mamba: stacked experts, the dense network, and the routed layer made of both.

Symbols: B batch, L length, N tokens = B·L, d model width, E experts, k experts per token, F expert width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.utils import logging

from ...layers.switch import Routing, TopKRouter, within_capacity
from .configuration_moe_mamba import MoeMambaConfig
from .fused import FUSED, fused_experts, fused_router, fused_step, kernels_fit

__all__ = ["MoeMambaExperts", "MoeMambaMLP", "MoeMambaSparseMoe", "StackedExperts", "truncated_normal_"]

logger = logging.get_logger(__name__)

# tokens of a decoding step for each of which the matrices of its experts are copied, where there is no kernel
MOST_BATCHED = 32


@use_experts_implementation
class StackedExperts(nn.Module):
    """E feed-forward networks with their weights stacked; transformers' experts interface chooses how they are run.

    Parameters: `up_proj` (E, F, d), or gated `gate_up_proj` (E, 2F, d) with the gate's rows first; `down_proj` (E, d, F);
    with `moe_bias` also `…_bias` (E, F), (E, 2F) and (E, d).
    """

    config: MoeMambaConfig
    down_proj: nn.Parameter
    has_gate: bool
    has_bias: bool

    def __init__(self, config, num_experts: int | None = None) -> None:
        super().__init__()
        self.num_experts = config.num_experts if num_experts is None else num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = ACT2FN[config.moe_hidden_act]
        width = (2 if config.moe_gated else 1) * self.intermediate_dim
        self.up_name = "gate_up_proj" if config.moe_gated else "up_proj"
        shapes = {self.up_name: (width, self.hidden_dim), "down_proj": (self.hidden_dim, self.intermediate_dim)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, *shape)))
            if config.moe_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, shape[0])))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run each expert on its tokens.

        Args:
            hidden_states: (N, d).
            top_k_index: (N, k) integer.
            top_k_weights: (N, k).

        Returns:
            (N, d), the weighted sum over a token's experts.
        """
        return self.run_one_by_one(hidden_states, top_k_index, top_k_weights)

    def run_one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The implementation "eager": one expert after another, those without tokens left out."""
        out = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in top_k_index.unique().tolist():
            # so transformers' expert parallelism marks what another device computes
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            inner = self._project(self.up_name, expert, hidden_states[token])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            update = self._project("down_proj", expert, inner) * top_k_weights[token, slot, None]
            out = out.index_add(0, token, update.to(out.dtype))
        return out.to(hidden_states.dtype)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return F.linear(x, getattr(self, name)[expert], bias)

    @torch.no_grad()
    def init_weights(self, scale: float) -> None:
        """Truncated normal; the second matrix with fan-in E·F, as the paper's code has it."""
        truncated_normal_(getattr(self, self.up_name), scale, fan_in=self.hidden_dim)
        truncated_normal_(self.down_proj, scale, fan_in=self.num_experts * self.intermediate_dim)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.hidden_dim} -> {self.intermediate_dim} -> {self.hidden_dim}"


class MoeMambaExperts(StackedExperts):
    """The experts of one layer, gated or not, with biases or not."""

    def __init__(self, config, num_experts: int | None = None) -> None:
        super().__init__(config, num_experts)
        # the decorator fixes both for a class; here they are a matter of the configuration
        self.has_gate, self.has_bias = config.moe_gated, config.moe_bias

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As in `StackedExperts`, by the implementation that the configuration names, if it can."""
        implementation, dtype = self.config._experts_implementation, self.down_proj.dtype
        device_type = hidden_states.device.type
        autocast = implementation != "eager" and torch.is_autocast_enabled(device_type)
        if autocast:
            dtype = torch.get_autocast_dtype(device_type)
        if implementation == FUSED and not kernels_fit(self, hidden_states, dtype):
            # as transformers' generate() has it: of few tokens only the chosen experts are read, and nothing waits for the host
            few = hidden_states.device.type != "cpu" and not torch.is_grad_enabled()
            few = few and hidden_states.shape[0] <= MOST_BATCHED
            implementation = "batched_mm" if few else "grouped_mm"
        if implementation == "grouped_mm" and not self._grouped_mm_fits(dtype):
            return self.run_one_by_one(hidden_states, top_k_index, top_k_weights)
        run = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, StackedExperts.run_one_by_one)
        if autocast and dtype != self.down_proj.dtype:
            # torch casts for no grouped product; in fp32 it would take many times as long
            return run(_Cast(self, dtype), hidden_states.to(dtype), top_k_index, top_k_weights)
        return run(self, hidden_states, top_k_index, top_k_weights)

    def _grouped_mm_fits(self, dtype: torch.dtype) -> bool:
        """torch's grouped product knows no fp64 and wants rows of whole 16 bytes."""
        if dtype == torch.float64:
            return False
        # under tensor parallelism this device holds a part of the width
        width = self.down_proj.shape[-1]
        if self.hidden_dim * dtype.itemsize % 16 == 0 and width * dtype.itemsize % 16 == 0:
            return True
        logger.warning_once(
            f"The experts run one by one, which is slow: `hidden_size` {self.hidden_dim} and `moe_intermediate_size` "
            f"{width} must be multiples of {16 // dtype.itemsize} for grouped matrix products in {dtype}."
        )
        return False


class _Cast:
    """Experts whose weights read as if they were of another dtype."""

    def __init__(self, experts: StackedExperts, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value


class MoeMambaMLP(nn.Module):
    """Dense feed-forward network `down(act(up(x)))`, or gated `down(act(gate(x)) · up(x))` with the gate's rows first."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, gated: bool, bias: bool):
        super().__init__()
        self.gated = gated
        self.act_fn = ACT2FN[activation]
        if gated:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        else:
            self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, d) → (…, d)."""
        if self.gated:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MoeMambaSparseMoe(nn.Module):
    """A Switch layer (arXiv 2401.04081, §3.2): each token passes the k experts its router chose, weighted by their scores.

    Args:
        num_experts: E; by default `config.num_experts`.

    Attributes:
        observer: called with a `Routing` in every forward, if it is not None.
    """

    observer: Callable[[Routing], None] | None

    def __init__(self, config, num_experts: int | None = None) -> None:
        super().__init__()
        num_experts = config.num_experts if num_experts is None else num_experts
        self.config = config
        self.capacity_factor = config.capacity_factor
        self.observer = None
        self.router = TopKRouter(
            config.hidden_size,
            num_experts,
            config.num_experts_per_tok,
            scoring=config.router_scoring,
            normalize=config.norm_topk_prob,
            bias=config.router_bias,
            jitter_noise=config.router_jitter_noise,
            scaling_factor=config.router_scaling_factor,
            selection_bias=config.router_selection_bias,
            num_groups=config.router_num_groups,
            topk_groups=config.router_topk_groups,
        )
        self.experts = MoeMambaExperts(config, num_experts)
        self.shared_experts: MoeMambaMLP | None = None
        if config.num_shared_experts:
            self.shared_experts = MoeMambaMLP(
                config.hidden_size,
                config.num_shared_experts * config.shared_expert_intermediate_size,
                activation=config.moe_hidden_act,
                gated=config.moe_gated,
                bias=config.moe_bias,
            )

    def forward(
        self, hidden_states: Tensor, valid: Tensor | None = None, dropless: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Route and run the experts.

        Args:
            hidden_states: (B, L, d).
            valid: (B, L) bool, False at padding; None = all real.
            dropless: no capacity limit and no jitter, in training too.

        Returns:
            The output (B, L, d) and the router logits (B, L, E) fp32.
        """
        tokens = hidden_states.flatten(0, 1)
        flat_valid = None if valid is None else valid.flatten()
        training = self.training and not dropless
        fused = self.config._experts_implementation == FUSED
        router, experts = self.router, self.experts
        # both read the same configuration unless somebody gave the experts one of their own
        plain = fused and self.has_plain_experts() and experts.config is self.config
        step = fused_step(router, experts, tokens) if plain and not training else None
        out: Tensor | None = None
        if step is not None:
            out, router_logits, weights, indices = step
        else:
            routed = fused_router(router, tokens, noisy=training) if fused else None
            router_logits, weights, indices = router(tokens, noisy=training) if routed is None else routed
        kept = None
        if training and self.capacity_factor is not None:
            kept = within_capacity(indices, router.num_experts, self.capacity_factor, flat_valid)
            weights = weights.masked_fill(~kept, 0.0)
        if self.observer is not None:
            self.observer(Routing(router_logits.detach(), weights.detach(), indices, kept, flat_valid, training))
        if plain and out is None:
            out = fused_experts(experts, tokens, indices, weights)
        if out is None:
            # the grouped matrix products take no empty input
            out = experts(tokens, indices, weights) if tokens.shape[0] else tokens
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view_as(hidden_states), router_logits.view(*hidden_states.shape[:2], router_logits.shape[1])

    def has_plain_experts(self) -> bool:
        """Whether the experts stand alone, without an adapter around them."""
        return type(self.experts) is MoeMambaExperts


def truncated_normal_(tensor: Tensor, scale: float, fan_in: int) -> None:
    """Normal with variance scale / fan_in, truncated at ±2·scale whatever the fan-in: the rule of the paper's code."""
    init.trunc_normal_(tensor, mean=0.0, std=math.sqrt(scale / fan_in), a=-2 * scale, b=2 * scale)
