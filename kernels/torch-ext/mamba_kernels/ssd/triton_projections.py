"""Gradients of B and C of the SSD scan: blocks one by one, over the heads of a group.

With the names of `triton_backward`, summed over heads::

    dC[q] = from_start[q] dy[q] h  +  Σ_s inside[q, s] dt[s] (dy[q]·x[s]) B[s]
    dB[s] = dt[s] to_end[s] x[s] dh  +  Σ_q inside[q, s] dt[s] (dy[q]·x[s]) C[q]

Factors of a token are put on afterwards, so that products see the operands as they are.
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
    load_gradient,
    load_rows,
    marks_of_block,
    product,
    rounded,
    segment_of_program,
    ssd_kernel,
    steps_of_block,
)
from .triton_plan import Operands, Places, Plan, Tuning, ceil_div, has_room, strides_of

__all__ = ["ProjectionGradients", "launch_projections"]

PROJECTIONS, PROJECTIONS_FP32 = Tuning(warps=8, stages=3), Tuning(warps=8, stages=1)
# with fp32 states three stages do not fit, and on GPUs of less shared memory two do not
PROJECTIONS_LARGE, PROJECTIONS_SMALL = Tuning(warps=8, stages=2), Tuning(warps=8, stages=1)
# programs that fill a large GPU; heads of a group are spread over several programs to get there
TARGET_PROGRAMS = 264
# most states of a program
LARGEST_PART, LARGEST_PART_FP32 = 128, 32


class ProjectionGradients(NamedTuple):
    """Parts of dB and dC, and what the kernel found on its way for the gradients of the steps."""

    parts: Tensor  # (parts, 2, B, L, G, N), in the dtype of B if there is one part, else in fp32
    by_output: Tensor  # (parts of N, B, L, H), unused with a gate
    by_carry: Tensor  # (parts of N, blocks, H)


@ssd_kernel
def _ssd_bwd_projections_kernel(
    x,
    dy,
    dt,
    A,
    B,
    C,
    z,
    dt_bias,
    marks,
    table,
    entering,
    leaving,
    gradients,
    by_output,
    by_carry,
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
    part_of_projection,
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
    ROW: tl.constexpr,
):
    """Gradients of B and C in a block of tokens, NS states of them, from `heads_of_program` heads of a group.

    gradients (parts, 2, B, L, G, N): dB and dC, a part from each program of a group; tokens are ROW elements apart. For the steps it leaves by_carry (N / NS, blocks, H), the
    gradient in the exponent of carry, and by_output (N / NS, B, L, H), that in the exponent of from_start. With a gate the
    next kernel finds the latter itself, as it knows the output and its gradient in fp32.
    """
    BLOCKS: tl.constexpr = (P + PB - 1) // PB
    STATES: tl.constexpr = NB // NS
    HEADS: tl.constexpr = H // G
    parts = tl.cdiv(HEADS, heads_of_program)
    pid = tl.program_id(0).to(tl.int64)
    states = pid % STATES
    part = (pid // STATES) % parts
    group = (pid // (STATES * parts)) % G
    slot = pid // (STATES * parts * G)
    row, sequence, start, end, _index, _after, _first_block = segment_of_program(
        table, slot, length, Q, n_blocks, n_blocks, Q, VARLEN
    )
    if (sequence < 0) | (start >= end):
        return
    first_head = (group * HEADS + part * heads_of_program).to(tl.int32)
    last_head = tl.minimum(first_head + heads_of_program, ((group + 1) * HEADS).to(tl.int32))
    n0 = (states * NS).to(tl.int32)

    i = tl.arange(0, Q)
    n = n0 + tl.arange(0, NS)
    t64 = start + tl.full((), 0, tl.int64)
    token = row * length + t64
    real, number, seq_before, seq_last = marks_of_block(marks + row * length, start, end, Q, MARKS)
    inside = start + i < end
    x += row * stride_x_b + t64 * stride_x_t
    dy += row * stride_dy_b + t64 * stride_dy_t
    z += row * stride_z_b + t64 * stride_z_t
    dt += row * stride_dt_b + t64 * stride_dt_t
    B += row * stride_B_b + t64 * stride_B_t + group * stride_B_g
    C += row * stride_C_b + t64 * stride_C_t + group * stride_C_g
    by_output += states * part_of_tokens + token * H
    by_carry += states * part_of_blocks + slot * H
    b_C = load_rows(C, stride_C_t, real, n0, N, NS, Q).to(DTYPE)

    b_dB = tl.zeros((Q, NS), tl.float32)
    b_dC = tl.zeros((Q, NS), tl.float32)
    dsimilarity = tl.zeros((Q, Q), tl.float32)
    for head in range(first_head, last_head):
        wide_head = head + tl.full((), 0, tl.int64)
        rate = tl.load(A + head).to(tl.float32) * LOG2_E
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(dt_bias + head).to(tl.float32)
        step, _raw = steps_of_block(
            dt + wide_head * stride_dt_h, stride_dt_t, real, bias, low, high, Q, SOFTPLUS, CLAMP
        )
        cum, rest, from_start, to_end, _carry = block_decays(step * rate, number, seq_before, seq_last, EXACT, MARKS)
        dpairs = tl.zeros((Q, Q), tl.float32)
        through_output = tl.zeros((Q,), tl.float32)
        through_carry = 0.0
        for block in range(BLOCKS):
            b_x = load_rows(x + wide_head * stride_x_h, stride_x_t, real, block * PB, P, PB, Q).to(DTYPE)
            wide_dy = load_gradient(
                dy + wide_head * stride_dy_h,
                z + wide_head * stride_z_h,
                stride_dy_t,
                stride_z_t,
                real,
                block * PB,
                P,
                PB,
                Q,
                HAS_Z,
            )
            b_dy, rest_of_dy = rounded(wide_dy, DTYPE)
            p = block * PB + tl.arange(0, PB)
            offsets = (slot * H + head) * (P * N) + p[:, None] * N + n[None, :]
            mask = (p[:, None] < P) & (n[None, :] < N)
            state = tl.load(entering + offsets, mask=mask, other=0.0)
            dstate = tl.load(leaving + offsets, mask=mask, other=0.0)
            dpairs += product(b_x, tl.trans(b_dy), PRECISION)
            if REST == 2 and HAS_Z:
                # a second product into `dpairs` as it stands reads shared memory that is gone (triton 3.6, sm_90)
                dpairs += tl.trans(product(rest_of_dy, tl.trans(b_x), PRECISION))
            through_carry += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
            b_state, rest_of_state = rounded(state, DTYPE)
            through_state = product(b_dy, b_state, PRECISION)
            if REST == 2:
                through_state += product(b_dy, rest_of_state, PRECISION)
                if HAS_Z:
                    through_state += product(rest_of_dy, b_state, PRECISION)
            through_state *= from_start[:, None]
            if not HAS_Z:
                through_output += tl.sum(through_state * b_C.to(tl.float32), 1)
            b_dC += through_state
            b_dstate, rest_of_dstate = rounded(dstate, DTYPE)
            through_dstate = product(b_x, b_dstate, PRECISION)
            if REST == 2:
                through_dstate += product(b_x, rest_of_dstate, PRECISION)
            b_dB += through_dstate * (step * to_end)[:, None]
        dsimilarity += dpairs * inside_decays(cum, rest, number, Q, EXACT, MARKS, True) * step[:, None]
        if not HAS_Z:
            tl.store(by_output + i * H + head, through_output, mask=inside)
        tl.store(by_carry + head, through_carry)

    b_B = load_rows(B, stride_B_t, real, n0, N, NS, Q).to(DTYPE)
    dsim, rest_of_dsim = rounded(dsimilarity, DTYPE)
    b_dB += product(dsim, b_C, PRECISION)
    b_dC += product(tl.trans(dsim), b_B, PRECISION)
    if REST == 2:
        b_dB += product(rest_of_dsim, b_C, PRECISION)
        b_dC += product(tl.trans(rest_of_dsim), b_B, PRECISION)
    columns = 2 * part * part_of_projection + token * ROW + group * N + i[:, None] * ROW + n[None, :]
    to_store = inside[:, None] & (n[None, :] < N)
    tl.store(gradients + columns, b_dB, mask=to_store)
    tl.store(gradients + part_of_projection + columns, b_dC, mask=to_store)


def launch_projections(
    operands: Operands,
    plan: Plan,
    meta: dict[str, Any],
    table: Tensor | None,
    grad_y: Tensor,
    entering: Tensor,
    leaving: Tensor,
    places: Places | None = None,
) -> ProjectionGradients:
    """The gradients from `entering` and `leaving` (blocks, H, P, N); `table` cuts packed sequences in blocks."""
    x, z = operands.x, operands.z
    blocks = entering.shape[0]
    heads = plan.heads // plan.groups
    exact = plan.dtype == torch.float32
    states = min(meta["NB"], LARGEST_PART_FP32 if exact else LARGEST_PART)
    splits = meta["NB"] // states
    heads_of_program = ceil_div(heads, min(heads, max(1, TARGET_PROGRAMS // (blocks * plan.groups * splits))))
    parts = ceil_div(heads, heads_of_program)
    tokens = (plan.batch, plan.length)
    shape = (parts, 2, *tokens, plan.groups, plan.size)
    if places is None or parts > 1:
        dtype = operands.B.dtype if parts == 1 else torch.float32
        gradients = torch.empty(shape, dtype=dtype, device=x.device)
    else:
        gradients = places.projections()[None]
    by_output = torch.empty(
        (splits, *tokens, plan.heads) if z is None else (splits, 0), dtype=torch.float32, device=x.device
    )
    by_carry = torch.empty((splits, blocks, plan.heads), dtype=torch.float32, device=x.device)
    placeholder = operands.A
    if exact:
        tuning = PROJECTIONS_FP32
    elif has_room(x.device.type, x.device.index):
        tuning = PROJECTIONS_LARGE if plan.rest == 2 else PROJECTIONS
    else:
        tuning = PROJECTIONS_SMALL if plan.rest == 2 else PROJECTIONS_LARGE
    launch(
        _ssd_bwd_projections_kernel,
        (blocks * plan.groups * parts * splits,),
        x,
        grad_y,
        operands.dt,
        operands.A,
        operands.B,
        operands.C,
        x if z is None else z,
        placeholder if operands.dt_bias is None else operands.dt_bias,
        placeholder if operands.marks is None else operands.marks,
        # the tracer takes the table for written, as addresses come from it
        gradients if table is None else table,
        entering,
        leaving,
        gradients,
        by_output,
        by_carry,
        *strides_of(operands, grad_y),
        *operands.dt_limit or (0.0, 0.0),
        plan.length,
        plan.n_blocks,
        heads_of_program,
        gradients.stride(1),
        by_output.stride(0),
        by_carry.stride(0),
        **meta,
        NS=states,
        ROW=plan.groups * plan.size if places is None or parts > 1 else places.row,
        **tuning.options(),
    )
    return ProjectionGradients(gradients, by_output, by_carry)
