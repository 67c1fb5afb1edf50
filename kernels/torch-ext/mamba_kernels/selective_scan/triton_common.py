"""What the forward and the backward of the Triton selective scan share.

The sequence is cut in chunks. For a chunk from token s to token e, with a_t = exp(delta_t A) and h_t = a_t h_{t-1} + b_t::

    h_e = P h_{s-1} + local,    P = exp(A sum_{t=s..e} delta_t),    local = sum_t exp(A sum_{r=t+1..e} delta_r) b_t

`chunk_states_kernel` makes P and `local` of every chunk, all chunks at once, and `pass_states_kernel` chains them, so that every
chunk can then be scanned by itself. The gradient of the state obeys the same recurrence backwards in time and goes through the
same two kernels. Sums run away from the end of the chunk that needs them, and stop where every weight has underflowed.

Symbols: L length, D channels, N state size, G groups of B and C, K tokens of a tile, S chunks of a row; BD channels of a program.
A *slot* is a chunk in the order of memory: row * S + chunk. A program works on BD channels of one slot: a vector holds one token
of these channels, and a Python tuple holds the vectors of the K tokens of a tile. B and C are scalars to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "LENGTH_ARGUMENTS",
    "chunk_bounds",
    "chunk_states_kernel",
    "chunk_table",
    "decay_of",
    "load_projection",
    "load_rows",
    "pass_states_kernel",
    "rows_of_tile",
    "silu_parts",
    "softplus",
    "state_parts",
    "strides_or_zeros",
    "token_scalars",
    "wide",
]

LOG2_E = tl.constexpr(1.4426950408889634)
# added to the exponent of a decay where a sequence starts: the state before it is multiplied by exactly 0
CUT = tl.constexpr(-1.0e30)
# an exponent of 2 below which a weight is 0 in fp32
UNDERFLOW = tl.constexpr(-127.0)

# bits of a token's flag
RESET = tl.constexpr(1)
REAL = tl.constexpr(2)

# integers that change from call to call: Triton must not compile anew for their divisibility
LENGTH_ARGUMENTS = ["length", "chunk", "n_chunks", "n_slots", "first_slot", "save_every", "n_saved", "batch", "n_sequences", "iterations"]


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
        entry = table + slot * 4
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
def rows_of_tile(flags, t, end, K: tl.constexpr, FLAGS: tl.constexpr):
    """For tokens t to t + K: whether each is real, and what to add to the exponent of its decay."""
    real = ()
    cut = ()
    for k in tl.static_range(K):
        inside = t + k < end
        if FLAGS:
            flag = tl.load(flags + t + k, mask=inside, other=0).to(tl.int32)
            real = real + ((flag & REAL) != 0,)
            cut = cut + (tl.where((flag & RESET) != 0, CUT, 0.0),)
        else:
            real = real + (inside,)
            cut = cut + (0.0,)
    return real, cut


@triton.jit
def load_rows(base, t, stride, offsets, mask, real, K: tl.constexpr):
    """K vectors of one tile as they lie in memory; zeros where a token is not real."""
    rows = ()
    row = base + t.to(tl.int64) * stride
    for k in tl.static_range(K):
        rows = rows + (tl.load(row + offsets, mask=mask & real[k], other=0.0),)
        row += stride
    return rows


@triton.jit
def token_scalars(word, dtype: tl.constexpr):
    """The four 16-bit floats of a 64-bit word."""
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
def load_projection(base, t, stride_t, stride_n, n, real, K: tl.constexpr, NP: tl.constexpr, PACKED: tl.constexpr):
    """B or C of K tokens and NP states from n on, as K tuples of NP scalars; `base` is the row's and group's."""
    tokens = ()
    row = base + t.to(tl.int64) * stride_t
    for k in tl.static_range(K):
        scalars = ()
        if PACKED:
            words = (row + n).to(tl.pointer_type(tl.int64), bitcast=True)
            for i in tl.static_range(NP // 4):
                word = tl.load(words + i, mask=real[k], other=0)
                scalars = scalars + token_scalars(word, base.dtype.element_ty)
        else:
            for j in tl.static_range(NP):
                value = tl.load(row + wide(n + j) * stride_n, mask=real[k], other=0.0)
                scalars = scalars + (value.to(tl.float32),)
        tokens = tokens + (scalars,)
        row += stride_t
    return tokens


@triton.jit
def decay_of(delta, A_n, cut, FLAGS: tl.constexpr):
    """exp(delta A), or 0 where a sequence starts; A_n is A / ln 2."""
    exponent = delta * A_n
    if FLAGS:
        exponent += cut
    return tl.exp2(exponent)


@triton.jit(do_not_specialize=LENGTH_ARGUMENTS)
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
    stride_input_b,
    stride_input_t,
    stride_input_d,
    stride_gate_b,
    stride_gate_t,
    stride_gate_d,
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
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    inputs += row * stride_input_b
    dt += row * stride_dt_b
    gates += row * stride_gate_b
    vector += row * stride_vector_b + group.to(tl.int64) * stride_vector_g
    flags += row * length

    A_n = ()
    acc = ()
    for j in tl.static_range(NP):
        A_n = A_n + (tl.load(A_t + (n0 + j) * channels + d, mask=mask, other=CUT) * LOG2_E,)
        acc = acc + (tl.zeros((BD,), tl.float32),)
    passed = tl.zeros((BD,), tl.float32)
    # 1 until a sequence boundary separates the tokens from the end that they are summed for
    joined = 1.0
    n_tiles = tl.cdiv(end - start, K)
    i = n_tiles * 0
    live = i + 1
    while (i < n_tiles) & (live > 0):
        if BACKWARD:
            t = start + i * K
        else:
            t = start + (n_tiles - 1 - i) * K
        real, cut = rows_of_tile(flags, t, end, K, FLAGS)
        dt_rows = load_rows(dt, t, stride_dt_t, d * stride_dt_d, mask, real, K)
        rows = load_rows(inputs, t, stride_input_t, d * stride_input_d, mask, real, K)
        if HAS_GATE:
            gate_rows = load_rows(gates, t, stride_gate_t, d * stride_gate_d, mask, real, K)
        scalars = load_projection(vector, t, stride_vector_t, stride_vector_n, n0, real, K, NP, PACKED)

        for k in tl.static_range(0 if BACKWARD else K - 1, K if BACKWARD else -1, 1 if BACKWARD else -1):
            delta = dt_rows[k].to(tl.float32) + bias
            if SOFTPLUS:
                delta = softplus(delta)
            delta = tl.where(real[k], delta, 0.0)
            value = rows[k].to(tl.float32)
            if HAS_GATE:
                silu, _ = silu_parts(gate_rows[k].to(tl.float32))
                value *= silu
            if BACKWARD:
                passed += delta
                if FLAGS:
                    joined = tl.where(cut[k] < 0.0, 0.0, joined)
            else:
                value *= delta
            if FLAGS:
                value = tl.where(joined > 0.0, value, 0.0)
            total = ()
            for j in tl.static_range(NP):
                total = total + (acc[j] + tl.exp2(passed * A_n[j]) * (value * scalars[k][j]),)
            acc = total
            if not BACKWARD:
                passed += delta
                if FLAGS:
                    joined = tl.where(cut[k] < 0.0, 0.0, joined)
        if SOFTPLUS:
            # steps are not negative, so that weights only fall from here on where A is not positive
            largest = passed * A_n[0]
            for j in tl.static_range(1, NP):
                largest = tl.maximum(largest, passed * A_n[j])
            live = (tl.max(largest, 0) > UNDERFLOW).to(tl.int32)
        if FLAGS:
            live = tl.where(joined > 0.0, live, 0)
        i += 1

    for j in tl.static_range(NP):
        offsets = (slot * N + n0 + j) * channels + d
        tl.store(local + offsets, acc[j], mask=mask)
        tl.store(decay + offsets, tl.exp2(passed * A_n[j]) * joined, mask=mask)


@triton.jit(do_not_specialize=LENGTH_ARGUMENTS)
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
            inner = mask & used & (state >= 0) & (leaves == 0)
            locals_ = locals_ + (tl.load(states + slot * stride + base, mask=inner, other=0.0),)
            decays = decays + (tl.load(decay + slot * stride + base, mask=inner, other=0.0),)
            if HAS_OUTER:
                source = outer + (tl.maximum(state, 0) * channels + d) * N + n
                fresh = tl.load(source, mask=mask & used & (state >= 0) & enters, other=0.0).to(tl.float32)
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
            tl.store(states + slot * stride + base, h, mask=mask & used & (state >= 0))
            h = decays[i] * h + locals_[i]


@triton.jit(do_not_specialize=LENGTH_ARGUMENTS)
def _chunk_table_kernel(cu_seqlens, table, n_sequences, chunk, n_slots, iterations, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < n_slots
    # the last sequence s whose first slot, cu_seqlens[s] // chunk + s, is not behind this one
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + (n_sequences - 1)
    for _ in range(iterations):
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
    entry = table + slot * 4
    tl.store(entry, tl.where(used, low, -1), mask=mask)
    tl.store(entry + 1, start, mask=mask)
    tl.store(entry + 2, tl.where(used, end, start), mask=mask)
    tl.store(entry + 3, marks, mask=mask)


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int) -> Tensor:
    """(slots, 4) int32: sequence (-1: unused), first token, end, and marks (1: starts, 2: ends its sequence) of each chunk.

    No chunk holds tokens of two sequences. Sequence s gets the slots from cu_seqlens[s] // chunk + s on, so that the number of
    slots, length // chunk + n, is known without a look at the device.
    """
    n_sequences = cu_seqlens.shape[0] - 1
    n_slots = length // chunk + n_sequences
    table = torch.empty((n_slots, 4), dtype=torch.int32, device=cu_seqlens.device)
    _chunk_table_kernel[(triton.cdiv(n_slots, 128),)](
        cu_seqlens,
        table,
        n_sequences,
        chunk,
        n_slots,
        n_sequences.bit_length(),
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
