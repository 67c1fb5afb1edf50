"""The Triton SSD scan as a differentiable op: `ssd_chunk_scan_triton`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..compiling import compile_together
from ..dispatch import left_to_eager
from ..packing import remembered, segments_and_valid
from .eager import ssd_chunk_scan_eager
from .sizes import fits_16_bits, in_whole_rows
from .triton_backward import ssd_backward
from .triton_forward import ssd_forward
from .triton_plan import Operands, Places, Plan, plan_of

__all__ = ["SSDChunkScanTritonFunction", "compile_scan", "marks_of", "ssd_chunk_scan_triton"]


class SSDChunkScanTritonFunction(torch.autograd.Function):
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
        marks: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_limit: tuple[float, float] | None,
        return_final_states: bool,
    ) -> tuple[Tensor, Tensor]:
        operands = _operands(x, dt, A, B, C, D, z, dt_bias, initial_states, marks, cu_seqlens, dt_softplus, dt_limit)
        plan = plan_of(operands)
        compile_scan(operands, plan, True, return_final_states)
        y, final, starts = ssd_forward(operands, plan, True, return_final_states)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_states, marks, cu_seqlens, starts)
        # zeros for the second output, where nobody asks for it, would be a launch
        ctx.set_materialize_grads(False)
        ctx.dt_softplus, ctx.dt_limit = dt_softplus, dt_limit
        # the tracer keeps plain values only
        ctx.plan = None if torch.compiler.is_compiling() else plan
        return y, y.new_empty(0) if final is None else final

    @staticmethod
    @first_order_only("ssd_chunk_scan")
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_states, marks, cu_seqlens, starts = ctx.saved_tensors
        operands = _operands(
            x, dt, A, B, C, D, z, dt_bias, initial_states, marks, cu_seqlens, ctx.dt_softplus, ctx.dt_limit
        )
        if grad_y is None:
            grad_y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        states = None if grad_final is None or not grad_final.numel() else grad_final.contiguous()
        if x.dtype != torch.float32 and not in_whole_rows(grad_y):
            grad_y = grad_y.clone(memory_format=torch.contiguous_format)
        gradients = ssd_backward(operands, ctx.plan or plan_of(operands), _dense_rows(grad_y), starts, states)
        likes = (x, dt, A, B, C, D, z, dt_bias, initial_states)
        found = [
            g if g is None or v is None or g.dtype is v.dtype else g.to(v.dtype)
            for g, v in zip(gradients, likes, strict=True)
        ]
        return (*found, None, None, None, None, None)


def marks_of(seq_idx: Tensor) -> Tensor:
    """`Operands.marks` of (B, L) sequence numbers."""
    return remembered(seq_idx, "ssd_marks", lambda: _new_marks(seq_idx))


def _new_marks(seq_idx: Tensor) -> Tensor:
    segments, valid = segments_and_valid(seq_idx)
    real = 1 if valid is None else valid.to(torch.int32)
    return segments.to(torch.int32) * 2 + real


def _dense_rows(value: Tensor) -> Tensor:
    """`value` with its innermost elements next to each other; a copy only where they are not."""
    return value if value.stride(-1) == 1 else value.contiguous()


def _operands(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    marks: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
) -> Operands:
    return Operands(
        x=_dense_rows(x),
        dt=dt,
        A=A.contiguous(),
        B=_dense_rows(B),
        C=_dense_rows(C),
        D=None if D is None else D.contiguous(),
        z=None if z is None else _dense_rows(z),
        dt_bias=None if dt_bias is None else dt_bias.contiguous(),
        initial_states=None if initial_states is None else initial_states.contiguous(),
        marks=marks,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )


def compile_scan(
    operands: Operands,
    plan: Plan,
    differentiable: bool,
    return_final_states: bool,
    places: Callable[[], Places] | None = None,
) -> None:
    """Have the kernels of a call ready: one after the other they take twice as long to compile.

    `places` makes what backward is to be given.
    """
    if torch.compiler.is_compiling():
        return

    def launch() -> None:
        bounds = operands.cu_seqlens
        # tables that nothing is written to are not to be remembered
        given = operands if bounds is None else operands._replace(cu_seqlens=bounds.clone())
        y, final, starts = ssd_forward(given, plan, differentiable, return_final_states)
        if differentiable:
            ssd_backward(given, plan, y, starts, final, None if places is None else places())

    kinds = [value if value is None else value.dtype for value in operands[:9]]
    per_channel = operands.D is not None and operands.D.dim() == 2
    ways = (differentiable, return_final_states, plan.split, per_channel, places is not None)
    compile_together(
        ("ssd_chunk_scan", operands.x.device, *plan.meta(operands).values(), *kinds, *ways),
        launch,
    )


def ssd_chunk_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_chunk_scan` in Triton; arguments as there, assumed to be checked. fp64, N > 256 and empty inputs run in eager.

    Blocks have a length of the kernels' own, whatever `chunk_size` is. 16-bit operands of odd sizes are computed in fp32 (`sizes`).
    """
    floats = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    if left_to_eager(*floats, state_size=B.shape[3]):
        return ssd_chunk_scan_eager(
            x,
            dt,
            A,
            B,
            C,
            chunk_size=chunk_size,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
    if B.dtype != C.dtype:
        common = torch.promote_types(B.dtype, C.dtype)
        B, C = B.to(common), C.to(common)
        floats = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    if x.dtype == B.dtype != torch.float32 and not (
        fits_16_bits(x.shape[3], B.shape[3]) and in_whole_rows(x, B, C, z)
    ):
        found = ssd_chunk_scan_triton(
            x.float(),
            dt,
            A,
            B.float(),
            C.float(),
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
        return (found[0].to(x.dtype), found[1]) if isinstance(found, tuple) else found.to(x.dtype)
    marks = None
    if seq_idx is not None:
        marks = marks_of(seq_idx)
    unlimited = (0.0, math.inf) if dt_softplus else (-math.inf, math.inf)
    limit = None if tuple(dt_limit) in (unlimited, (-math.inf, math.inf)) else (dt_limit[0], dt_limit[1])
    options = (marks, cu_seqlens, dt_softplus, limit)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in floats):
        y, final = SSDChunkScanTritonFunction.apply(*floats, *options, return_final_states)
        return (y, final) if return_final_states else y
    operands = _operands(*floats, *options)
    plan = plan_of(operands)
    compile_scan(operands, plan, False, return_final_states)
    y, states, _ = ssd_forward(operands, plan, False, return_final_states)
    return y if states is None else (y, states)
