"""MoE-Mamba (Pióro et al., arXiv 2401.04081): the backbone and its heads.

Every layer is residual: a Mamba or Mamba-2 mixer, a layer of routed experts, a dense feed-forward layer, or a mixer and a
feed-forward layer side by side. The same classes hold BlackMamba (Anthony et al., arXiv 2402.01771) and Mamba-MLP.

Symbols: B batch, L length, N tokens = B·L, d model width, E experts, k experts per token, F expert width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ...layers import LayerNorm, RMSNorm, SelectiveScanMixer, SSDMixer
from ...layers.switch import TopKRouter, load_balancing_loss, router_z_loss, within_capacity
from ...sequences import SequenceLayout
from ..classifiers import RecurrentForSequenceClassification, RecurrentForTokenClassification
from ..heads import RecurrentForCausalLM
from ..outputs import RecurrentCausalLMOutput, RecurrentClassifierOutput, RecurrentModelOutput
from ..recurrent import RecurrentModel, RecurrentPreTrainedModel
from .configuration_moe_mamba import MoeMambaConfig

__all__ = [
    "MoeMambaCausalLMOutput",
    "MoeMambaClassifierOutput",
    "MoeMambaForCausalLM",
    "MoeMambaForSequenceClassification",
    "MoeMambaForTokenClassification",
    "MoeMambaModel",
    "MoeMambaModelOutput",
    "MoeMambaPreTrainedModel",
]

logger = logging.get_logger(__name__)


@dataclass
class MoeMambaModelOutput(RecurrentModelOutput):
    """`RecurrentModelOutput` and what the routers did.

    Attributes:
        aux_loss: (), the load-balancing loss without its coefficient; in training, or with `output_router_logits`.
        z_loss: (), the router z-loss without its coefficient, if `router_z_loss_coef` is not 0; at the same times.
        router_logits: one (B·L, E) fp32 for each layer with experts, tokens in the order of the input; with
            `output_router_logits`.
    """

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoeMambaCausalLMOutput(RecurrentCausalLMOutput):
    """`RecurrentCausalLMOutput` and the router fields of `MoeMambaModelOutput`."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoeMambaClassifierOutput(RecurrentClassifierOutput):
    """`RecurrentClassifierOutput` and the router fields of `MoeMambaModelOutput`."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


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

    def __init__(self, config) -> None:
        super().__init__()
        self.num_experts = config.num_experts
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

    def __init__(self, config) -> None:
        super().__init__(config)
        # the decorator fixes both for a class; here they are a matter of the configuration
        self.has_gate, self.has_bias = config.moe_gated, config.moe_bias

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As in `StackedExperts`, by the implementation that the configuration names, if it can."""
        if self.config._experts_implementation == "grouped_mm" and not self._grouped_mm_fits():
            return self.run_one_by_one(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _grouped_mm_fits(self) -> bool:
        """torch's grouped product knows no fp64 and wants rows of whole 16 bytes."""
        dtype = self.down_proj.dtype
        if dtype == torch.float64:
            return False
        if self.hidden_dim * dtype.itemsize % 16 == 0 and self.intermediate_dim * dtype.itemsize % 16 == 0:
            return True
        logger.warning_once(
            f"The experts run one by one, which is slow: `hidden_size` {self.hidden_dim} and `moe_intermediate_size` "
            f"{self.intermediate_dim} must be multiples of {16 // dtype.itemsize} for grouped matrix products in {dtype}."
        )
        return False


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
    """A Switch layer (arXiv 2401.04081, §3.2): each token passes the k experts its router chose, weighted by their scores."""

    def __init__(self, config) -> None:
        super().__init__()
        self.capacity_factor = config.capacity_factor
        self.router = TopKRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            scoring=config.router_scoring,
            normalize=config.norm_topk_prob,
            bias=config.router_bias,
            jitter_noise=config.router_jitter_noise,
        )
        self.experts = MoeMambaExperts(config)
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
        training = self.training and not dropless
        router_logits, weights, indices = self.router(tokens, noisy=training)
        if training and self.capacity_factor is not None:
            kept = within_capacity(
                indices, self.experts.num_experts, self.capacity_factor, None if valid is None else valid.flatten()
            )
            weights = weights.masked_fill(~kept, 0.0)
        # the grouped matrix products take no empty input
        out = self.experts(tokens, indices, weights) if tokens.shape[0] else tokens
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view_as(hidden_states), router_logits.unflatten(0, hidden_states.shape[:2])


