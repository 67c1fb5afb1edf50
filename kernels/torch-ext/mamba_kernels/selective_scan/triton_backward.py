"""Backward of the selective scan in Triton: gradients of every operand, the same bits every time.

With g_t = dL/dy_t silu(z_t) and dh_t the whole gradient of the state h_t (see `triton_forward` for the recurrence)::

    dh_t   = C_t g_t + a_{t+1} dh_{t+1}              a_t = exp(delta_t A)
    dB_t   = sum over channels of dh_t delta_t x_t   dC_t = sum over channels of h_t g_t
    ddelta = A . (dh_t a_t h_{t-1}) + x_t (B_t . dh_t)
    dA     = sum over t of dh_t a_t h_{t-1} delta_t  dx_t = delta_t (B_t . dh_t) + D g_t

The forward kept the state before each chunk. `triton_sweep` walks forward once more and writes down the state before each tile
of K tokens; then a program takes BD channels of one chunk and goes backward tile by tile, with the tile's states in registers
(`triton_gradients`).
Sums over channels and over chunks are partial sums in memory that a second kernel adds up in a fixed order. Symbols:
`triton_common`.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_chain import launch_chain, pass_states
from .triton_common import (
    Plan,
    ScanInputs,
    Tuning,
    ceil_div,
    scan_kernel,
    state_parts,
    strides_or_zeros,
    wide,
)
from .triton_gradients import selective_scan_bwd_kernel
from .triton_sweep import launch_tile_states

__all__ = ["scan_backward"]

BACKWARD = Tuning(channels=32, tile=8, registers=168)
# the walk before it, and states of a program there; its tile divides that of the backward
SWEEP = Tuning(channels=64, tile=8)
SWEEP_STATES = 16
# the same when it makes the gradients of the chunks, too
GRADIENT_SWEEP = Tuning(channels=32, tile=8)
GRADIENT_STATES = 8
# states that the backward works on at a time
PARTS = 2
# the states before each tile are written for as many chunks at a time as fit in this many bytes
WORKSPACE_BYTES = 1 << 29


@scan_kernel
def _sum_partials_kernel(partials, total, count, size, BLOCK: tl.constexpr):
    """total (size,) = sum over the `count` rows of partials (count, size), first to last."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, count):
        acc += tl.load(partials + wide(i) * size + offsets, mask=mask, other=0.0)
    tl.store(total + offsets, acc.to(total.dtype.element_ty), mask=mask)


