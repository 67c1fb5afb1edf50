"""Forward of the SSD scan in Triton: one kernel walks through the blocks of a segment with the state in registers.

With the names of `triton_common`, in a block and for a head::

    y[q] = Σ_s inside[q, s] (C[q]·B[s]) dt[s] x[s]  +  from_start[q] state C[q]  +  D x[q],    times silu(z[q])
    state <- carry state + Σ_s dt[s] to_end[s] x[s] B[s]ᵀ

Where rows and heads do not fill the device, sequences are cut into segments: a first launch finds what each of them adds to the
state, and every program of the second chains what lies before its own.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import (
    LOG2_E,
    block_decays,
    chain_states,
    inside_decays,
    load_rows,
    marks_of_block,
    product,
    segment_of_program,
    silu_parts,
    ssd_kernel,
    state_offsets,
    steps_of_block,
)
from .triton_plan import Operands, Plan, Tuning, segment_table
from .triton_states import launch_states, new_locals

__all__ = ["ssd_forward"]

FORWARD, FORWARD_FP32 = Tuning(warps=4, stages=2), Tuning(warps=4, stages=1)
# Q of this kernel alone: fp32 products of more tokens spill kilobytes of registers, and take seconds to compile
BLOCK_FP32 = 16
# states at a time in fp32 products
PART_FP32 = 32


@ssd_kernel
def _ssd_fwd_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    marks,
    table,
    initial,
    added,
    decay,
    starts,
    final,
    y,
    stride_x_b,
    stride_x_t,
    stride_x_h,
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
    HAS_D: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SPLIT: tl.constexpr,
    SAVE: tl.constexpr,
    FINAL: tl.constexpr,
    NS: tl.constexpr,
):
    """One program walks PB channels of a head through a segment, with their states in parts of NS."""
    BLOCKS: tl.constexpr = (P + PB - 1) // PB
    PARTS: tl.constexpr = NB // NS
    pid = tl.program_id(0).to(tl.int64)
    head = (pid % H).to(tl.int32)
    first = ((pid // H) % BLOCKS).to(tl.int32) * PB
    slot = pid // (H * BLOCKS)
    row, sequence, start, end, index, after, _first_block = segment_of_program(
        table, slot, length, segment, n_segments, n_blocks, Q, VARLEN
    )
    if sequence < 0:
        return

    wide_head = head.to(tl.int64)
    group = wide_head // (H // G)
    x += row * stride_x_b + wide_head * stride_x_h
    z += row * stride_z_b + wide_head * stride_z_h
    dt += row * stride_dt_b + wide_head * stride_dt_h
    B += row * stride_B_b + group * stride_B_g
    C += row * stride_C_b + group * stride_C_g
    y += row * length * (H * P) + wide_head * P
    marks += row * length
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + head).to(tl.float32)
    p = first + tl.arange(0, PB)
    if HAS_D:
        if D_PER_CHANNEL:
            skip = tl.load(D + head * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
        else:
            skip = tl.load(D + head).to(tl.float32)

    states = ()
    for part in tl.static_range(PARTS):
        state = tl.zeros((PB, NS), tl.float32)
        if HAS_INITIAL:
            outer, mask = state_offsets(sequence, head, first, part * NS, H, P, N, PB, NS)
            state += tl.load(initial + outer, mask=mask, other=0.0).to(tl.float32)
        if SPLIT:
            state = chain_states(state, added, decay, slot, index, 1, head, first, part * NS, H, P, N, PB, NS)
            if SAVE:
                own, mask = state_offsets(slot, head, first, part * NS, H, P, N, PB, NS)
                tl.store(starts + own, state, mask=mask)
        states = states + (state,)

    i = tl.arange(0, Q)
    for t in range(start, end, Q):
        real, number, seq_before, seq_last = marks_of_block(marks, t, end, Q, MARKS)
        t64 = t + tl.full((), 0, tl.int64)
        step, _raw = steps_of_block(dt + t64 * stride_dt_t, stride_dt_t, real, bias, low, high, Q, SOFTPLUS, CLAMP)
        cum, rest, from_start, to_end, carry = block_decays(step * rate, number, seq_before, seq_last, EXACT, MARKS)
        b_x = load_rows(x + t64 * stride_x_t, stride_x_t, real, first, P, PB, Q)
        wide_x = b_x.to(tl.float32)
        inputs = tl.trans((wide_x * (step * to_end)[:, None]).to(DTYPE))
        scores = tl.zeros((Q, Q), tl.float32)
        b_y = tl.zeros((Q, PB), tl.float32)
        after_block = ()
        for part in tl.static_range(PARTS):
            b_C = load_rows(C + t64 * stride_C_t, stride_C_t, real, part * NS, N, NS, Q).to(DTYPE)
            b_B = load_rows(B + t64 * stride_B_t, stride_B_t, real, part * NS, N, NS, Q).to(DTYPE)
            scores += product(b_C, tl.trans(b_B), PRECISION)
            b_y += product(b_C, tl.trans(states[part].to(DTYPE)), PRECISION)
            after_block = after_block + (carry * states[part] + product(inputs, b_B, PRECISION),)
        states = after_block
        scores *= inside_decays(cum, rest, number, Q, EXACT, MARKS, False) * step[None, :]
        b_y *= from_start[:, None]
        b_y += product(scores.to(DTYPE), b_x.to(DTYPE), PRECISION)
        if HAS_D:
            b_y += skip * wide_x
        if HAS_Z:
            gate = load_rows(z + t64 * stride_z_t, stride_z_t, real, first, P, PB, Q).to(tl.float32)
            silu, _sigmoid = silu_parts(gate)
            b_y *= silu
        inside = (t + i < end)[:, None] & (p < P)[None, :]
        tl.store(y + t64 * (H * P) + i[:, None] * (H * P) + p[None, :], b_y, mask=inside)

    if FINAL:
        for part in tl.static_range(PARTS):
            outer, mask = state_offsets(sequence, head, first, part * NS, H, P, N, PB, NS)
            tl.store(final + outer, states[part], mask=(mask & (after == 0)) != 0)


def ssd_forward(
    operands: Operands, plan: Plan, save: bool, return_final_states: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns y (B, L, H, P); the final states (S, H, P, N) or None; with `save`, where sequences are split, the states that
    enter the segments (slots, H, P, N)."""
    x = operands.x
    table = segment_table(operands, plan, plan.segment)
    meta = plan.meta(operands)
    local = starts = final = None
    if plan.split:
        local = new_locals(plan, x.device)
        launch_states(operands, plan, meta, table, local, keep_local=1, directions=(0, 1))
        if save:
            starts = torch.empty_like(local.added)
    y = torch.empty((plan.batch, plan.length, plan.heads, plan.head_dim), dtype=x.dtype, device=x.device)
    if return_final_states:
        final = x.new_empty((plan.n_states, plan.heads, plan.head_dim, plan.size), dtype=torch.float32)
    placeholder = operands.A
    added, decay = (placeholder, placeholder) if local is None else local
    z = operands.z
    tuning = FORWARD
    if plan.dtype == torch.float32:
        meta = {**meta, "Q": min(plan.block, BLOCK_FP32)}
        tuning = FORWARD_FP32
    launch(
        _ssd_fwd_kernel,
        (plan.n_slots * plan.channel_blocks * plan.heads,),
        x,
        operands.dt,
        operands.A,
        operands.B,
        operands.C,
        placeholder if operands.D is None else operands.D,
        x if z is None else z,
        placeholder if operands.dt_bias is None else operands.dt_bias,
        placeholder if operands.marks is None else operands.marks,
        # the tracer takes the table for written, as addresses come from it
        y if table is None else table,
        placeholder if operands.initial_states is None else operands.initial_states,
        added,
        decay,
        placeholder if starts is None else starts,
        placeholder if final is None else final,
        y,
        *x.stride()[:3],
        *(0, 0, 0) if z is None else z.stride()[:3],
        *operands.dt.stride(),
        *operands.B.stride()[:3],
        *operands.C.stride()[:3],
        *operands.dt_limit or (0.0, 0.0),
        plan.length,
        plan.segment,
        plan.n_segments,
        plan.n_blocks,
        **meta,
        HAS_D=operands.D is not None,
        D_PER_CHANNEL=operands.D is not None and operands.D.dim() == 2,
        HAS_INITIAL=operands.initial_states is not None,
        SPLIT=plan.split,
        SAVE=starts is not None,
        FINAL=return_final_states,
        NS=min(meta["NB"], PART_FP32) if plan.dtype == torch.float32 else meta["NB"],
        **tuning.options(),
    )
    return y, final, starts
