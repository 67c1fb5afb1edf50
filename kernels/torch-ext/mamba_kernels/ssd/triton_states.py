"""The recurrence between blocks, and its gradient, as one kernel.

Both walk through the blocks of a segment and add a product of two matrices a block to a decaying state::

    forwards    state <- carry state + Σ_s dt[s] to_end[s] x[s] B[s]ᵀ       the state that enters the next block
    backwards   state <- carry state + Σ_q from_start[q] dy[q] C[q]ᵀ       the gradient of the state that leaves the one before
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import (
    LOG2_E,
    block_decays,
    chain_states,
    load_rows,
    marks_of_block,
    product,
    rounded,
    segment_of_program,
    silu_parts,
    ssd_kernel,
    state_offsets,
    steps_of_block,
)
from .triton_plan import Operands, Plan, Tuning

__all__ = ["Locals", "launch_states", "new_locals"]

STATES = Tuning(warps=4, stages=2)


class Locals(NamedTuple):
    """What segments do to the state: `added` (slots, H, P, N) fp32, and `decay` (slots, H) fp32 of what enters."""

    added: Tensor
    decay: Tensor


def new_locals(plan: Plan, device: torch.device) -> Locals:
    """Room for all segments of one direction."""
    added = torch.empty((plan.n_slots, plan.heads, plan.head_dim, plan.size), dtype=torch.float32, device=device)
    return Locals(added, torch.empty((plan.n_slots, plan.heads), dtype=torch.float32, device=device))


@ssd_kernel
def _ssd_states_kernel(
    x,
    dy,
    z,
    dt,
    A,
    B,
    C,
    dt_bias,
    marks,
    table,
    starts,
    grad_final,
    added,
    decay,
    entering,
    leaving,
    grad_initial,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_dy_b,
    stride_dy_t,
    stride_dy_h,
    stride_z_b,
    stride_z_t,
    stride_z_h,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    low,
    high,
    length,
    segment,
    n_segments,
    n_blocks,
    n_slots,
    first_direction,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    NB: tl.constexpr,
    PB: tl.constexpr,
    Q: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT: tl.constexpr,
    REST: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program walks PB channels of a head through a segment, forwards or backwards.

    LOCAL: 1 if forward programs, 2 if backward ones start from zero and keep `added` and `decay` instead of the states of
    the blocks; 0 if all keep those, in `entering` or `leaving` (blocks, H, P, N).
    """
    BLOCKS: tl.constexpr = (P + PB - 1) // PB
    pid = tl.program_id(0).to(tl.int64)
    head = (pid % H).to(tl.int32)
    first = ((pid // H) % BLOCKS).to(tl.int32) * PB
    slot = pid // (H * BLOCKS)
    reverse = (slot // n_slots + first_direction) > 0
    slot = slot % n_slots
    row, sequence, start, end, index, after, first_block = segment_of_program(
        table, slot, length, segment, n_segments, n_blocks, Q, VARLEN
    )
    # nobody asks for what leaves a sequence
    backwards = tl.where(reverse, 2, 1)
    is_local = backwards == LOCAL
    beyond = tl.where(reverse, index, after)
    if (sequence < 0) | (is_local & (beyond == 0)):
        return

    wide_head = head.to(tl.int64)
    group = wide_head // (H // G)
    values = tl.where(
        reverse, dy + row * stride_dy_b + wide_head * stride_dy_h, x + row * stride_x_b + wide_head * stride_x_h
    )
    vectors = tl.where(reverse, C + row * stride_C_b + group * stride_C_g, B + row * stride_B_b + group * stride_B_g)
    stride_value = tl.where(reverse, stride_dy_t, stride_x_t)
    stride_vector = tl.where(reverse, stride_C_t, stride_B_t)
    z += row * stride_z_b + wide_head * stride_z_h
    dt += row * stride_dt_b + wide_head * stride_dt_h
    marks += row * length
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + head).to(tl.float32)

    state = tl.zeros((PB, NB), tl.float32)
    own, mask = state_offsets(slot, head, first, 0, H, P, N, PB, NB)
    outer, _mask = state_offsets(sequence, head, first, 0, H, P, N, PB, NB)
    if HAS_STARTS:
        # of each segment if there are several a sequence, else of the sequences
        begin = own if SPLIT else outer
        state = tl.load(starts + begin, mask=(mask & (reverse == 0) & (is_local == 0)) != 0, other=0.0).to(tl.float32)
    if LOCAL != 2:
        if HAS_FINAL:
            state += tl.load(grad_final + outer, mask=(mask & reverse) != 0, other=0.0).to(tl.float32)
        if SPLIT:
            count = tl.where(reverse & (is_local == 0), after, 0)
            state = chain_states(state, added, decay, slot, count, -1, head, first, 0, H, P, N, PB, NB)

    kept = tl.full((), 1.0, tl.float32)
    blocks = tl.cdiv(end - start, Q).to(tl.int32)
    keep = tl.where(reverse, leaving, entering)
    for i in range(0, blocks):
        number_of_block = tl.where(reverse, blocks - 1 - i, i)
        t = start + number_of_block * Q
        real, number, seq_before, seq_last = marks_of_block(marks, t, end, Q, MARKS)
        t64 = t.to(tl.int64)
        step, _raw = steps_of_block(dt + t64 * stride_dt_t, stride_dt_t, real, bias, low, high, Q, SOFTPLUS, CLAMP)
        _cum, _rest, from_start, to_end, carry = block_decays(step * rate, number, seq_before, seq_last, EXACT, MARKS)
        value = load_rows(values + t64 * stride_value, stride_value, real, first, P, PB, Q).to(tl.float32)
        if HAS_Z:
            gate = load_rows(z + t64 * stride_z_t, stride_z_t, (real & reverse) != 0, first, P, PB, Q)
            silu, _sigmoid = silu_parts(gate.to(tl.float32))
            value = value * tl.where(reverse, silu, 1.0)
        weight = tl.where(reverse, from_start, step * to_end)
        vector = load_rows(vectors + t64 * stride_vector, stride_vector, real, 0, N, NB, Q).to(DTYPE)
        if not LOCAL or LOCAL == 2:
            slot_of_block, _same = state_offsets(first_block + number_of_block, head, first, 0, H, P, N, PB, NB)
            tl.store(keep + slot_of_block, state, mask=(mask & (is_local == 0)) != 0)
        value *= weight[:, None]
        weighted, rest_of_it = rounded(value, DTYPE)
        state = carry * state + product(tl.trans(weighted), vector, PRECISION)
        if REST == 2:
            state += product(tl.trans(rest_of_it), vector, PRECISION)
        kept = kept * carry

    if LOCAL:
        tl.store(added + own, state, mask=(mask & is_local) != 0)
        tl.store(decay + slot * H + head, kept, mask=is_local)
    if HAS_INITIAL and LOCAL == 0:
        tl.store(grad_initial + outer, state, mask=(mask & reverse & (index == 0)) != 0)


def launch_states(
    operands: Operands,
    plan: Plan,
    meta: dict[str, Any],
    table: Tensor | None,
    local: Locals | None,
    keep_local: int,
    grad_y: Tensor | None = None,
    starts: Tensor | None = None,
    grad_final: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    grad_initial: Tensor | None = None,
    directions: tuple[int, int] = (0, 2),
) -> None:
    """Run the kernel for `directions`, a half-open range of 0 (forwards) and 1 (backwards)."""
    x = operands.x
    placeholder = operands.A
    gradient = x if grad_y is None else grad_y
    added, decay = (placeholder, placeholder) if local is None else local
    entering, leaving = (placeholder, placeholder) if kept is None else kept
    unused = added if kept is None else entering
    count = directions[1] - directions[0]
    grid = (count * plan.n_slots * plan.channel_blocks * plan.heads,)
    launch(
        _ssd_states_kernel,
        grid,
        x,
        gradient,
        x if operands.z is None else operands.z,
        operands.dt,
        operands.A,
        operands.B,
        operands.C,
        placeholder if operands.dt_bias is None else operands.dt_bias,
        placeholder if operands.marks is None else operands.marks,
        # the tracer takes the table for written, as addresses come from it
        unused if table is None else table,
        placeholder if starts is None else starts,
        placeholder if grad_final is None else grad_final,
        added,
        decay,
        entering,
        leaving,
        placeholder if grad_initial is None else grad_initial,
        *x.stride()[:3],
        *gradient.stride()[:3],
        *(0, 0, 0) if operands.z is None else operands.z.stride()[:3],
        *operands.dt.stride(),
        *operands.B.stride()[:3],
        *operands.C.stride()[:3],
        *operands.dt_limit or (0.0, 0.0),
        plan.length,
        plan.segment,
        plan.n_segments,
        plan.n_blocks,
        plan.n_slots,
        directions[0],
        **meta,
        HAS_STARTS=starts is not None,
        HAS_FINAL=grad_final is not None,
        HAS_INITIAL=grad_initial is not None,
        LOCAL=keep_local,
        SPLIT=plan.split,
        **STATES.options(),
    )