def scan_backward(
    inputs: ScanInputs,
    plan: Plan,
    table: Tensor | None,
    starts: Tensor,
    grad_y: Tensor,
    grad_final: Tensor | None,
    grad_z: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_states, None for what was not given.

    Args:
        starts: (slots, N, D) fp32, the state before each chunk, from the forward.
        grad_y: (B, L, D).
        grad_final: (sequences, D, N) contiguous, the gradient of the final states.
        grad_z: (B, L, D), where that gradient is to be written: a slice of wider rows that lie one behind the other.
    """
    x, z = inputs.x, inputs.z
    device = x.device
    chained = plan.n_chunks > 1
    tuning = BACKWARD
    blocks = ceil_div(plan.channels // plan.groups, tuning.channels)
    sums = torch.empty((plan.n_slots, plan.size + 2, plan.channels), dtype=torch.float32, device=device)
    partials = torch.empty(
        (blocks, 2, plan.batch, plan.length, plan.groups, plan.size), dtype=torch.float32, device=device
    )
    shape = (plan.batch, plan.length, plan.channels)
    grad_x = torch.empty(shape, dtype=x.dtype, device=device)
    grad_dt = torch.empty(shape, dtype=inputs.dt.dtype, device=device)
    row_of_z = 0 if grad_z is None else grad_z.stride(1)
    if z is not None and grad_z is None:
        grad_z = torch.empty(shape, dtype=z.dtype, device=device)
    initial = inputs.initial_states
    grad_initial = None if initial is None else torch.empty_like(initial)
    # contiguous, so that neighbouring threads read neighbouring channels
    inputs = inputs._replace(A_t=inputs.A_t.contiguous())
    placeholder = inputs.A_t

    half = all(value.dtype in (torch.bfloat16, torch.float16) for value in (x, inputs.B, inputs.C))
    exact = any(value.dtype != torch.bfloat16 for value in (x, inputs.B, inputs.C))
    n_tiles = ceil_div(plan.chunk, tuning.tile)
    at_once = max(1, WORKSPACE_BYTES // ((4 if exact else 2) * n_tiles * plan.size * plan.channels))
    at_once = ceil_div(plan.n_slots, ceil_div(plan.n_slots, at_once))
    tile_states = torch.empty(
        (at_once, n_tiles, plan.size, plan.channels), dtype=torch.float32 if exact else torch.bfloat16, device=device
    )
    together = chained and at_once == plan.n_slots
    if together:
        grad_h, passed = starts.new_empty((2, *starts.shape)).unbind(0)
        parts = state_parts(plan.size, GRADIENT_STATES)
        sweep = (tile_states, 0, tuning.tile, GRADIENT_SWEEP, parts)
        launch_tile_states(inputs, plan, table, starts, *sweep, grad_y, grad_h, passed)
        pass_states(inputs, plan, table, grad_final, grad_h, passed, True)
    elif chained:
        grad_h = launch_chain(inputs, plan, table, grad_final, grad_y=grad_y)
    else:
        grad_h = torch.empty_like(starts)
    for first_slot in range(0, plan.n_slots, at_once):
        if not together:
            sweep = (tile_states, first_slot, tuning.tile, SWEEP, state_parts(plan.size, SWEEP_STATES))
            launch_tile_states(inputs, plan, table, starts, *sweep)
        parts = state_parts(plan.size, PARTS)
        launch(
            selective_scan_bwd_kernel,
            (min(at_once, plan.n_slots - first_slot) * plan.groups * blocks,),
            x,
            inputs.dt,
            inputs.A_t,
            inputs.B,
            inputs.C,
            placeholder if inputs.D is None else inputs.D,
            placeholder if z is None else z,
            placeholder if inputs.dt_bias is None else inputs.dt_bias,
            grad_y,
            placeholder if inputs.flags is None else inputs.flags,
            placeholder if table is None else table,
            starts,
            placeholder if grad_final is None else grad_final,
            tile_states,
            grad_h,
            sums,
            partials,
            grad_x,
            grad_dt,
            placeholder if grad_z is None else grad_z,
            placeholder if grad_initial is None else grad_initial,
            *x.stride(),
            *inputs.dt.stride(),
            *inputs.A_t.stride(),
            *strides_or_zeros(z, 3),
            *grad_y.stride(),
            *strides_or_zeros(inputs.B, 4),
            *strides_or_zeros(inputs.C, 4),
            plan.length,
            plan.channels,
            plan.chunk,
            plan.n_chunks,
            first_slot,
            plan.batch,
            N=plan.size,
            GROUPS=plan.groups,
            BD=tuning.channels,
            K=tuning.tile,
            WHOLE=plan.whole,
            EVEN=plan.channels // plan.groups % tuning.channels == 0,
            NP=parts,
            MATRIX_SUMS=half and parts in (2, 4) and tuning.tile % 4 == 0 and tuning.channels % 32 == 0,
            HAS_D=inputs.D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=inputs.dt_bias is not None,
            SOFTPLUS=inputs.dt_softplus,
            CHAINED=chained,
            HAS_FINAL=grad_final is not None,
            HAS_INITIAL=grad_initial is not None,
            FLAGS=inputs.flags is not None,
            VARLEN=table is not None,
            PACKED=plan.packed and parts % 2 == 0,
            ROW_OF_Z=row_of_z,
            **tuning.options(),
        )

    grad_B, grad_C = _sum_projections(partials, inputs.B, inputs.C)
    totals = sums.sum(0)
    return (
        grad_x,
        grad_dt,
        totals[: plan.size].t(),
        grad_B,
        grad_C,
        None if inputs.D is None else totals[plan.size],
        grad_z,
        None if inputs.dt_bias is None else totals[plan.size + 1],
        grad_initial,
    )


def _sum_projections(partials: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of B and C from their partial sums (blocks, 2, B, L, G, N)."""
    dtype = B.dtype if B.dtype == C.dtype else torch.float32
    total = torch.empty((2, *B.shape), dtype=dtype, device=B.device)
    size = total.numel()
    block = 512
    launch(
        _sum_partials_kernel,
        (ceil_div(size, block),),
        partials,
        total,
        partials.shape[0],
        size,
        BLOCK=block,
        num_warps=4,
    )
    grad_B, grad_C = total.unbind(0)
    return grad_B, grad_C
