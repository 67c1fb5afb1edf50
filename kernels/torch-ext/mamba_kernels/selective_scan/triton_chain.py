# mypy: disable-error-code="assignment, misc"
"""The state that enters each chunk of a sequence, so that chunks can be scanned by themselves; see `triton_common`.

`chunk_states_kernel` sums what a chunk adds to the state, for all chunks at once, away from the end that needs it, and stops where
every weight has underflowed. `pass_states_kernel` then walks over the chunks. Both go backwards in time for gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import (
    LOG2_E,
    TABLE_COLUMNS,
    UNDERFLOW,
    UNUSED,
    Plan,
    ScanInputs,
    Tuning,
    ceil_div,
    channels_of,
    chunk_bounds,
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

__all__ = ["chunk_table", "launch_chain", "pass_states"]

CHUNK_STATES = Tuning(channels=32, tile=8)
# states of a program
CHUNK_PARTS = 16
PASS_BLOCK = 64


@triton.jit
def _sums(sum1, before1, sum2, before2):
    """Running sums with and without the last element."""
    return sum1 + sum2, sum1 + before2


@scan_kernel
def chunk_states_kernel(
    inputs,
    gates,
    dt,
    A_t,
    vector,
    dt_bias,
    flags,
    table,
    local,
    decay,
    stride_inputs_b,
    stride_inputs_t: tl.constexpr,
    stride_inputs_d,
    stride_gates_b,
    stride_gates_t: tl.constexpr,
    stride_gates_d,
    stride_dt_b,
    stride_dt_t: tl.constexpr,
    stride_dt_d,
    stride_A_n,
    stride_A_d,
    stride_vector_b,
    stride_vector_t: tl.constexpr,
    stride_vector_g,
    stride_vector_n,
    length,
    channels,
    chunk,
    n_chunks,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    NP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FLAGS: tl.constexpr,
    VARLEN: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """`local` and P of each chunk, both (slots, N, D).

    Forward: inputs = x, vector = B; the state that a chunk leaves behind. Backward: inputs = the gradient of y, gates = z,
    vector = C; the gradient that a chunk sends to the state before it.
    """
    blocks = tl.cdiv(channels // GROUPS, BD)
    pid = tl.program_id(0).to(tl.int64)
    n0 = (pid % (N // NP)).to(tl.int32) * NP
    pid = pid // (N // NP)
    block = (pid % (blocks * GROUPS)).to(tl.int32)
    slot = pid // (blocks * GROUPS)
    row, state, start, end, is_first, is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)
    # nobody asks for what leaves a sequence
    if BACKWARD:
        needless = is_first | (state < 0)
    else:
        needless = is_last | (state < 0)
    if needless:
        return

    group, d, mask = channels_of(block, channels, GROUPS, BD, EVEN)
    k = tl.arange(0, K)[:, None]
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    inputs += row * stride_inputs_b + d * stride_inputs_d
    dt += row * stride_dt_b + d * stride_dt_d
    gates += row * stride_gates_b + d * stride_gates_d
    vector += row * stride_vector_b + group.to(tl.int64) * stride_vector_g
    flags += row * length

    A_n = ()
    acc = ()
    for j in tl.static_range(NP):
        A_n = A_n + (
            tl.load(A_t + wide(n0 + j) * stride_A_n + d * stride_A_d, mask=mask, other=UNUSED).to(tl.float32) * LOG2_E,
        )
        acc = acc + (tl.zeros((BD,), tl.float32),)
    slowest = A_n[0]
    for j in tl.static_range(1, NP):
        slowest = tl.maximum(slowest, A_n[j])
    passed = tl.zeros((BD,), tl.float32)
    # whether no sequence starts between the tokens and the end that they are summed for
    joined = start >= 0
    n_tiles = tl.cdiv(end - start, K)
    if BACKWARD:
        step = K
        order = k
        begin = start
    else:
        step = -K
        order = -k
        begin = start + n_tiles * K - 1
    _within, real, _reset = tokens_of_tile(flags, begin + order, end, FLAGS, WHOLE)
    next_dt = load_tile(dt, begin, order, stride_dt_t, real & mask[None, :])
    next_value = load_tile(inputs, begin, order, stride_inputs_t, real & mask[None, :])
    i = n_tiles * 0
    live = joined
    while (i < n_tiles) & live:
        _within, real, reset = tokens_of_tile(flags, begin + order, end, FLAGS, WHOLE)
        inside = real & mask[None, :]
        delta = steps_of_tile(next_dt, bias, real, SOFTPLUS)
        value = next_value.to(tl.float32)
        # the next tile is on its way while this one is computed
        following = tl.where(i + 1 < n_tiles, begin + step, begin)
        _within, later, _reset = tokens_of_tile(flags, following + order, end, FLAGS, WHOLE)
        next_dt = load_tile(dt, following, order, stride_dt_t, later & mask[None, :])
        next_value = load_tile(inputs, following, order, stride_inputs_t, later & mask[None, :])
        if HAS_GATE:
            silu, _sigmoid = silu_parts(load_tile(gates, begin, order, stride_gates_t, inside).to(tl.float32))
            value *= silu
        if not BACKWARD:
            value *= delta
        if FLAGS:
            met = reset.to(tl.int32)
            resets = tl.cumsum(met, 0)
            if not BACKWARD:
                resets -= met
            value = tl.where(resets == 0, value, 0.0)
            joined = joined & (tl.sum(met) == 0)
        first = tl.where(k == 0, passed[None, :], 0.0)
        through, before = tl.associative_scan((delta + first, first), 0, _sums)
        passed = row_of(through, k, K - 1)
        if BACKWARD:
            weighed = through
        else:
            weighed = before
        scalars = load_projection(vector, begin, order, stride_vector_t, stride_vector_n, n0, real, NP, PACKED)
        total = ()
        for j in tl.static_range(NP):
            total = total + (acc[j] + tl.sum(tl.exp2(weighed * A_n[j]) * (value * scalars[j]), 0),)
        acc = total
        begin = following
        live = joined
        if SOFTPLUS:
            # steps are not negative, so that weights only fall from here on where A is not positive
            live = live & (tl.max(passed * slowest, 0) > UNDERFLOW)
        i += 1

    kept = tl.where(joined, 1.0, 0.0)
    for j in tl.static_range(NP):
        offsets = (slot * N + n0 + j) * channels + d
        tl.store(local + offsets, acc[j], mask=mask)
        tl.store(decay + offsets, tl.exp2(passed * A_n[j]) * kept, mask=mask)


@scan_kernel
def pass_states_kernel(
    states,
    decay,
    outer,
    table,
    length,
    channels,
    chunk,
    n_chunks,
    N: tl.constexpr,
    BD: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    VARLEN: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Chain the chunks in place: `states` (slots, N, D) holds `local` and becomes the state that enters each chunk.

    `outer` (sequences, D, N) enters each sequence: its initial state, or in the backward the gradient of its final state.
    """
    blocks = tl.cdiv(channels, BD)
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    n = (pid // blocks) % N
    row = pid // (blocks * N)
    d = block * BD + tl.arange(0, BD)
    mask = d < channels
    base = n * channels + d
    stride = N * channels
    h = tl.zeros((BD,), tl.float32)
    for index in range(0, n_chunks, UNROLL):
        # all loads of a group of chunks go out before the first of them is needed
        locals_ = ()
        decays = ()
        entering = ()
        for i in tl.static_range(UNROLL):
            order = (n_chunks - 1 - index - i) if BACKWARD else (index + i)
            used = (order >= 0) & (order < n_chunks)
            slot = row * n_chunks + tl.maximum(tl.minimum(order, n_chunks - 1), 0)
            _, state, _, _, is_first, is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)
            enters = is_last if BACKWARD else is_first
            leaves = is_first if BACKWARD else is_last
            inner = (mask & used & (state >= 0) & (leaves == 0)) != 0
            locals_ = locals_ + (tl.load(states + slot * stride + base, mask=inner, other=0.0),)
            decays = decays + (tl.load(decay + slot * stride + base, mask=inner, other=0.0),)
            if HAS_OUTER:
                source = outer + (tl.maximum(state, 0) * channels + d) * N + n
                fresh = tl.load(source, mask=(mask & used & (state >= 0) & enters) != 0, other=0.0).to(tl.float32)
            else:
                fresh = tl.zeros((BD,), tl.float32)
            entering = entering + (fresh,)
        for i in tl.static_range(UNROLL):
            order = (n_chunks - 1 - index - i) if BACKWARD else (index + i)
            used = (order >= 0) & (order < n_chunks)
            slot = row * n_chunks + tl.maximum(tl.minimum(order, n_chunks - 1), 0)
            _, state, _, _, is_first, is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)
            enters = is_last if BACKWARD else is_first
            h = tl.where(enters, entering[i], h)
            tl.store(states + slot * stride + base, h, mask=(mask & used & (state >= 0)) != 0)
            h = decays[i] * h + locals_[i]


