"""`mamba_inner` in Triton: projections, the launchers of convolution and scan, and memory that they share."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import first_order_only
from ..causal_conv1d.triton_conv import Layout, conv_backward, conv_forward, layout_of
from ..packing import remembered
from ..selective_scan.triton_backward import scan_backward
from ..selective_scan.triton_common import ScanInputs
from ..selective_scan.triton_forward import plan_of, scan_forward
from ..selective_scan.triton_scan import compile_scan, flags_of

__all__ = ["MambaInnerTritonFunction", "mamba_inner_triton"]


def _scan_inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    parameters: Tensor,
    D: Tensor | None,
    z: Tensor,
    dt_bias: Tensor | None,
    flags: Tensor | None,
) -> ScanInputs:
    size = A.shape[1]
    return ScanInputs(
        x=x,
        dt=dt,
        A_t=A.t(),
        B=parameters[..., -2 * size : -size],
        C=parameters[..., -size:],
        D=None if D is None else D.contiguous(),
        z=z,
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        initial_states=None,
        flags=flags,
        cu_seqlens=None,
        dt_softplus=True,
    )


class MambaInnerTritonFunction(torch.autograd.Function):
    """(B, L, d) from the projection (B, L, 2 D); differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        x_weight: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor | None,
        A: Tensor,
        D: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
        silu: bool,
        layout: Layout,
        flags: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        entering, z = projected.chunk(2, dim=-1)
        x, _ = conv_forward(entering, conv_weight, conv_bias, None, layout, silu, False)
        parameters = F.linear(x, x_weight)
        dt = F.linear(parameters[..., : dt_weight.shape[1]], dt_weight)
        inputs = _scan_inputs(x, dt, A, parameters, D, z, dt_bias, flags)
        plan = plan_of(inputs)
        compile_scan(inputs, plan, True, False, lambda: torch.empty_like(projected)[..., z.shape[-1] :])
        y, _, table, starts = scan_forward(inputs, plan, True, False)
        ctx.save_for_backward(
            projected,
            conv_weight,
            conv_bias,
            x_weight,
            dt_weight,
            dt_bias,
            A,
            D,
            out_weight,
            layout.numbers,
            layout.ends,
            flags,
            None if recompute else x,
            parameters,
            None if recompute else dt,
            y,
            table,
            starts,
        )
        ctx.silu = silu
        return F.linear(y, out_weight, out_bias)

    @staticmethod
    @first_order_only("mamba_inner")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (
            projected,
            conv_weight,
            conv_bias,
            x_weight,
            dt_weight,
            dt_bias,
            A,
            D,
            out_weight,
            numbers,
            ends,
            flags,
            x,
            parameters,
            dt,
            y,
            table,
            starts,
        ) = ctx.saved_tensors
        layout, rank = Layout(numbers, None, ends), dt_weight.shape[1]
        wants_x_weight, wants_dt_weight = ctx.needs_input_grad[3:5]
        wants_out, wants_out_bias = ctx.needs_input_grad[8:10]
        rows = grad.flatten(0, 1)
        grad_out_weight = rows.mT @ y.flatten(0, 1) if wants_out else None
        grad_out_bias = rows.sum(0) if wants_out_bias else None
        entering, z = projected.chunk(2, dim=-1)
        if x is None:
            x, _ = conv_forward(entering, conv_weight, conv_bias, None, layout, ctx.silu, False)
        if dt is None:
            dt = F.linear(parameters[..., :rank], dt_weight)
        inputs = _scan_inputs(x, dt, A, parameters, D, z, dt_bias, flags)
        grad_projected = projected.new_empty(projected.shape)
        grad_entering, grad_z = grad_projected.chunk(2, dim=-1)
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, _, grad_dt_bias, _ = scan_backward(
            inputs, plan_of(inputs), table, starts, grad @ out_weight, None, grad_z=grad_z
        )
        assert grad_x is not None and grad_dt is not None and grad_B is not None and grad_C is not None
        grad_parameters = torch.empty_like(parameters)
        size = A.shape[1]
        grad_parameters[..., -2 * size : -size].copy_(grad_B)
        grad_parameters[..., -size:].copy_(grad_C)
        steps, of_parameters = grad_dt.flatten(0, 1), grad_parameters.flatten(0, 1)
        torch.mm(steps, dt_weight, out=of_parameters[:, :rank])
        # the scan's gradient of x, and that through the parameters in the same memory
        of_x = grad_x.flatten(0, 1)
        torch.addmm(of_x, of_parameters, x_weight, out=of_x)
        _, grad_conv_weight, grad_conv_bias, _ = conv_backward(
            entering, conv_weight, conv_bias, None, layout, ctx.silu, grad_x, dx=grad_entering
        )
        return (
            grad_projected,
            grad_conv_weight,
            grad_conv_bias,
            of_parameters.mT @ x.flatten(0, 1) if wants_x_weight else None,
            steps.mT @ parameters.flatten(0, 1)[:, :rank] if wants_dt_weight else None,
            _like(grad_dt_bias, dt_bias),
            _like(grad_A, A),
            _like(grad_D, D),
            grad_out_weight,
            grad_out_bias,
            *(None,) * 4,
        )


def _like(gradient: Tensor | None, value: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or value is None else gradient.to(value.dtype)


def mamba_inner_triton(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    recompute: bool,
) -> Tensor:
    """`mamba_inner` in Triton; arguments as there, assumed to be checked."""
    projected = projected.contiguous()
    return MambaInnerTritonFunction.apply(
        projected,
        conv_weight,
        None if conv_bias is None else conv_bias.contiguous(),
        x_weight,
        dt_weight,
        dt_bias,
        A,
        D,
        out_weight,
        out_bias,
        silu,
        layout_of(projected, seq_idx, None),
        None if seq_idx is None else remembered(seq_idx, "scan_flags", partial(flags_of, seq_idx)),
        recompute,
    )
