"""`add_norm_linear` in Triton: the norm's backward makes the input of the projection again."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import first_order_only
from ..norm.triton_backward import norm_backward
from ..norm.triton_forward import norm_forward

__all__ = ["AddNormLinearTritonFunction"]


class AddNormLinearTritonFunction(torch.autograd.Function):
    """The projection of the norm of x + residual, and the sum in `total_dtype`; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        total_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        extra_is = "nothing" if residual is None else "residual"
        normed, total = norm_forward(x, residual, norm_weight, eps, x.shape[-1], extra_is, total_dtype)
        ctx.save_for_backward(total, norm_weight, weight)
        ctx.eps, ctx.x_dtype, ctx.residual_dtype = eps, x.dtype, None if residual is None else residual.dtype
        return F.linear(normed, weight, bias), total

    @staticmethod
    @first_order_only("add_norm_linear")
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, norm_weight, weight = ctx.saved_tensors
        if grad is None:
            # only the sum was used
            dx = None if grad_total is None else grad_total.to(ctx.x_dtype)
            dresidual = None if grad_total is None or ctx.residual_dtype is None else grad_total.to(ctx.residual_dtype)
            return dx, dresidual, *(None,) * 5
        wants_norm, wants_weight, wants_bias = ctx.needs_input_grad[2:5]
        normed = torch.empty_like(total, dtype=ctx.x_dtype) if wants_weight else None
        dx, dresidual, grad_norm_weight = norm_backward(
            grad @ weight,
            total,
            grad_total,
            norm_weight,
            ctx.eps,
            total.shape[-1],
            "nothing" if grad_total is None else "residual",
            wants_norm,
            ctx.x_dtype,
            # one gradient serves both operands if they have the same dtype
            None if ctx.residual_dtype == ctx.x_dtype else ctx.residual_dtype,
            y=normed,
        )
        rows = grad.flatten(0, -2)
        return (
            dx,
            None if ctx.residual_dtype is None else dresidual,
            grad_norm_weight,
            None if normed is None else rows.mT @ normed.flatten(0, -2),
            rows.sum(0) if wants_bias else None,
            None,
            None,
        )