class MoeMambaBlock(GradientCheckpointingLayer):
    """One residual layer: `x + mixer(norm(x))`, `x + feed_forward(norm(x))`, or both side by side.

    The sub-modules there are: `norm`; `mixer`; `moe` or `mlp`; and `feed_forward_norm` if the two sides of a parallel
    layer have a norm each.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        kind = config.layers_block_type[layer_idx]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = make_norm(config, config.norm_type)
        self.mixer: nn.Module | None = None
        self.moe: MoeMambaSparseMoe | None = None
        self.mlp: MoeMambaMLP | None = None
        self.feed_forward_norm: nn.Module | None = None
        if kind == "mamba" or kind.startswith("parallel"):
            mixer_class = SSDMixer if config.mixer_type == "mamba2" else SelectiveScanMixer
            self.mixer = mixer_class(config, layer_idx)
        if kind.endswith("moe"):
            self.moe = MoeMambaSparseMoe(config)
        if kind.endswith("mlp"):
            self.mlp = MoeMambaMLP(
                config.hidden_size,
                config.mlp_intermediate_size,
                activation=config.mlp_hidden_act,
                gated=config.mlp_gated,
                bias=config.mlp_bias,
            )
        if kind.startswith("parallel") and config.parallel_norm == "separate":
            self.feed_forward_norm = make_norm(config, config.norm_type)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        seq_idx: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, L, d) after this layer, and the router logits (B, L, E) if it has experts."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        out = hidden_states.to(dtype) if self.residual_in_fp32 else hidden_states
        normed = self.norm(hidden_states)
        if self.mixer is not None:
            out = out + self.mixer(normed, cache=cache, seq_idx=seq_idx)
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(hidden_states)
        router_logits = None
        if self.moe is not None:
            # a token that is dropped or jittered would not be decoded the way it was prefilled
            update, router_logits = self.moe(normed, valid=valid, dropless=cache is not None)
            out = out + update
        if self.mlp is not None:
            out = out + self.mlp(normed)
        return out, router_logits


def make_norm(config, norm_type: str) -> nn.Module:
    """The norm of that type over the model width."""
    norm_class = RMSNorm if norm_type == "rmsnorm" else LayerNorm
    return norm_class(config.hidden_size, eps=config.layer_norm_epsilon)


def truncated_normal_(tensor: Tensor, scale: float, fan_in: int) -> None:
    """Normal with variance scale / fan_in, truncated at ±2·scale whatever the fan-in: the rule of the paper's code."""
    init.trunc_normal_(tensor, mean=0.0, std=math.sqrt(scale / fan_in), a=-2 * scale, b=2 * scale)