@scan_kernel
def _chunk_table_kernel(cu_seqlens, table, n_sequences, chunk, n_slots, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < n_slots
    # the last sequence s whose first slot, cu_seqlens[s] // chunk + s, is not behind this one
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + (n_sequences - 1)
    # 2^31 sequences at most
    for _ in range(32):
        middle = (low + high + 1) // 2
        first = tl.load(cu_seqlens + middle, mask=mask, other=0).to(tl.int32) // chunk + middle
        low = tl.where(first <= slot, middle, low)
        high = tl.where(first <= slot, high, middle - 1)
    begin = tl.load(cu_seqlens + low, mask=mask, other=0).to(tl.int32)
    stop = tl.load(cu_seqlens + low + 1, mask=mask, other=0).to(tl.int32)
    index = slot - (begin // chunk + low)
    start = begin + index * chunk
    end = tl.minimum(start + chunk, stop)
    used = (index == 0) | (start < stop)
    marks = (index == 0).to(tl.int32) + 2 * (end == stop).to(tl.int32)
    entry = table + slot * TABLE_COLUMNS
    tl.store(entry, tl.where(used, low, -1), mask=mask)
    tl.store(entry + 1, start, mask=mask)
    tl.store(entry + 2, tl.where(used, end, start), mask=mask)
    tl.store(entry + 3, marks, mask=mask)
    tl.store(entry + 4, begin, mask=mask)
    tl.store(entry + 5, stop, mask=mask)


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int) -> Tensor:
    """(slots, 6) int32: sequence (-1: unused), first token, end, and marks (1: starts, 2: ends its sequence) of each chunk, and
    where its sequence begins and ends.

    No chunk holds tokens of two sequences. Sequence s gets the slots from cu_seqlens[s] // chunk + s on, so that the number of
    slots, length // chunk + n, is known without a look at the device.
    """
    n_sequences = cu_seqlens.shape[0] - 1
    n_slots = length // chunk + n_sequences
    table = torch.empty((n_slots, TABLE_COLUMNS.value), dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _chunk_table_kernel,
        (ceil_div(n_slots, 128),),
        cu_seqlens,
        table,
        n_sequences,
        chunk,
        n_slots,
        BLOCK=128,
        num_warps=4,
    )
    return table


def launch_chain(
    inputs: ScanInputs,
    plan: Plan,
    table: Tensor | None,
    outer: Tensor | None,
    grad_y: Tensor | None = None,
) -> Tensor:
    """The state that enters each chunk, (slots, N, D) fp32; with `grad_y` the gradient of the state that leaves it.

    `outer` (sequences, D, N): initial states, or the gradient of the final states.
    """
    backward = grad_y is not None
    values = inputs.x if grad_y is None else grad_y
    gates = inputs.z if backward else None
    vector = inputs.C if backward else inputs.B
    states, decay = torch.empty(
        (2, plan.n_slots, plan.size, plan.channels), dtype=torch.float32, device=inputs.x.device
    ).unbind(0)
    parts = state_parts(plan.size, CHUNK_PARTS)
    tuning = CHUNK_STATES
    blocks = plan.groups * ceil_div(plan.channels // plan.groups, tuning.channels)
    placeholder = inputs.A_t
    launch(
        chunk_states_kernel,
        (plan.n_slots * blocks * (plan.size // parts),),
        values,
        placeholder if gates is None else gates,
        inputs.dt,
        inputs.A_t,
        vector,
        placeholder if inputs.dt_bias is None else inputs.dt_bias,
        placeholder if inputs.flags is None else inputs.flags,
        placeholder if table is None else table,
        states,
        decay,
        *values.stride(),
        *strides_or_zeros(gates, 3),
        *inputs.dt.stride(),
        *inputs.A_t.stride(),
        *strides_or_zeros(vector, 4),
        plan.length,
        plan.channels,
        plan.chunk,
        plan.n_chunks,
        N=plan.size,
        GROUPS=plan.groups,
        BD=tuning.channels,
        K=tuning.tile,
        WHOLE=plan.whole,
        EVEN=plan.channels // plan.groups % tuning.channels == 0,
        NP=parts,
        HAS_GATE=gates is not None,
        HAS_BIAS=inputs.dt_bias is not None,
        SOFTPLUS=inputs.dt_softplus,
        FLAGS=inputs.flags is not None,
        VARLEN=table is not None,
        PACKED=plan.packed and parts % 4 == 0,
        BACKWARD=backward,
        **tuning.options(),
    )
    pass_states(inputs, plan, table, outer, states, decay, backward)
    return states


def pass_states(
    inputs: ScanInputs,
    plan: Plan,
    table: Tensor | None,
    outer: Tensor | None,
    states: Tensor,
    decay: Tensor,
    backward: bool,
) -> None:
    """Chain the chunks in place: see `pass_states_kernel`."""
    placeholder = inputs.A_t
    rows = 1 if table is not None else plan.batch
    launch(
        pass_states_kernel,
        (rows * plan.size * ceil_div(plan.channels, PASS_BLOCK),),
        states,
        decay,
        placeholder if outer is None else outer,
        placeholder if table is None else table,
        plan.length,
        plan.channels,
        plan.chunk,
        plan.n_chunks,
        N=plan.size,
        BD=PASS_BLOCK,
        UNROLL=8,
        HAS_OUTER=outer is not None,
        VARLEN=table is not None,
        BACKWARD=backward,
        num_warps=1,
    )
