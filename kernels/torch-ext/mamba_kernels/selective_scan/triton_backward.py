"""Backward of the selective scan in Triton: gradients of every operand, the same bits every time.

With g_t = dL/dy_t silu(z_t) and dh_t the whole gradient of the state h_t (see `triton_forward` for the recurrence)::

    dh_t   = C_t g_t + a_{t+1} dh_{t+1}              a_t = exp(delta_t A)
    dB_t   = sum over channels of dh_t delta_t x_t   dC_t = sum over channels of h_t g_t
    ddelta = A . (dh_t a_t h_{t-1}) + x_t (B_t . dh_t)
    dA     = sum over t of dh_t a_t h_{t-1} delta_t  dx_t = delta_t (B_t . dh_t) + D g_t

The forward kept the state before each chunk. `triton_sweep` walks forward once more and writes down the state before each tile
of K tokens; then a program takes BD channels of one chunk and goes backward tile by tile, with the tile's states in registers.
Sums over channels and over chunks are partial sums in memory that a second kernel adds up in a fixed order. Symbols:
`triton_common`.

Sums over the channels of a program are a third of all work if they are made by shuffles, so for 16-bit operands they are matrix
products. A thread has 8 tokens of one channel for each of dB and dC: 16 numbers, to be summed over 32 threads. As the second
operand of a product of tensor cores, thread 4 g + t has rows t and column g, so that a product with a matrix of zeros and ones
(`pick`) sums over t and leaves 16 x 8 numbers; a second one (`place`) sums over g and puts each state in its column. Nothing
moves between threads for that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_chain import launch_chain, pass_states
from .triton_common import (
    LOG2_E,
    Plan,
    ScanInputs,
    Tuning,
    ceil_div,
    channels_of,
    chunk_bounds,
    combine,
    decay_of,
    load_projection,
    load_tile,
    row_of,
    scan_kernel,
    silu_parts,
    state_parts,
    steps_of_tile,
    strides_or_zeros,
    tokens_of_tile,
    wide,
)
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


@triton.jit
def _states(a1, h1, kept1, a2, h2, kept2):
    """The recurrence of the state, and what of each state comes from before its token."""
    return a1 * a2, a2 * h1 + h2, a2 * h1 + kept2


@triton.jit
def _later_decays(decay, k, K: tl.constexpr):
    """For the tokens of a tile, last one first: the decay of the token after each, 1 for the last."""
    found = tl.full(decay.shape, 1.0, tl.float32)
    for i in tl.static_range(1, K):
        found = tl.where(k == i, row_of(decay, k, K - i)[None, :], found)
    return found


@triton.jit
def _sums_of_fours(for_B, for_C, pick, K: tl.constexpr, BD: tl.constexpr):
    """(2 K, 8) sums of two tiles (K, BD) over 4 neighbouring channels and over channels that are 32 apart; B's tokens first."""
    pair = tl.join(for_B, for_C).reshape(K // 4, 2, 2, BD // 32, 8, 4, 2)
    pair = pair.permute(3, 6, 0, 5, 1, 2, 4).reshape(2 * K * BD // 8, 8)
    return tl.dot(pick, pair.to(pick.dtype), input_precision="tf32")


@triton.jit
def _sums_of_eights(parts, place, K: tl.constexpr, NP: tl.constexpr):
    """(2 K, 8): the sums over the columns of NP results of `_sums_of_fours`, one in each column."""
    if NP == 2:
        both = tl.join(parts[0], parts[1]).permute(0, 2, 1)
    else:
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])).permute(0, 2, 3, 1)
    return tl.dot(both.reshape(2 * K, 8 * NP), place, input_precision="tf32")


