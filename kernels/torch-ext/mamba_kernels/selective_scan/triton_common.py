"""What the forward and the backward of the Triton selective scan share.

The sequence is cut in chunks. For a chunk from token s to token e, with a_t = exp(delta_t A) and h_t = a_t h_{t-1} + b_t::

    h_e = P h_{s-1} + local,    P = exp(A sum_{t=s..e} delta_t),    local = sum_t exp(A sum_{r=t+1..e} delta_r) b_t

`chunk_states_kernel` makes P and `local` of every chunk, all chunks at once, and `pass_states_kernel` chains them, so that every
chunk can then be scanned by itself. The gradient of the state obeys the same recurrence backwards in time and goes through the
same two kernels. Sums run away from the end of the chunk that needs them, and stop where every weight has underflowed.

Symbols: L length, D channels, N state size, G groups of B and C, K tokens of a tile, S chunks of a row; BD channels of a program.
A *slot* is a chunk in the order of memory: row * S + chunk. A program is one warp and works on BD channels of one slot. A tile is
(K, BD): every thread holds all tokens of its channels, so that a scan or a flip over tokens is plain register arithmetic. That
needs loads of one element a thread; `UNALIGNED` keeps Triton from choosing wider ones, which would move tiles between threads.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import kernel

__all__ = [
    "LOG2_E",
    "TABLE_COLUMNS",
    "chunk_bounds",
    "chunk_states_kernel",
    "chunk_table",
    "combine",
    "decay_of",
    "load_projection",
    "load_tile",
    "pass_states_kernel",
    "row_of",
    "scan_kernel",
    "silu_parts",
    "state_parts",
    "steps_of_tile",
    "strides_or_zeros",
    "tokens_of_tile",
    "wide",
]

LOG2_E = tl.constexpr(1.4426950408889634)
# stands for A in channels that a program does not have
UNUSED = tl.constexpr(-1.0e30)
# an exponent of 2 below which a weight is 0 in fp32
UNDERFLOW = tl.constexpr(-127.0)

# of `chunk_table`
TABLE_COLUMNS = tl.constexpr(6)

# bits of a token's flag
RESET = tl.constexpr(1)
REAL = tl.constexpr(2)

# integers that change from call to call: Triton must not compile anew for their divisibility
LENGTH_ARGUMENTS = [
    "length",
    "chunk",
    "n_chunks",
    "n_slots",
    "first_slot",
    "save_every",
    "n_saved",
    "batch",
    "n_sequences",
    "count",
    "size",
]
_OPERANDS = ("x", "dt", "z", "y", "B", "C", "inputs", "gates", "vector")
UNALIGNED = ["channels", *(f"stride_{name}_{axis}" for name in _OPERANDS for axis in "btdgn")]


def scan_kernel(fn: Callable[..., None]) -> Any:
    """`triton.jit` with the specialisation that these kernels need."""
    names = set(inspect.signature(fn).parameters)
    return kernel(
        fn,
        do_not_specialize=[name for name in LENGTH_ARGUMENTS if name in names],
        do_not_specialize_on_alignment=[name for name in UNALIGNED if name in names],
    )


@triton.jit
def wide(i):
    """An index as int64; also where it is a plain int, as loop variables are under the interpreter."""
    return i + tl.full((), 0, tl.int64)


@triton.jit
def softplus(v):
    """log(1 + exp(v)) as max(v, 0) + log1p(exp(-|v|)), log1p by a polynomial: relative error 4e-7 for every v."""
    u = tl.exp2(-tl.abs(v) * LOG2_E)
    p = u * -0.008539198433781387 + 0.04408959629386039
    p = p * u - 0.1076816640846675
    p = p * u + 0.17745238092656662
    p = p * u - 0.2449546164074867
    p = p * u + 0.33275479573182926
    p = p * u - 0.4999740538322323
    p = p * u + 0.9999998056656607
    return tl.maximum(v, 0.0) + u * p


@triton.jit
def silu_parts(z):
    """(silu(z), sigmoid(z))."""
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2_E))
    return z * sigmoid, sigmoid


@triton.jit
def chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN: tl.constexpr):
    """Of a slot: its row, state index (-1: an unused slot), first token, end, and whether it starts and ends a sequence."""
    if VARLEN:
        entry = table + slot * TABLE_COLUMNS
        marks = tl.load(entry + 3)
        row = slot * 0
        state = tl.load(entry).to(tl.int64)
        start = tl.load(entry + 1)
        end = tl.load(entry + 2)
        is_first = (marks & 1) != 0
        is_last = (marks & 2) != 0
    else:
        row = slot // n_chunks
        state = row
        index = (slot - row * n_chunks).to(tl.int32)
        start = index * chunk
        end = tl.minimum(start + chunk, length)
        is_first = index == 0
        is_last = index == n_chunks - 1
    return row, state, start, end, is_first, is_last


@triton.jit
def combine(a1, b1, a2, b2):
    """h -> a2 (a1 h + b1) + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def row_of(tile, k, index: tl.constexpr):
    """One token's vector (BD,) of a tile; on integers, where adding 0 costs nothing."""
    bits = tl.where(k == index, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def tokens_of_tile(flags, t, end, FLAGS: tl.constexpr):
    """For tokens `t` (K, 1): whether each is real, and whether a sequence starts with it."""
    real = t < end
    reset = t < 0
    if FLAGS:
        flag = tl.load(flags + t, mask=real, other=0).to(tl.int32)
        real = (flag & REAL) != 0
        reset = (flag & RESET) != 0
    return real, reset


@triton.jit
def load_tile(base, t, stride, offsets, mask):
    """(K, BD) as it lies in memory; zeros outside of `mask`."""
    return tl.load(base + t.to(tl.int64) * stride + offsets, mask=mask, other=0.0)


@triton.jit
def steps_of_tile(dt, bias, real, SOFTPLUS: tl.constexpr):
    """delta of a tile; 0 where a token is not real, which keeps the state, as its decay is 1 then."""
    delta = dt.to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(real, delta, 0.0)


@triton.jit
def token_scalars(word, dtype: tl.constexpr):
    """The four 16-bit floats of 64-bit words."""
    low = word.to(tl.int32)
    high = (word >> 32).to(tl.int32)
    if dtype == tl.bfloat16:
        s0 = (low << 16).to(tl.float32, bitcast=True)
        s1 = (low & -65536).to(tl.float32, bitcast=True)
        s2 = (high << 16).to(tl.float32, bitcast=True)
        s3 = (high & -65536).to(tl.float32, bitcast=True)
    else:
        s0 = low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        s1 = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        s2 = high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        s3 = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return s0, s1, s2, s3


@triton.jit
def load_projection(base, t, stride_t, stride_n, n, real, NP: tl.constexpr, PACKED: tl.constexpr):
    """B or C of a tile's tokens for NP states from n on: NP tensors (K, 1); `base` is the row's and group's."""
    scalars = ()
    rows = base + t.to(tl.int64) * stride_t
    if PACKED:
        words = (rows + n).to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(NP // 4):
            word = tl.load(words + i, mask=real, other=0)
            scalars = scalars + token_scalars(word, base.dtype.element_ty)
    else:
        for j in tl.static_range(NP):
            value = tl.load(rows + wide(n + j) * stride_n, mask=real, other=0.0)
            scalars = scalars + (value.to(tl.float32),)
    return scalars


@triton.jit
def decay_of(delta, A_n, reset, FLAGS: tl.constexpr):
    """exp(delta A), or 0 where a sequence starts; A_n is A / ln 2."""
    decay = tl.exp2(delta * A_n)
    if FLAGS:
        decay = tl.where(reset, 0.0, decay)
    return decay


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
    stride_inputs_t,
    stride_inputs_d,
    stride_gates_b,
    stride_gates_t,
    stride_gates_d,
    stride_dt_b,
    stride_dt_t,
    stride_dt_d,
    stride_vector_b,
    stride_vector_t,
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
    group_size = channels // GROUPS
    blocks = tl.cdiv(group_size, BD)
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

    group = block // blocks
    within = (block % blocks) * BD + tl.arange(0, BD)
    mask = within < group_size
    d = (group * group_size + within).to(tl.int64)
    k = tl.arange(0, K)[:, None]
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    inputs += row * stride_inputs_b
    dt += row * stride_dt_b
    gates += row * stride_gates_b
    vector += row * stride_vector_b + group.to(tl.int64) * stride_vector_g
    flags += row * length

    A_n = ()
    acc = ()
    for j in tl.static_range(NP):
        A_n = A_n + (tl.load(A_t + (n0 + j) * channels + d, mask=mask, other=UNUSED) * LOG2_E,)
        acc = acc + (tl.zeros((BD,), tl.float32),)
    passed = tl.zeros((BD,), tl.float32)
    # whether no sequence starts between the tokens and the end that they are summed for
    joined = start >= 0
    n_tiles = tl.cdiv(end - start, K)
    i = n_tiles * 0
    live = joined
    while (i < n_tiles) & live:
        if BACKWARD:
            t = start + i * K + k
        else:
            t = start + (n_tiles - i) * K - 1 - k
        real, reset = tokens_of_tile(flags, t, end, FLAGS)
        inside = real & mask[None, :]
        delta = steps_of_tile(load_tile(dt, t, stride_dt_t, d * stride_dt_d, inside), bias, real, SOFTPLUS)
        value = load_tile(inputs, t, stride_inputs_t, d * stride_inputs_d, inside).to(tl.float32)
        if HAS_GATE:
            silu, _sigmoid = silu_parts(load_tile(gates, t, stride_gates_t, d * stride_gates_d, inside).to(tl.float32))
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
        scalars = load_projection(vector, t, stride_vector_t, stride_vector_n, n0, real, NP, PACKED)
        total = ()
        for j in tl.static_range(NP):
            total = total + (acc[j] + tl.sum(tl.exp2(weighed * A_n[j]) * (value * scalars[j]), 0),)
        acc = total
        live = joined
        if SOFTPLUS:
            # steps are not negative, so that weights only fall from here on where A is not positive
            largest = passed * A_n[0]
            for j in tl.static_range(1, NP):
                largest = tl.maximum(largest, passed * A_n[j])
            live = live & (tl.max(largest, 0) > UNDERFLOW)
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
    _chunk_table_kernel[(triton.cdiv(n_slots, 128),)](
        cu_seqlens,
        table,
        n_sequences,
        chunk,
        n_slots,
        BLOCK=128,
        num_warps=4,
    )
    return table


def strides_or_zeros(value: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor that may be absent; B and C without groups, (B, L, N), get a stride of 0 for the group."""
    if value is None:
        return (0,) * rank
    strides = value.stride()
    if rank == 4 and value.dim() == 3:
        return (strides[0], strides[1], 0, strides[2])
    return tuple(strides)


def state_parts(state_size: int, limit: int) -> int:
    """The largest power of two that divides `state_size` and is at most `limit`."""
    return min(state_size & -state_size, limit)
