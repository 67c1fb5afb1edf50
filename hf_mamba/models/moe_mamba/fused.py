"""The experts implementation "fused": the kernels of `mamba_kernels.moe` behind transformers' experts interface.

It is the default, and where there is a GPU the router runs in a kernel as well, and a decoding step in three launches. Where
the kernels do not run it is "grouped_mm".

Symbols: N tokens, d model width, E experts, k experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mamba_kernels import fused_linear
from mamba_kernels.dispatch import MOST_ROWS, select
from mamba_kernels.moe import experts_step, route, routed_experts

from ...layers.linear import is_unhooked
from ...layers.norms import RMSNorm
from ...layers.switch import TopKRouter

__all__ = [
    "FUSED",
    "fused_block_step",
    "fused_experts",
    "fused_experts_forward",
    "fused_router",
    "fused_step",
    "kernels_fit",
]

FUSED = "fused"

# by the class of the activation module
_ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELU": "gelu"}


def _activation(module: Any) -> str | None:
    """The kernels' name for an activation module, if they have it."""
    name = _ACTIVATIONS.get(type(module).__name__)
    if name != "gelu":
        return name
    # the other kinds of gelu are approximations
    exact = getattr(module, "approximate", "none") == "none"
    return name if exact and getattr(module, "act", None) in (nn.functional.gelu, None) else None


