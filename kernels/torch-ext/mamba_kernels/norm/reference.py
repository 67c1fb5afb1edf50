"""fp64 oracles of the norms, straight from the formulas and differentiable by autograd."""

import torch
from torch import Tensor

__all__ = ["add_rms_norm_ref", "rms_norm_gated_ref", "rms_norm_ref"]


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def rms_norm_ref(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`rms_norm` in fp64; result in x.dtype."""
    y = _normalise(x.double(), eps)
    return (y if weight is None else y * weight.double()).to(x.dtype)


def add_rms_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in fp64; the normed value in x.dtype, the sum in `residual_dtype`."""
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    total = x.double() if residual is None else x.double() + residual.double()
    total = total.to(residual_dtype)
    return rms_norm_ref(total.double(), weight, eps).to(x.dtype), total


def rms_norm_gated_ref(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """`rms_norm_gated` in fp64; result in x.dtype."""
    width = x.shape[-1]
    gate = 1.0 if z is None else z.double() * torch.sigmoid(z.double())
    scale = 1.0 if weight is None else weight.double()
    value = x.double() if norm_before_gate else x.double() * gate
    groups = value.unflatten(-1, (-1, group_size or max(width, 1)))
    y = _normalise(groups, eps).reshape(x.shape) * scale
    return (y * gate if norm_before_gate else y).to(x.dtype)
