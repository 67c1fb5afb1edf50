"""The Triton selective scan as a differentiable op: `selective_scan_triton`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..compiling import compile_together
from ..dispatch import left_to_eager
from ..packing import remembered, resets_and_valid
from .eager import selective_scan_eager
from .triton_backward import scan_backward
from .triton_common import Plan, ScanInputs
from .triton_forward import plan_of, scan_forward

__all__ = ["SelectiveScanTritonFunction", "compile_scan", "flags_of", "selective_scan_triton"]


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
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, table, starts)
        ctx.dt_softplus, ctx.return_final_states = dt_softplus, return_final_states
        return y, y.new_empty(0) if final is None else final

    @staticmethod
    @first_order_only("selective_scan")
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, table, starts = ctx.saved_tensors
        inputs = _inputs(x, dt, A, B, C, D, z, dt_bias, initial_states, flags, cu_seqlens, ctx.dt_softplus)
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        states = grad_final.contiguous() if ctx.return_final_states and grad_final is not None else None
        grads = scan_backward(inputs, plan_of(inputs), table, starts, grad_y, states)
        likes = (x, dt, A, B, C, D, z, dt_bias, initial_states)
        return (
            *(None if g is None or v is None else g.to(v.dtype) for g, v in zip(grads, likes, strict=True)),
            *(None,) * 4,
        )


def flags_of(seq_idx: Tensor) -> Tensor:
    """(B, L) int8: the bits RESET and REAL of each token."""
    resets, valid = resets_and_valid(seq_idx)
    return resets.to(torch.int8) + 2 * valid.to(torch.int8)


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
        A_t=A.t(),
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


def compile_scan(
    inputs: ScanInputs,
    plan: Plan,
    differentiable: bool,
    return_final_states: bool,
    make_grad_z: Callable[[], Tensor] | None = None,
) -> None:
    """Have the kernels of a call ready: one after the other they take twice as long to compile.

    `make_grad_z` makes what backward is to be given.
    """

    def launch() -> None:
        y, _final, table, starts = scan_forward(inputs, plan, differentiable, return_final_states)
        if starts is not None and differentiable:
            scan_backward(inputs, plan, table, starts, y, None, None if make_grad_z is None else make_grad_z())

    kinds = [value if value is None else value.dtype for value in inputs[:-1]]
    ways = (
        inputs.dt_softplus,
        differentiable,
        return_final_states,
        plan.split,
        plan.wavefront,
        plan.n_chunks > 1,
        plan.packed,
        plan.whole,
        make_grad_z is not None,
    )
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
        flags = remembered(seq_idx, "scan_flags", partial(flags_of, seq_idx))
    options = (flags, cu_seqlens, dt_softplus)
    differentiable = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in floats)
    inputs = _inputs(*floats, *options)
    plan = plan_of(inputs)
    if not torch.compiler.is_compiling():
        compile_scan(inputs, plan, differentiable, return_final_states)
    if differentiable:
        y, final = SelectiveScanTritonFunction.apply(*floats, *options, return_final_states)
    else:
        y, final, _, _ = scan_forward(inputs, plan, False, return_final_states)
    return (y, final) if return_final_states else y
