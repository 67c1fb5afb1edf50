"""Gradients of x, dt, A, D, z and dt_bias of the SSD scan: blocks and heads one by one.

Pairs of tokens are worked on transposed, as (s, q), so that the weights go from one product into the next in registers::

    dx[s] = dt[s] (Σ_q inside[q, s] (C[q]·B[s]) dy[q]  +  to_end[s] B[s] dhᵀ)  +  D dy[s]

A step counts as a factor of its input and in the exponents: `a[t]` stands in every pair s < t <= q, in the output of every
q >= t, in the input of every s < t and in `carry`.
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import (
    LOG2_E,
    block_decays,
    inside_decays,
    load_rows,
    marks_of_block,
    over_states,
    product,
    rounded,
    segment_of_program,
    silu_parts,
    softplus,
    ssd_kernel,
    state_offsets,
    steps_of_block,
)
from .triton_plan import Operands, Places, Plan, Tuning, ceil_div, strides_of
from .triton_projections import ProjectionGradients

__all__ = ["InputGradients", "launch_inputs"]

INPUTS, INPUTS_FP32 = Tuning(warps=4, stages=2), Tuning(warps=8, stages=1)
# two stages of a gate, or of fp32 states, would leave room for one program a multiprocessor
INPUTS_LARGE = Tuning(warps=4, stages=1)
# most states that products take at once in 16 bits; how many at a time where there are more, and always in fp32
WHOLE, PART, PART_FP32 = 128, 64, 32
# most heads that share the products of B and C, and how many programs there should be first
HEADS_OF_PROGRAM = 8
TARGET_PROGRAMS = 264


class InputGradients(NamedTuple):
    """Gradients of x, dt and z, and each block's share of those of A, dt_bias and D, one behind the other."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    sums: Tensor  # (blocks, H + H + (H or H P)) fp32


