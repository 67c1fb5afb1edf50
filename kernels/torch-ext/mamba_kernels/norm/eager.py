"""The norms in vectorised torch: backward recomputes from the inputs, which are all that is saved."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order_only

__all__ = ["add_rms_norm_eager", "rms_norm_eager", "rms_norm_gated_eager"]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inverse_rms(value: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean square + eps) over the last dimension of `value`, (…, 1)."""
    # the vector norm reads its input once and keeps no squared copy of it
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    # in place, since on the single row of a decoding step every new tensor costs as much as the sum
    return norm.square_().div_(max(value.shape[-1], 1)).add_(eps).rsqrt_()


def _norm_backward(dnormed: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of `value` where normed = value · inverse; all (…, D), `inverse` (…, 1)."""
    projection = (dnormed * normed).mean(dim=-1, keepdim=True)
    return torch.addcmul(dnormed, normed, projection, value=-1).mul_(inverse)


def _wants_gradient(*values: Tensor | None) -> bool:
    """Whether an `autograd.Function` is needed; without gradients it would only cost time."""
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    if x.shape[-1] and x.dtype == out_dtype == _accumulator(x) and (weight is None or weight.dtype == x.dtype):
        # nothing is rounded on the way, so torch's own norm is the same, in one call
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    value = x.to(_accumulator(x))
    y = (value * _inverse_rms(value, eps)).to(out_dtype)
    return y if weight is None else (y * weight).to(out_dtype)


def _rms_norm_gated(
    x: Tensor, weight: Tensor | None, z: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    dtype = _accumulator(x)
    value = x.to(dtype)
    gate = torch.nn.functional.silu(z.to(dtype))
    if not norm_before_gate:
        value = value * gate
    groups = value.unflatten(-1, (-1, group_size))
    y = (groups * _inverse_rms(groups, eps)).flatten(-2)
    if norm_before_gate:
        if weight is not None:
            y = y * weight.to(dtype)
        return (y * gate).to(x.dtype)
    y = y.to(x.dtype)
    return y if weight is None else (y * weight).to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """norm(x) · weight; x (…, D), weight (D,) or None; result in `out_dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.out_dtype = eps, out_dtype
        return _rms_norm(x, weight, eps, out_dtype)

    @staticmethod
    @first_order_only("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        value = x.to(_accumulator(x))
        inverse = _inverse_rms(value, ctx.eps)
        normed = value * inverse
        dy = dy.to(value.dtype)
        dweight = None
        if weight is not None:
            rounded = normed.to(ctx.out_dtype).to(value.dtype)
            dweight = (dy * rounded).flatten(0, -2).sum(0) if x.dim() > 1 else dy * rounded
            dweight = dweight.to(weight.dtype)
            dy = dy * weight.to(value.dtype)
        return _norm_backward(dy, normed, inverse).to(x.dtype), dweight, None, None


class GatedRMSNormFunction(torch.autograd.Function):
    """Grouped norm with a gate; x, z (…, D), weight (D,) or None; result in x.dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, z: Tensor, eps: float, group_size: int, norm_before_gate: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, z)
        ctx.eps, ctx.group_size, ctx.norm_before_gate = eps, group_size, norm_before_gate
        return _rms_norm_gated(x, weight, z, eps, group_size, norm_before_gate)

    @staticmethod
    @first_order_only("rms_norm_gated")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z = ctx.saved_tensors
        dtype = _accumulator(x)
        xf, zf = x.to(dtype), z.to(dtype)
        gate = torch.nn.functional.silu(zf)
        dy = dy.to(dtype)
        groups = (xf if ctx.norm_before_gate else xf * gate).unflatten(-1, (-1, ctx.group_size))
        inverse = _inverse_rms(groups, ctx.eps)
        normed = (groups * inverse).flatten(-2)
        dgate = None
        if ctx.norm_before_gate:
            scaled = normed if weight is None else normed * weight.to(dtype)
            dgate = dy * scaled
            dy = dy * gate
        dweight = None
        if weight is not None:
            rounded = normed if ctx.norm_before_gate else normed.to(x.dtype).to(dtype)
            dweight = (dy * rounded).flatten(0, -2).sum(0) if x.dim() > 1 else dy * rounded
            dweight = dweight.to(weight.dtype)
            dy = dy * weight.to(dtype)
        split = (-1, ctx.group_size)
        dvalue = _norm_backward(dy.unflatten(-1, split), normed.unflatten(-1, split), inverse).flatten(-2)
        if not ctx.norm_before_gate:
            dgate = dvalue * xf
            dvalue = dvalue * gate
        dz = torch.ops.aten.silu_backward(dgate, zf)
        return dvalue.to(x.dtype), dweight, dz.to(z.dtype), None, None, None


def _normed(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    if _wants_gradient(x, weight):
        return RMSNormFunction.apply(x, weight, eps, out_dtype)
    return _rms_norm(x, weight, eps, out_dtype)


def rms_norm_eager(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`rms_norm` without its argument checks."""
    return _normed(x, weight, eps, x.dtype)


def add_rms_norm_eager(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` without its argument checks."""
    if residual is None:
        total = x.to(residual_dtype)
    else:
        # type promotion alone would add bf16 to fp16 or bf16 to bf16 outside fp32
        dtype = torch.promote_types(_accumulator(x), residual.dtype)
        total = (x.to(dtype) + residual.to(dtype)).to(residual_dtype)
    return _normed(total, weight, eps, x.dtype), total


def rms_norm_gated_eager(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """`rms_norm_gated` without its argument checks."""
    if z is None:
        if group_size == x.shape[-1]:
            return _normed(x, weight, eps, x.dtype)
        split = x.unflatten(-1, (-1, group_size))
        if weight is None:
            return _normed(split, None, eps, x.dtype).flatten(-2)
        return (_normed(split, None, eps, x.dtype).flatten(-2) * weight).to(x.dtype)
    run = GatedRMSNormFunction.apply if _wants_gradient(x, weight, z) else _rms_norm_gated
    return run(x, weight, z, eps, group_size, norm_before_gate)