@scan_kernel
def _selective_scan_bwd_kernel(
    x,
    dt,
    A_t,
    B,
    C,
    D,
    z,
    dt_bias,
    grad_y,
    flags,
    table,
    starts,
    grad_final,
    tile_states,
    grad_h,
    sums,
    grad_projections,
    grad_x,
    grad_dt,
    grad_z,
    grad_initial,
    stride_x_b,
    stride_x_t: tl.constexpr,
    stride_x_d,
    stride_dt_b,
    stride_dt_t: tl.constexpr,
    stride_dt_d,
    stride_A_n,
    stride_A_d,
    stride_z_b,
    stride_z_t: tl.constexpr,
    stride_z_d,
    stride_y_b,
    stride_y_t: tl.constexpr,
    stride_y_d,
    stride_B_b,
    stride_B_t: tl.constexpr,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_t: tl.constexpr,
    stride_C_g,
    stride_C_n,
    length,
    channels,
    chunk,
    n_chunks,
    first_slot,
    batch,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    NP: tl.constexpr,
    MATRIX_SUMS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHAINED: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    FLAGS: tl.constexpr,
    VARLEN: tl.constexpr,
    PACKED: tl.constexpr,
    ROW_OF_Z: tl.constexpr,
):
    """Gradients of a chunk, BD channels. With ROW_OF_Z tokens of `grad_z` are that many elements apart, else D."""
    blocks = tl.cdiv(channels // GROUPS, BD)
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % (blocks * GROUPS)).to(tl.int32)
    local_slot = pid // (blocks * GROUPS)
    slot = local_slot + first_slot
    row, state, start, end, is_first, _is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)

    group, d, mask = channels_of(block, channels, GROUPS, BD, EVEN)
    # rows of `sums` (slots, N + 2, D): dA, then the gradients of D and of dt_bias
    sums += slot * (N + 2) * channels + d
    grad_h += slot * N * channels + d
    zeros = tl.zeros((BD,), tl.float32)
    for n in range(0, N):
        tl.store(sums + n * channels, zeros, mask=mask)
        if not CHAINED:
            carried = zeros
            if HAS_FINAL:
                carried = tl.load(grad_final + (state * channels + d) * N + n, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_h + n * channels, carried, mask=mask)
    if state < 0:
        tl.store(sums + N * channels, zeros, mask=mask)
        tl.store(sums + (N + 1) * channels, zeros, mask=mask)
        return

    bias = zeros
    skip = zeros
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask, other=0.0).to(tl.float32)
    x += row * stride_x_b + d * stride_x_d
    dt += row * stride_dt_b + d * stride_dt_d
    z += row * stride_z_b + d * stride_z_d
    grad_y += row * stride_y_b + d * stride_y_d
    B += row * stride_B_b + group.to(tl.int64) * stride_B_g
    C += row * stride_C_b + group.to(tl.int64) * stride_C_g
    flags += row * length
    tile_states += local_slot * tl.cdiv(chunk, K) * N * channels
    outputs = row * length * channels + d[None, :]
    # `grad_projections` (blocks, 2, B, L, G, N): partial sums of dB and dC
    projections = wide(batch) * length * GROUPS * N
    grad_B = grad_projections + (block % blocks).to(tl.int64) * 2 * projections + (row * length * GROUPS + group) * N
    grad_C = grad_B + projections
    n_tiles = tl.cdiv(end - start, K)

    grad_skip = zeros
    grad_bias = zeros
    k = tl.arange(0, K)[:, None]
    token = tl.arange(0, K)
    if MATRIX_SUMS:
        # rounding to bf16 is far below the rounding of bf16 operands
        SUM_TYPE: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 else tl.float32
        pair_row = tl.arange(0, 2 * K)[:, None]
        lane = tl.arange(0, 2 * K * BD // 8)[None, :]
        pick = (pair_row == (lane // 16) % (K // 2) * 4 + lane % 4).to(SUM_TYPE)
        column = tl.arange(0, 8)[None, :]
        place = (column == tl.arange(0, 8 * NP)[:, None] // 8).to(tl.float32)
        sum_place = wide(pair_row % K) * (GROUPS * N) + (pair_row // K) * projections + column
        sum_mask = column < NP
    h = ()
    for j in tl.static_range(NP):
        last_tile = tile_states + (wide(tl.maximum(n_tiles - 1, 0)) * N + j) * channels + d
        h = h + (tl.load(last_tile, mask=mask, other=0.0),)
    for reverse in range(0, n_tiles):
        i = n_tiles - 1 - reverse
        begin = start + i * K
        t = begin + k
        within, real, reset = tokens_of_tile(flags, t, end, FLAGS, WHOLE)
        inside = real & mask[None, :]
        delta = steps_of_tile(load_tile(dt, begin, k, stride_dt_t, inside), bias, real, SOFTPLUS)
        u = delta * load_tile(x, begin, k, stride_x_t, inside).to(tl.float32)
        g = load_tile(grad_y, begin, k, stride_y_t, inside).to(tl.float32)
        if HAS_Z:
            silu, _sigmoid = silu_parts(load_tile(z, begin, k, stride_z_t, inside).to(tl.float32))
            g *= silu
        scanned = tl.zeros((K, BD), tl.float32)
        grad_u = tl.zeros((K, BD), tl.float32)
        grad_step = tl.zeros((K, BD), tl.float32)
        projection = wide(start + i * K + token) * (GROUPS * N)
        within_chunk = start + i * K + token < end

        for n in range(0, N, NP):
            B_n = load_projection(B, begin, k, stride_B_t, stride_B_n, n, real, NP, PACKED)
            C_n = load_projection(C, begin, k, stride_C_t, stride_C_n, n, real, NP, PACKED)
            # all loads go out before the first of them is needed, and before stores that they may not pass
            A_n = ()
            dh = ()
            dA = ()
            for j in tl.static_range(NP):
                A_n = A_n + (
                    tl.load(A_t + wide(n + j) * stride_A_n + d * stride_A_d, mask=mask, other=0.0).to(tl.float32)
                    * LOG2_E,
                )
                dh = dh + (tl.load(grad_h + (n + j) * channels, mask=mask, other=0.0),)
                dA = dA + (tl.load(sums + (n + j) * channels, mask=mask, other=0.0),)
            # the states come from far: those of the next round are asked for now
            next_n = tl.where(n + NP < N, n + NP, 0)
            next_i = tl.where(n + NP < N, i, tl.maximum(i - 1, 0))
            next_h = ()
            for j in tl.static_range(NP):
                next_tile = tile_states + (wide(next_i) * N + next_n + j) * channels + d
                next_h = next_h + (tl.load(next_tile, mask=mask, other=0.0),)
            sent_on = ()
            grad_A = ()
            fours = ()
            for j in tl.static_range(NP):
                decay = decay_of(delta, A_n[j], reset, FLAGS)
                before = tl.where(k == 0, decay * h[j].to(tl.float32), 0.0)
                _product, states, kept = tl.associative_scan((decay, u * B_n[j] + before, before), 0, _states)
                scanned += states * C_n[j]
                for_C = states * g

                own = tl.flip(g * C_n[j], 0)
                own = tl.where(k == 0, own + dh[j], own)
                _product, grad_states = tl.associative_scan((_later_decays(decay, k, K), own), 0, combine)
                sent_on = sent_on + (row_of(decay, k, 0) * row_of(grad_states, k, K - 1),)
                grad_states = tl.flip(grad_states, 0)
                for_B = grad_states * u
                if MATRIX_SUMS:
                    fours = fours + (_sums_of_fours(for_B, for_C, pick, K, BD),)
                else:
                    tl.store(grad_B + projection + n + j, tl.sum(for_B, 1), mask=within_chunk)
                    tl.store(grad_C + projection + n + j, tl.sum(for_C, 1), mask=within_chunk)
                grad_u += grad_states * B_n[j]
                # the gradient of delta A
                exponent = grad_states * kept
                grad_step += exponent * A_n[j]
                grad_A = grad_A + (dA[j] + tl.sum(exponent * delta, 0),)
            h = next_h
            for j in tl.static_range(NP):
                tl.store(grad_h + (n + j) * channels, sent_on[j], mask=mask)
                tl.store(sums + (n + j) * channels, grad_A[j], mask=mask)
            if MATRIX_SUMS:
                summed = _sums_of_eights(fours, place, K, NP)
                kept_row = sum_mask
                if not WHOLE:
                    kept_row = sum_mask & (begin + pair_row % K < end)
                tl.store(grad_B + sum_place + wide(begin) * (GROUPS * N) + n, summed, mask=kept_row)

        # what lies near is read again, so that registers are free in between
        offsets = (outputs + wide(begin) * channels) + (k.to(tl.int64) * channels)
        written = mask[None, :] & within
        x_tile = load_tile(x, begin, k, stride_x_t, inside).to(tl.float32)
        dx = grad_u * delta + skip * g
        tl.store(grad_x + offsets, dx.to(grad_x.dtype.element_ty), mask=written)
        if HAS_D:
            grad_skip += tl.sum(g * x_tile, 0)
        # grad_step was summed with A / ln 2
        ddelta = grad_step * (1.0 / LOG2_E) + grad_u * x_tile
        if SOFTPLUS:
            # the derivative of softplus, sigmoid(v), is exp(v - softplus(v))
            v = load_tile(dt, begin, k, stride_dt_t, inside).to(tl.float32) + bias
            ddelta *= tl.exp2((v - delta) * LOG2_E)
        ddelta = tl.where(real, ddelta, 0.0)
        grad_bias += tl.sum(ddelta, 0)
        tl.store(grad_dt + offsets, ddelta.to(grad_dt.dtype.element_ty), mask=written)
        if HAS_Z:
            y_tile = load_tile(grad_y, begin, k, stride_y_t, inside).to(tl.float32)
            z_tile = load_tile(z, begin, k, stride_z_t, inside).to(tl.float32)
            silu, sigmoid = silu_parts(z_tile)
            dz = y_tile * (scanned + skip * x_tile) * (sigmoid + silu * (1.0 - sigmoid))
            if ROW_OF_Z:
                offsets = (row * length + begin + k.to(tl.int64)) * ROW_OF_Z + d[None, :]
            tl.store(grad_z + offsets, dz.to(grad_z.dtype.element_ty), mask=written)

    tl.store(sums + N * channels, grad_skip, mask=mask)
    tl.store(sums + (N + 1) * channels, grad_bias, mask=mask)
    if HAS_INITIAL:
        if is_first:
            for n in range(0, N):
                dh = tl.load(grad_h + n * channels, mask=mask, other=0.0)
                tl.store(grad_initial + (state * channels + d) * N + n, dh, mask=mask)


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
            _selective_scan_bwd_kernel,
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