def _up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def kernels_fit(experts: Any, hidden_states: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what the module `experts` computes, in `dtype`, and where the tokens are."""
    down = experts.down_proj
    return (
        select("routed_experts", hidden_states.device) == "triton"
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and _activation(experts.act_fn) is not None
        and not getattr(experts, "is_transposed", False)
        and getattr(experts, "is_concatenated", True)
        and not getattr(experts, "has_post_expert_norm", False)
        and hidden_states.shape[-1] * dtype.itemsize % 16 == 0
        and down.shape[-1] * dtype.itemsize % 16 == 0
    )


def _arguments(experts: Any) -> dict[str, Any]:
    """Weights and options of `routed_experts` and `experts_step`."""
    name = _up_name(experts)
    biased = experts.has_bias
    return {
        "up": getattr(experts, name),
        "down": experts.down_proj,
        "up_bias": getattr(experts, f"{name}_bias") if biased else None,
        "down_bias": experts.down_proj_bias if biased else None,
        "activation": _activation(experts.act_fn),
        "gated": experts.has_gate,
    }


def _gates_plainly(experts: Any) -> bool:
    """Whether a foreign module's gate is transformers' usual one, `act(gate) * up`."""
    gate = getattr(type(experts), "_apply_gate", None)
    return getattr(gate, "__name__", None) == "_default_apply_gate"


def fused_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As transformers' `grouped_mm_experts_forward`, by the kernels of `mamba_kernels.moe` where they can.

    Models of transformers can be told to use it as well, once hf_mamba is imported.
    """
    from .experts import StackedExperts

    experts: Any = self
    module = getattr(experts, "_experts", experts)
    known = isinstance(module, StackedExperts) or not experts.has_gate or _gates_plainly(module)
    if not known or not kernels_fit(experts, hidden_states, experts.down_proj.dtype):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    return _run(experts, hidden_states, top_k_index, top_k_weights)


def _run(experts: Any, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    arguments = _arguments(experts)
    if tokens.shape[0] <= MOST_ROWS and not torch.is_grad_enabled():
        out, *_ = experts_step(tokens, indices=indices, weights=weights, **arguments)
        return out.to(tokens.dtype)
    return routed_experts(tokens, indices, weights, **arguments)


ALL_EXPERTS_FUNCTIONS.register(FUSED, fused_experts_forward)


def _is_plain_router(router: Any, tokens: Tensor) -> bool:
    """Whether the router is no more than `route` is, and its weights lie whole beside the tokens."""
    if type(router) is not TopKRouter:
        return False
    weight = router.weight
    return (
        router.selection_bias is None
        and router.num_groups == 1
        and type(weight) is nn.Parameter
        and weight.dtype == torch.float32
        and weight.device == tokens.device
        and tokens.dtype != torch.float64
        and is_unhooked(router)
        and select("route", tokens.device) == "triton"
    )


def fused_router(router: Any, tokens: Tensor, noisy: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `router(tokens)` returns, in one launch; None where the module has to be called."""
    if tokens.shape[0] == 0 or (noisy and router.jitter_noise > 0) or not _is_plain_router(router, tokens):
        return None
    return route(
        tokens,
        router.weight,
        bias=router.bias,
        top_k=router.top_k,
        scoring=router.scoring,
        normalize=router.normalize,
        scale=router.scaling_factor,
    )


def fused_experts(experts: Any, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor | None:
    """What `experts(tokens, indices, weights)` returns, on the short way; None where the module has to be called.

    The first product waits for what the host does before it, and the way through the module and transformers' interface takes
    as long as three launches.
    """
    if tokens.shape[0] == 0 or torch.compiler.is_compiling() or not _are_plain_experts(experts, tokens):
        return None
    return _run(experts, tokens, indices, weights)


def fused_step(router: Any, experts: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """A decoding step of N ≤ 4 tokens in three launches; None where the modules have to be called.

    Returns:
        The experts' output (N, d), the router logits (N, E), weights and indices (N, k).
    """
    if not 0 < tokens.shape[0] <= MOST_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not _is_plain_router(router, tokens) or not _are_plain_experts(experts, tokens):
        return None
    router_logits = fused_linear(tokens, router.weight, bias=router.bias)
    out, indices, weights = _step(router, experts, tokens, router_logits)
    return out.to(tokens.dtype), router_logits, weights, indices


def _are_plain_experts(experts: Any, tokens: Tensor) -> bool:
    """Whether the experts are no more than `experts_step` is, and lie whole beside the tokens."""
    down = experts.down_proj
    return (
        is_unhooked(experts)
        and type(down) is nn.Parameter
        and not torch.is_autocast_enabled(tokens.device.type)
        and kernels_fit(experts, tokens, down.dtype)
    )


def _step(
    router: Any, experts: Any, tokens: Tensor, router_logits: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return experts_step(
        tokens,
        router_logits=router_logits,
        top_k=router.top_k,
        scoring=router.scoring,
        normalize=router.normalize,
        scale=router.scaling_factor,
        **_arguments(experts),
        **options,
    )


def fused_block_step(norm: nn.Module, moe: Any, residual: Tensor) -> tuple[Tensor, Tensor] | None:
    """`residual + moe(norm(residual))` of a dropless decoding step in three launches; None where the modules have to be called.

    Args:
        norm: in front of the routed layer.
        moe: a `MoeMambaSparseMoe`.
        residual: (B, L, d) with B·L ≤ 4, in the dtype of the residual stream.

    Returns:
        The residual stream (B, L, d), and the router logits (B, L, E).
    """
    tokens = residual.flatten(0, 1)
    if not 0 < tokens.shape[0] <= MOST_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    experts, router = moe.experts, moe.router
    if (
        type(norm) is not RMSNorm
        or moe.config._experts_implementation != FUSED
        or moe.observer is not None
        or moe.shared_experts is not None
        or not (is_unhooked(norm) and is_unhooked(moe))
        or not moe.has_plain_experts()
        or norm.weight.dtype != experts.down_proj.dtype
        or not _is_plain_router(router, tokens)
        or not _are_plain_experts(experts, tokens)
    ):
        return None
    options: dict[str, Any] = {"norm_weight": norm.weight, "eps": norm.variance_epsilon}
    router_logits = fused_linear(tokens, router.weight, bias=router.bias, **options)
    out, *_ = _step(router, experts, tokens, router_logits, residual=tokens, **options)
    return out.view_as(residual), router_logits.unflatten(0, residual.shape[:2])
