"""`mamba2_inner` in Triton: the launchers of convolution, SSD and norm with memory that they share."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import first_order_only
from ..causal_conv1d.triton_conv import Layout, conv_backward, conv_forward, layout_of
from ..norm.triton_backward import norm_backward
from ..norm.triton_forward import norm_forward
from ..ssd.triton_backward import ssd_backward
from ..ssd.triton_forward import ssd_forward
from ..ssd.triton_plan import Operands, Places, plan_of
from ..ssd.triton_scan import compile_scan, marks_of
from .interface import MixerSizes

__all__ = ["Mamba2InnerTritonFunction", "mamba2_inner_triton"]


def _parts(convolved: Tensor, sizes: MixerSizes) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, H, P), B and C (B, L, G, N) of what the convolution gives, or of its gradient."""
    inner, states = sizes.widths[0], sizes.groups * sizes.state_size
    x, B, C = convolved.split([inner, states, states], dim=-1)
    by_group = (*B.shape[:2], sizes.groups, sizes.state_size)
    return x.view(*x.shape[:2], sizes.heads, sizes.head_dim), B.view(by_group), C.view(by_group)


def _operands(
    convolved: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    marks: Tensor | None,
    sizes: MixerSizes,
) -> Operands:
    x, B, C = _parts(convolved, sizes)
    return Operands(
        x=x,
        dt=dt,
        A=A.contiguous(),
        B=B,
        C=C,
        D=None if D is None else D.contiguous(),
        z=None,
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        initial_states=None,
        marks=marks,
        cu_seqlens=None,
        dt_softplus=True,
        dt_limit=None if sizes.dt_limit in ((0.0, math.inf), (-math.inf, math.inf)) else sizes.dt_limit,
    )


def _places(grad_convolved: Tensor, grad_dt: Tensor, sizes: MixerSizes) -> Places:
    x, B, C = _parts(grad_convolved, sizes)
    return Places(x=x, dt=grad_dt, B=B, C=C, row=sizes.widths[1], row_of_dt=sum(sizes.widths))


class Mamba2InnerTritonFunction(torch.autograd.Function):
    """(B, L, D'), or (B, L, d) with `out_weight`, from the projection; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        A: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        norm_weight: Tensor,
        out_weight: Tensor | None,
        out_bias: Tensor | None,
        sizes: MixerSizes,
        layout: Layout,
        marks: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        z, xBC, dt = projected.split(sizes.widths, dim=-1)
        convolved, _ = conv_forward(xBC, conv_weight, conv_bias, None, layout, sizes.silu, False)
        operands = _operands(convolved, dt, A, D, dt_bias, marks, sizes)
        plan = plan_of(operands)

        def places() -> Places:
            return _places(torch.empty_like(convolved), torch.empty_like(projected)[..., -sizes.heads :], sizes)

        compile_scan(operands, plan, True, False, places)
        y, _, starts = ssd_forward(operands, plan, True, False)
        y = y.flatten(-2)
        normed, _ = norm_forward(y, z, norm_weight, sizes.eps, sizes.group_size, "gate first")
        ctx.save_for_backward(
            projected,
            conv_weight,
            conv_bias,
            A,
            D,
            dt_bias,
            norm_weight,
            out_weight,
            layout.numbers,
            layout.ends,
            marks,
            None if recompute else convolved,
            y,
            starts,
        )
        ctx.sizes, ctx.plan = sizes, plan
        return normed if out_weight is None else F.linear(normed, out_weight, out_bias)

    @staticmethod
    @first_order_only("mamba2_inner")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (
            projected,
            conv_weight,
            conv_bias,
            A,
            D,
            dt_bias,
            norm_weight,
            out_weight,
            numbers,
            ends,
            marks,
            convolved,
            y,
            starts,
        ) = ctx.saved_tensors
        sizes, layout = ctx.sizes, Layout(numbers, None, ends)
        wants_norm, wants_out, wants_out_bias = ctx.needs_input_grad[6:9]
        grad_projected = projected.new_empty(projected.shape)
        z, xBC, dt = projected.split(sizes.widths, dim=-1)
        grad_z, grad_xBC, grad_dt = grad_projected.split(sizes.widths, dim=-1)
        grad_out_weight = grad_out_bias = normed = None
        grad_normed = grad
        if out_weight is not None:
            grad_normed = grad @ out_weight
            normed = torch.empty_like(y) if wants_out else None
            grad_out_bias = grad.flatten(0, 1).sum(0) if wants_out_bias else None
        grad_y, _, grad_norm_weight = norm_backward(
            grad_normed,
            y,
            z,
            norm_weight,
            sizes.eps,
            sizes.group_size,
            "gate first",
            wants_norm,
            y.dtype,
            dextra=grad_z,
            y=normed,
        )
        if normed is not None:
            grad_out_weight = grad.flatten(0, 1).mT @ normed.flatten(0, 1)
        # memory that the scan can use
        del grad, grad_normed, normed, y
        if convolved is None:
            convolved, _ = conv_forward(xBC, conv_weight, conv_bias, None, layout, sizes.silu, False)
        operands = _operands(convolved, dt, A, D, dt_bias, marks, sizes)
        grad_convolved = torch.empty_like(convolved)
        found = ssd_backward(
            operands,
            ctx.plan,
            grad_y.view(operands.x.shape),
            starts,
            None,
            _places(grad_convolved, grad_dt, sizes),
        )
        _, grad_conv_weight, grad_conv_bias, _ = conv_backward(
            xBC, conv_weight, conv_bias, None, layout, sizes.silu, grad_convolved, dx=grad_xBC
        )
        return (
            grad_projected,
            grad_conv_weight,
            grad_conv_bias,
            _like(found.A, A),
            _like(found.D, D),
            _like(found.dt_bias, dt_bias),
            grad_norm_weight,
            grad_out_weight,
            grad_out_bias,
            *(None,) * 4,
        )


def _like(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or value is None else gradient.to(value.dtype)


def mamba2_inner_triton(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    sizes: MixerSizes,
    seq_idx: Tensor | None,
    recompute: bool,
) -> Tensor:
    """`mamba2_inner` in Triton; arguments as there, assumed to be checked."""
    projected = projected.contiguous()
    return Mamba2InnerTritonFunction.apply(
        projected,
        conv_weight,
        None if conv_bias is None else conv_bias.contiguous(),
        A,
        D,
        dt_bias,
        norm_weight,
        out_weight,
        out_bias,
        sizes,
        layout_of(projected, seq_idx, None),
        None if seq_idx is None else marks_of(seq_idx),
        recompute,
    )
