"""The RMS norms in Triton as differentiable ops."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..dispatch import left_to_eager
from .eager import add_rms_norm_eager, rms_norm_eager, rms_norm_gated_eager
from .triton_backward import norm_backward
from .triton_forward import norm_forward

__all__ = ["add_rms_norm_triton", "rms_norm_gated_triton", "rms_norm_triton"]


class RMSNormTritonFunction(torch.autograd.Function):
    """norm(x) · weight over groups of `width` channels; x (…, D), weight (D,) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, width: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.width = eps, width
        return norm_forward(x, None, weight, eps, width, "nothing")[0]

    @staticmethod
    @first_order_only("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_dweight = ctx.needs_input_grad[1]
        dx, _, dweight = norm_backward(dy, x, None, weight, ctx.eps, ctx.width, "nothing", wants_dweight, x.dtype)
        return dx, dweight, None, None


class AddRMSNormTritonFunction(torch.autograd.Function):
    """The sum of x and residual (…, D) in `total_dtype`, and its norm · weight in x.dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, total_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        extra_is = "nothing" if residual is None else "residual"
        ctx.set_materialize_grads(False)
        y, total = norm_forward(x, residual, weight, eps, x.shape[-1], extra_is, total_dtype)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.x_dtype, ctx.residual_dtype = eps, x.dtype, None if residual is None else residual.dtype
        return y, total

    @staticmethod
    @first_order_only("add_rms_norm")
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        if dy is None:
            # only the sum was used
            dx = None if dtotal is None else dtotal.to(ctx.x_dtype)
            dresidual = None if dtotal is None or ctx.residual_dtype is None else dtotal.to(ctx.residual_dtype)
            return dx, dresidual, None, None, None
        width, wants_dweight = total.shape[-1], ctx.needs_input_grad[2]
        # one gradient serves both operands if they have the same dtype
        second = None if ctx.residual_dtype == ctx.x_dtype else ctx.residual_dtype
        extra_is = "nothing" if dtotal is None else "residual"
        dx, dresidual, dweight = norm_backward(
            dy, total, dtotal, weight, ctx.eps, width, extra_is, wants_dweight, ctx.x_dtype, second
        )
        return dx, None if ctx.residual_dtype is None else dresidual, dweight, None, None


class GatedRMSNormTritonFunction(torch.autograd.Function):
    """The grouped norm with a gate; x, z (…, D), weight (D,) or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, z: Tensor, eps: float, width: int, norm_before_gate: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, z)
        ctx.eps, ctx.width, ctx.norm_before_gate = eps, width, norm_before_gate
        return norm_forward(x, z, weight, eps, width, "gate last" if norm_before_gate else "gate first")[0]

    @staticmethod
    @first_order_only("rms_norm_gated")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z = ctx.saved_tensors
        extra_is = "gate last" if ctx.norm_before_gate else "gate first"
        wants_dweight = ctx.needs_input_grad[1]
        dx, dz, dweight = norm_backward(
            dy, x, z, weight, ctx.eps, ctx.width, extra_is, wants_dweight, x.dtype, z.dtype
        )
        return dx, dweight, dz, None, None, None


def _differentiates(*values: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """`rms_norm` in Triton, arguments assumed to be checked. fp64 and empty inputs run in eager."""
    if left_to_eager(x, weight):
        return rms_norm_eager(x, weight, eps)
    if _differentiates(x, weight):
        return RMSNormTritonFunction.apply(x, weight, eps, x.shape[-1])
    return norm_forward(x, None, weight, eps, x.shape[-1], "nothing")[0]


def add_rms_norm_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in Triton, arguments assumed to be checked. fp64 and empty inputs run in eager."""
    if residual_dtype == torch.float64 or left_to_eager(x, residual, weight):
        return add_rms_norm_eager(x, residual, weight, eps, residual_dtype)
    if residual is None and residual_dtype == x.dtype:
        return rms_norm_triton(x, weight, eps), x
    if _differentiates(x, residual, weight):
        return AddRMSNormTritonFunction.apply(x, residual, weight, eps, residual_dtype)
    return norm_forward(
        x, residual, weight, eps, x.shape[-1], "nothing" if residual is None else "residual", residual_dtype
    )


def rms_norm_gated_triton(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    """`rms_norm_gated` in Triton, arguments assumed to be checked. fp64 and empty inputs run in eager."""
    if left_to_eager(x, weight, z):
        return rms_norm_gated_eager(x, weight, z, eps, group_size, norm_before_gate)
    if z is None:
        if _differentiates(x, weight):
            return RMSNormTritonFunction.apply(x, weight, eps, group_size)
        return norm_forward(x, None, weight, eps, group_size, "nothing")[0]
    if _differentiates(x, weight, z):
        return GatedRMSNormTritonFunction.apply(x, weight, z, eps, group_size, norm_before_gate)
    return norm_forward(x, z, weight, eps, group_size, "gate last" if norm_before_gate else "gate first")[0]