class MoeMambaPreTrainedModel(RecurrentPreTrainedModel):
    """Configuration class, placement rules and initialisation."""

    config: MoeMambaConfig
    config_class = MoeMambaConfig
    _no_split_modules = ["MoeMambaBlock"]
    # the choice of experts is as sensitive to rounding as the recurrence
    _keep_in_fp32_modules_strict = [*RecurrentPreTrainedModel._keep_in_fp32_modules_strict, "moe.router"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scale = self.config.initializer_scale
        if isinstance(module, nn.Embedding):
            # a tied embedding is also the head, which has a fan-in
            fan_in = self.config.hidden_size if self.config.tie_word_embeddings else 1
            truncated_normal_(module.weight, scale, fan_in=fan_in)
        elif isinstance(module, TopKRouter):
            truncated_normal_(module.weight, scale, fan_in=self.config.hidden_size)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, StackedExperts):
            module.init_weights(scale)
        elif isinstance(module, nn.Linear):
            # dense layers and heads; those of the mixers are drawn again below
            truncated_normal_(module.weight, scale, fan_in=module.in_features)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, SelectiveScanMixer | SSDMixer):
            for child in module.children():
                super()._init_weights(child)
            super()._init_weights(module)
        else:
            super()._init_weights(module)

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """Parameters that take part in the computation of one token: of the routed experts, only k out of E.

        Args:
            exclude_embeddings: leave out the embedding and the language model's head, as the paper's counts do.
        """
        inactive = 0
        for module in self.modules():
            if isinstance(module, StackedExperts):
                idle = module.num_experts - self.config.num_experts_per_tok
                inactive += sum(p.numel() // module.num_experts * idle for p in module.parameters())
        skipped = set()
        if exclude_embeddings:
            ends = (self.get_input_embeddings(), getattr(self, "lm_head", None))
            skipped = {id(p) for end in ends if end is not None for p in end.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in skipped) - inactive


class MoeMambaModel(MoeMambaPreTrainedModel, RecurrentModel):
    """The backbone: embedding, layers and, if configured, a final norm.

    `forward` takes the arguments of the other backbones and `output_router_logits`.
    """

    block_class = MoeMambaBlock
    output_class = MoeMambaModelOutput

    def make_final_norm(self, config) -> nn.Module:
        return make_norm(config, config.final_norm_type) if config.final_norm else nn.Identity()

    def take_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = kwargs.pop("output_router_logits", None)
        return {"output_router_logits": self.config.output_router_logits if given is None else given}

    def run_layers(
        self,
        hidden_states: Tensor,
        cache: Cache | None,
        layout: SequenceLayout,
        output_hidden_states: bool,
        finish: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> tuple[Tensor, list[Tensor] | None, dict[str, Any]]:
        collected: list[Tensor] | None = [] if output_hidden_states else None
        output_router_logits = options["output_router_logits"]
        valid = layout.valid
        router_logits = []
        for layer in self.layers:
            if collected is not None:
                collected.append(hidden_states)
            hidden_states, logits = layer(hidden_states, cache=cache, seq_idx=layout.seq_idx, valid=valid)
            if logits is not None and (output_router_logits or self.training):
                router_logits.append(finish(logits).flatten(0, 1))
        if self.config.final_norm:
            hidden_states = self.norm_f(hidden_states)
        else:
            # as a norm would: back from the residual stream's dtype to the model's
            hidden_states = hidden_states.to(cast(Any, self.layers[-1]).norm.weight.dtype)
        if collected is not None:
            collected.append(hidden_states)
        extras = self._router_outputs(tuple(router_logits), None if valid is None else finish(valid).flatten())
        if output_router_logits:
            extras["router_logits"] = tuple(router_logits)
        return hidden_states, collected, extras

    def _router_outputs(self, router_logits: tuple[Tensor, ...], valid: Tensor | None) -> dict[str, Any]:
        """The routers' losses, of the new tokens in input order, if there are logits to compute them from."""
        if not router_logits:
            return {}
        losses = {
            "aux_loss": load_balancing_loss(
                router_logits,
                top_k=self.config.num_experts_per_tok,
                scoring=self.config.router_scoring,
                valid=valid,
                reduction=self.config.router_aux_loss_reduction,
            )
        }
        if self.config.router_z_loss_coef:
            losses["z_loss"] = router_z_loss(router_logits, valid)
        return losses


class _WithRouterLosses(MoeMambaPreTrainedModel):
    """What the heads have in common: the routers' losses and logits in loss and output.

    The losses are added in training, so that the experts are balanced without further ado, and whenever
    `output_router_logits` is set; an evaluation loss is otherwise the plain one.
    """

    def total_loss(self, loss: Tensor, outputs: Any, labels: Tensor | None, loss_kwargs: dict[str, Any]) -> Tensor:
        share = self._share(labels, loss_kwargs)
        for name in ("aux_loss", "z_loss"):
            value = outputs.get(name)
            if value is not None:
                loss = loss + share * getattr(self.config, f"router_{name}_coef") * value.to(loss.device)
        return loss

    def _share(self, labels: Any, loss_kwargs: dict[str, Any]) -> Tensor | float:
        """The part of an accumulated batch that these labels are.

        With `num_items_in_batch` the other loss terms are sums divided by the items of all micro-batches together; the
        routers' losses are means, which would otherwise count once for each micro-batch.
        """
        items = loss_kwargs.get("num_items_in_batch")
        if items is None:
            return 1.0
        if loss_kwargs.get("shift_labels") is not None:
            labels = loss_kwargs["shift_labels"]
        elif isinstance(self, RecurrentForCausalLM):
            labels = labels[..., 1:]
        counted = (labels != loss_kwargs.get("ignore_index", -100)).sum()
        return counted / (items.to(counted.device) if isinstance(items, Tensor) else items)

    def extra_outputs(self, outputs: Any) -> dict[str, Any]:
        return {name: outputs.get(name) for name in ("aux_loss", "z_loss", "router_logits")}


class MoeMambaForCausalLM(_WithRouterLosses, RecurrentForCausalLM):
    """MoE-Mamba as a language model."""

    model_class = MoeMambaModel
    output_class = MoeMambaCausalLMOutput


class MoeMambaForSequenceClassification(_WithRouterLosses, RecurrentForSequenceClassification):
    """MoE-Mamba as a classifier of texts, pooled at the last real token of each row."""

    model_class = MoeMambaModel
    output_class = MoeMambaClassifierOutput


class MoeMambaForTokenClassification(_WithRouterLosses, RecurrentForTokenClassification):
    """MoE-Mamba as a classifier of tokens."""

    model_class = MoeMambaModel
    output_class = MoeMambaClassifierOutput