@ssd_kernel
def _ssd_bwd_kernel(
    x,
    dy,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    marks,
    table,
    entering,
    leaving,
    by_output,
    by_carry,
    dx,
    ddt,
    dz,
    sums,
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
    n_blocks,
    heads_of_program,
    part_of_tokens,
    part_of_blocks,
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
    NS: tl.constexpr,
    PART: tl.constexpr,
    HAS_D: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    ROW_OF_X: tl.constexpr,
    ROW_OF_DT: tl.constexpr,
):
    """Gradients of x, dt and z in a block of tokens, `heads_of_program` heads of a group.

    sums (blocks, H + H + (H or H P)): each block's share of the gradients of A, dt_bias and D. Tokens of dx and ddt are
    ROW_OF_X and ROW_OF_DT elements apart.
    """
    BLOCKS: tl.constexpr = (P + PB - 1) // PB
    PARTED: tl.constexpr = PART < NB
    WIDTH: tl.constexpr = H * (2 + (P if D_PER_CHANNEL else 1))
    HEADS: tl.constexpr = H // G
    parts = tl.cdiv(HEADS, heads_of_program)
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    group = (pid // parts) % G
    slot = pid // (parts * G)
    row, sequence, start, end, _index, _after, _first_block = segment_of_program(
        table, slot, length, Q, n_blocks, n_blocks, Q, VARLEN
    )
    if (sequence < 0) | (start >= end):
        return
    first_head = (group * HEADS + part * heads_of_program).to(tl.int32)
    last_head = tl.minimum(first_head + heads_of_program, ((group + 1) * HEADS).to(tl.int32))

    i = tl.arange(0, Q)
    t64 = start + tl.full((), 0, tl.int64)
    token = row * length + t64
    real, number, seq_before, seq_last = marks_of_block(marks + row * length, start, end, Q, MARKS)
    inside = start + i < end
    x += row * stride_x_b + t64 * stride_x_t
    dy += row * stride_dy_b + t64 * stride_dy_t
    z += row * stride_z_b + t64 * stride_z_t
    dt += row * stride_dt_b + t64 * stride_dt_t
    dx += token * ROW_OF_X
    dz += token * (H * P)
    ddt += token * ROW_OF_DT
    by_output += token * H
    by_carry += slot * H
    sums += slot * WIDTH
    B += row * stride_B_b + t64 * stride_B_t + group * stride_B_g
    C += row * stride_C_b + t64 * stride_C_t + group * stride_C_g
    if PARTED:
        similarity = tl.zeros((Q, Q), tl.float32)
        for n in range(0, N, PART):
            part_of_B = load_rows(B, stride_B_t, real, n, N, PART, Q).to(DTYPE)
            part_of_C = load_rows(C, stride_C_t, real, n, N, PART, Q).to(DTYPE)
            similarity += product(part_of_B, tl.trans(part_of_C), PRECISION)
    else:
        b_B = load_rows(B, stride_B_t, real, 0, N, NB, Q).to(DTYPE)
        b_C = load_rows(C, stride_C_t, real, 0, N, NB, Q).to(DTYPE)
        similarity = product(b_B, tl.trans(b_C), PRECISION)
    for head in range(first_head, last_head):
        wide_head = head + tl.full((), 0, tl.int64)
        rate = tl.load(A + head).to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(dt_bias + head).to(tl.float32)
        step, raw = steps_of_block(
            dt + wide_head * stride_dt_h, stride_dt_t, real, bias, low, high, Q, SOFTPLUS, CLAMP
        )
        cum, rest, from_start, to_end, carry = block_decays(
            step * (rate * LOG2_E), number, seq_before, seq_last, EXACT, MARKS
        )
        weights = similarity * inside_decays(cum, rest, number, Q, EXACT, MARKS, True)
        scores = weights.to(DTYPE)
        through_output = tl.zeros((Q,), tl.float32)
        through_carry = 0.0
        for states in tl.static_range(NB // NS):
            if not HAS_Z:
                through_output += tl.load(by_output + states * part_of_tokens + i * H + head, mask=inside, other=0.0)
            through_carry += tl.load(by_carry + states * part_of_blocks + head)
        dpairs = tl.zeros((Q, Q), tl.float32)
        through_input = tl.zeros((Q,), tl.float32)
        b_dD = 0.0
        for block in range(BLOCKS):
            p = block * PB + tl.arange(0, PB)
            columns = i[:, None] * (H * P) + p[None, :]
            columns_of_x = i[:, None] * ROW_OF_X + p[None, :]
            to_store = inside[:, None] & (p < P)[None, :]
            b_x = load_rows(x + wide_head * stride_x_h, stride_x_t, real, block * PB, P, PB, Q)
            b_dy = load_rows(dy + wide_head * stride_dy_h, stride_dy_t, real, block * PB, P, PB, Q)
            offsets, mask = state_offsets(slot, head, block * PB, 0, H, P, N, PB, NB)
            if HAS_D:
                if D_PER_CHANNEL:
                    skip = tl.load(D + head * P + p, mask=p < P, other=0.0).to(tl.float32)[None, :]
                else:
                    skip = tl.load(D + head).to(tl.float32)
            if HAS_Z:
                b_z = load_rows(z + wide_head * stride_z_h, stride_z_t, real, block * PB, P, PB, Q).to(tl.float32)
                silu, sigmoid = silu_parts(b_z)
                wide_dy = b_dy.to(tl.float32)
                if PARTED:
                    b_y = over_states(
                        C,
                        stride_C_t,
                        real,
                        entering,
                        slot,
                        head,
                        block * PB,
                        H,
                        P,
                        N,
                        PB,
                        PART,
                        Q,
                        PRECISION,
                        DTYPE,
                        REST,
                    )
                else:
                    state, rest_of_state = rounded(tl.load(entering + offsets, mask=mask, other=0.0), DTYPE)
                    b_y = product(b_C, tl.trans(state), PRECISION)
                    if REST == 2:
                        b_y += product(b_C, tl.trans(rest_of_state), PRECISION)
                b_y *= from_start[:, None]
                through_output += tl.sum(wide_dy * silu * b_y, 1)
                u = (b_x.to(tl.float32) * step[:, None]).to(DTYPE)
                b_y += product(tl.trans(scores), u, PRECISION)
                if HAS_D:
                    b_y += skip * b_x.to(tl.float32)
                b_dz = wide_dy * b_y * (sigmoid + silu * (1.0 - sigmoid))
                tl.store(dz + wide_head * P + columns, b_dz, mask=to_store)
                wide_dy *= silu
                b_dy, rest_of_dy = rounded(wide_dy, DTYPE)
                if REST:
                    dpairs += product(b_x.to(DTYPE), tl.trans(rest_of_dy), PRECISION)
            else:
                b_dy = b_dy.to(DTYPE)
            dpairs += product(b_x.to(DTYPE), tl.trans(b_dy), PRECISION)
            if PARTED:
                du = over_states(
                    B, stride_B_t, real, leaving, slot, head, block * PB, H, P, N, PB, PART, Q, PRECISION, DTYPE, REST
                )
            else:
                dstate, rest_of_dstate = rounded(tl.load(leaving + offsets, mask=mask, other=0.0), DTYPE)
                du = product(b_B, tl.trans(dstate), PRECISION)
                if REST == 2:
                    du += product(b_B, tl.trans(rest_of_dstate), PRECISION)
            du *= to_end[:, None]
            wide_x = b_x.to(tl.float32)
            through_input += tl.sum(wide_x * du, 1)
            du += product(scores, b_dy, PRECISION)
            b_dx = du * step[:, None]
            if HAS_D:
                if not HAS_Z:
                    wide_dy = b_dy.to(tl.float32)
                b_dx += skip * wide_dy
                if D_PER_CHANNEL:
                    share = tl.sum(wide_dy * wide_x, 0)
                    tl.store(sums + 2 * H + head * P + p, share, mask=p < P)
                else:
                    b_dD += tl.sum(tl.sum(wide_dy * wide_x, 1), 0)
            tl.store(dx + wide_head * P + columns_of_x, b_dx, mask=to_store)
        # the gradient of the weights times the weights: what a step does as a factor, and times the step, as an exponent
        dpairs *= weights
        dstep = tl.sum(dpairs, 1) + through_input
        through_input *= step
        # pairs s < t <= q as those with q >= t less those with s >= t; a pair s = q is in neither or in both
        dpairs *= step[:, None]
        if EXACT:
            # the two sides may cancel, and the gradient of A sums over all tokens: fp32 operands deserve it right
            wide_pairs = dpairs.to(tl.float64)
            ends = tl.sum(wide_pairs, 0) + through_output.to(tl.float64)
            starts = tl.sum(wide_pairs, 1) + through_input.to(tl.float64)
            wide_da = tl.sum(through_input.to(tl.float64), 0) + tl.cumsum(ends - starts, 0, reverse=True)
            da = wide_da.to(tl.float32)
        else:
            difference = tl.sum(dpairs, 0) - tl.sum(dpairs, 1) + through_output - through_input
            da = tl.sum(through_input, 0) + tl.cumsum(difference, 0, reverse=True)
        da += carry * through_carry
        dstep += da * rate
        dstep = tl.where(real, dstep, 0.0)
        dA = tl.sum(tl.where(real, da * step, 0.0), 0)
        if CLAMP:
            limited = raw
            if SOFTPLUS:
                limited = softplus(raw)
            kept = (limited >= tl.cast(low, tl.float32)) & (limited <= tl.cast(high, tl.float32))
            dstep = tl.where(kept, dstep, 0.0)
        if SOFTPLUS:
            dstep *= 1.0 / (1.0 + tl.exp2(-raw * LOG2_E))
        tl.store(ddt + i * ROW_OF_DT + head, dstep, mask=inside)
        tl.store(sums + head, dA)
        tl.store(sums + H + head, tl.sum(dstep, 0))
        if not D_PER_CHANNEL:
            tl.store(sums + 2 * H + head, b_dD)


def _states_at_a_time(dtype: torch.dtype, states: int) -> int:
    if dtype == torch.float32:
        return min(PART_FP32, states)
    return states if states <= WHOLE else PART


def launch_inputs(
    operands: Operands,
    plan: Plan,
    meta: dict[str, Any],
    table: Tensor | None,
    grad_y: Tensor,
    entering: Tensor,
    leaving: Tensor,
    projections: ProjectionGradients,
    places: Places | None = None,
) -> InputGradients:
    """The gradients from `entering` and `leaving` (blocks, H, P, N); `table` cuts packed sequences in blocks."""
    x, D, z = operands.x, operands.D, operands.z
    blocks = entering.shape[0]
    heads = plan.heads // plan.groups
    heads_of_program = max(1, min(heads, HEADS_OF_PROGRAM, blocks * plan.heads // TARGET_PROGRAMS))
    parts = ceil_div(heads, heads_of_program)
    shape = (plan.batch, plan.length, plan.heads, plan.head_dim)
    dx = x.new_empty(shape) if places is None else places.x
    dz = None if z is None else x.new_empty(shape, dtype=z.dtype)
    ddt = x.new_empty(shape[:3], dtype=operands.dt.dtype) if places is None else places.dt
    per_channel = D is not None and D.dim() == 2
    width = plan.heads * (2 + (plan.head_dim if per_channel else 1))
    # with packed sequences some slots stay unused
    fill = x.new_empty if table is None else x.new_zeros
    sums = fill((blocks, width), dtype=torch.float32)
    placeholder = operands.A
    tuning = INPUTS_LARGE if plan.rest == 2 or z is not None else INPUTS
    if plan.dtype == torch.float32:
        tuning = INPUTS_FP32
    launch(
        _ssd_bwd_kernel,
        (blocks * plan.groups * parts,),
        x,
        grad_y,
        operands.dt,
        operands.A,
        operands.B,
        operands.C,
        placeholder if D is None else D,
        x if z is None else z,
        placeholder if operands.dt_bias is None else operands.dt_bias,
        placeholder if operands.marks is None else operands.marks,
        # the tracer takes the table for written, as addresses come from it
        dx if table is None else table,
        entering,
        leaving,
        projections.by_output,
        projections.by_carry,
        dx,
        ddt,
        dx if dz is None else dz,
        sums,
        *strides_of(operands, grad_y),
        *operands.dt_limit or (0.0, 0.0),
        plan.length,
        plan.n_blocks,
        heads_of_program,
        projections.by_output.stride(0),
        projections.by_carry.stride(0),
        **meta,
        NS=meta["NB"] // projections.by_carry.shape[0],
        PART=_states_at_a_time(plan.dtype, meta["NB"]),
        HAS_D=D is not None,
        D_PER_CHANNEL=per_channel,
        ROW_OF_X=plan.heads * plan.head_dim if places is None else places.row,
        ROW_OF_DT=plan.heads if places is None else places.row_of_dt,
        **tuning.options(),
    )
    return InputGradients(x=dx, dt=ddt, z=dz, sums=sums)
