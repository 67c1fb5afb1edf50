"""The Triton selective scan as a differentiable op: `selective_scan_triton`."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..compiling import compile_together
from ..dispatch import left_to_eager
from ..packing import resets_and_valid
from .eager import selective_scan_eager
from .triton_backward import scan_backward
from .triton_forward import ScanInputs, plan_of, scan_forward

__all__ = ["SelectiveScanTritonFunction", "selective_scan_triton"]


class SelectiveScanTritonFunction(torch.autograd.Function):
    """The scan, differentiable once. The second output is empty unless final states are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
        flags: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = _inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, dt_softplus)
        plan = plan_of(inputs)
        y, final, table, starts = scan_forward(inputs, plan, True, return_final_states)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, table, starts)
        ctx.dt_softplus, ctx.return_final_states = dt_softplus, return_final_states
        return y, y.new_empty(0) if final is None else final

    @staticmethod
    @first_order_only("selective_scan")
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, table, starts = ctx.saved_tensors
        inputs = _inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, ctx.dt_softplus)
        states = grad_final.contiguous() if ctx.return_final_states else None
        grads = scan_backward(inputs, plan_of(inputs), table, starts, grad_y, states)
        likes = (x, dt, A, B, C, D, z, dt_bias, initial_states)
        return (
            *(None if g is None or v is None else g.to(v.dtype) for g, v in zip(grads, likes, strict=True)),
            *(None,) * 4,
        )


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    flags: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> ScanInputs:
    return ScanInputs(
        x=x,
        dt=dt,
        # transposed, so that neighbouring threads read neighbouring channels
        A_t=torch.empty((A.shape[1], A.shape[0]), dtype=torch.float32, device=A.device).copy_(A.t()),
        B=B,
        C=C,
        D=None if D is None else D.contiguous(),
        z=z,
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        initial_states=None if initial_states is None else initial_states.contiguous(),
        flags=flags,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        dt_softplus=dt_softplus,
    )


def _compile_kernels(inputs: ScanInputs, differentiable: bool, return_final_states: bool) -> None:
    """Have the kernels of a call ready: one after the other they take twice as long to compile."""
    plan = plan_of(inputs)

    def launch() -> None:
        y, final, table, starts = scan_forward(inputs, plan, differentiable, return_final_states)
        if starts is not None and differentiable:
            scan_backward(inputs, plan, table, starts, y, final)

    kinds = [value if value is None else value.dtype for value in inputs[:-1]]
    ways = (inputs.dt_softplus, differentiable, return_final_states, plan.split, plan.n_chunks > 1, plan.packed)
    compile_together(
        ("selective_scan", inputs.x.device, plan.size, plan.groups, *kinds, *ways),
        launch,
    )


def selective_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in Triton; arguments as there, assumed to be checked. fp64, N > 256 and empty inputs run in eager."""
    floats = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    if left_to_eager(*floats, state_size=A.shape[1]):
        return selective_scan_eager(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
    flags = None
    if seq_idx is not None:
        resets, valid = resets_and_valid(seq_idx)
        flags = resets.to(torch.int8) + 2 * valid.to(torch.int8)
    options = (flags, cu_seqlens, dt_softplus)
    differentiable = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in floats)
    if not torch.compiler.is_compiling():
        _compile_kernels(_inputs(*floats, *options), differentiable, return_final_states)
    if differentiable:
        y, final = SelectiveScanTritonFunction.apply(*floats, *options, return_final_states)
    else:
        inputs = _inputs(*floats, *options)
        y, final, _, _ = scan_forward(inputs, plan_of(inputs), False, return_final_states)
    return (y, final) if return_final_states else y
