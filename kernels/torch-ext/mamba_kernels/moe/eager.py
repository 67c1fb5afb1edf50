"""Routed experts in vectorised torch, for any device: experts one after the other, those without tokens left out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["experts_step_eager", "route_eager", "routed_experts_eager"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def route_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, scoring: str, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`route` in plain torch."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return logits, *_choose(logits, top_k, scoring, normalize, scale)


def _choose(logits: Tensor, top_k: int, scoring: str, normalize: bool, scale: float) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1) if scoring == "softmax" else logits.sigmoid()
    weights, indices = scores.topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale, indices


def routed_experts_eager(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """`routed_experts` in plain torch."""
    dtype = torch.promote_types(torch.promote_types(weights.dtype, up.dtype), torch.float32)
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    tokens = x.to(up.dtype)
    for expert in indices.unique().tolist():
        if not 0 <= expert < up.shape[0]:
            continue
        token, slot = torch.where(indices == expert)
        h = F.linear(tokens[token], up[expert], None if up_bias is None else up_bias[expert])
        if gated:
            gate, value = h.chunk(2, dim=-1)
            h = _ACTIVATIONS[activation](gate) * value
        else:
            h = _ACTIVATIONS[activation](h)
        y = F.linear(h, down[expert], None if down_bias is None else down_bias[expert])
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(dtype))
    return out.to(x.dtype)


def experts_step_eager(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    router_logits: Tensor | None = None,
    top_k: int = 1,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`experts_step` in plain torch."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if indices is None or weights is None:
        assert router_logits is not None
        weights, indices = _choose(router_logits, top_k, scoring, normalize, scale)
    if norm_weight is not None:
        x = x.to(dtype)
        x = x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * norm_weight.to(dtype)
    options: dict[str, Any] = {"up_bias": up_bias, "down_bias": down_bias}
    y = routed_experts_eager(
        x.to(up.dtype), indices, weights, up, down, activation=activation, gated=gated, **options
    ).to(torch.promote_types(up.dtype, torch.float32))
    if residual is not None:
        return (y + residual).to(torch.promote_types(residual.dtype, down.dtype)), indices, weights
    return y.to(down.dtype), indices, weights
