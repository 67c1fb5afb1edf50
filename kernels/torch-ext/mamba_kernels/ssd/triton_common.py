"""What the kernels of the Triton SSD scan share (arXiv 2405.21060, section 6).

The sequence is cut in blocks of Q tokens. With `a = dt A`, `cum` its running sum in a block and `total` its sum, a block needs

    from_start[q] = exp(cum[q])              decay of the entering state at token q
    to_end[s] = exp(total - cum[s])          decay of token s's input at the end of the block
    inside[q, s] = exp(cum[q] - cum[s])      for s <= q, else 0
    carry = exp(total)                       decay of the state over the block

all of them zero across the border of two packed sequences. Exponents are kept in units of log2.

A *segment* is a run of blocks that one program walks through; a *slot* is a segment in the order of memory, as
`chunk_bounds` of the selective scan defines it. Where there are enough rows and heads to fill the device, a segment is a whole
sequence.

Symbols: Q tokens of a block, H heads, P head_dim, PB channels of a program, G groups, N state size, NB its next power of two.
"""

from typing import Any

import triton
import triton.language as tl

from ..compiling import kernel
from ..selective_scan.triton_common import LOG2_E, TABLE_COLUMNS, chunk_bounds, silu_parts, softplus

__all__ = [
    "LOG2_E",
    "block_decays",
    "chain_states",
    "inside_decays",
    "load_gradient",
    "load_rows",
    "marks_of_block",
    "over_states",
    "product",
    "rounded",
    "segment_of_program",
    "silu_parts",
    "softplus",
    "ssd_kernel",
    "state_offsets",
    "steps_of_block",
]

# integers that change from call to call: Triton must not compile anew for their divisibility
LENGTH_ARGUMENTS = (
    "length",
    "segment",
    "n_segments",
    "n_blocks",
    "first_direction",
    "n_slots",
    "heads_of_program",
    "part_of_projection",
    "part_of_tokens",
    "part_of_blocks",
    "n_totals",
    "n_parts",
    "n_elements",
)


def ssd_kernel(fn: Any) -> Any:
    """`triton.jit` with the specialisation that these kernels need."""
    names = set(fn.__annotations__) | set(fn.__code__.co_varnames[: fn.__code__.co_argcount])
    return kernel(fn, do_not_specialize=[name for name in LENGTH_ARGUMENTS if name in names])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Matrix product with fp32 sums."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """`value` in DTYPE, and in DTYPE again what that leaves out."""
    first = value.to(DTYPE)
    return first, (value.to(tl.float32) - first.to(tl.float32)).to(DTYPE)


@triton.jit
def segment_of_program(table, slot, length, segment, n_segments, n_blocks, Q: tl.constexpr, VARLEN: tl.constexpr):
    """Of a segment: row, state (-1: unused), first token, end, number in its sequence, segments after it, first block slot."""
    row, state, start, end, _first, _last = chunk_bounds(table, slot, length, segment, n_segments, VARLEN)
    if VARLEN:
        sequence = tl.maximum(state, 0)
        begin = tl.load(table + slot * TABLE_COLUMNS + 4).to(tl.int64)
        stop = tl.load(table + slot * TABLE_COLUMNS + 5).to(tl.int64)
        index = ((start - begin) // segment).to(tl.int32)
        after = (tl.maximum(tl.cdiv(stop - begin, segment), 1) - 1 - index).to(tl.int32)
        first_block = begin // Q + sequence + (start - begin) // Q
    else:
        index = (slot - row * n_segments).to(tl.int32)
        after = n_segments - 1 - index
        first_block = row * n_blocks + start // Q
    return row, state, start, end, index, after, first_block


@triton.jit
def marks_of_block(marks, start, end, Q: tl.constexpr, MARKS: tl.constexpr):
    """Of a block's tokens: whether each is real and its sequence's number; that of the state that enters, of the last token.

    `end` is the end of the segment; `marks` that of the row.
    """
    # loop variables are plain ints under the interpreter
    start = start + tl.full((), 0, tl.int32)
    t = start + tl.arange(0, Q)
    real = t < end
    number = tl.zeros((Q,), tl.int32)
    entering = 0
    last = 0
    if MARKS:
        mark = tl.load(marks + t, mask=real, other=0)
        last = tl.load(marks + tl.minimum(start + Q, end) - 1) >> 1
        entering = tl.load(marks + tl.maximum(start, 1) - 1, mask=start > 0, other=0) >> 1
        number = tl.where(real, mark >> 1, last)
        real = real & ((mark & 1) != 0)
    return real, number, entering, last


@triton.jit
def steps_of_block(dt, stride_t, real, bias, low, high, Q: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """Step sizes (Q,) fp32, 0 where a token is not real, and what they were before softplus and limits.

    `dt` points to the head of the block's first token.
    """
    raw = tl.load(dt + tl.arange(0, Q) * stride_t, mask=real, other=0.0).to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    if CLAMP:
        # compiled code hands over fp64
        step = tl.minimum(tl.maximum(step, tl.cast(low, tl.float32)), tl.cast(high, tl.float32))
    return tl.where(real, step, 0.0), raw


@triton.jit
def block_decays(
    exponent,
    number,
    entering,
    last,
    EXACT: tl.constexpr,
    MARKS: tl.constexpr,
):
    """(cum, its rounding error, from_start, to_end, carry) of a block, from `exponent` = dt A / ln 2 (Q,).

    EXACT sums in fp64 and keeps the rounding error: sums grow over a block while their differences may be tiny, and fp32
    operands deserve them right. 16-bit operands do not resolve the difference.
    """
    if EXACT:
        wide = tl.cumsum(exponent.to(tl.float64), 0)
        whole = tl.sum(exponent.to(tl.float64), 0)
        cum = wide.to(tl.float32)
        rest = (wide - cum.to(tl.float64)).to(tl.float32)
        from_start = tl.exp2(cum)
        to_end = tl.exp2((whole - wide).to(tl.float32))
        carry = tl.exp2(whole.to(tl.float32))
    else:
        cum = tl.cumsum(exponent, 0)
        whole = tl.sum(exponent, 0)
        rest = exponent
        from_start = tl.exp2(cum)
        to_end = tl.exp2(whole - cum)
        carry = tl.exp2(whole)
    if MARKS:
        from_start = tl.where(number == entering, from_start, 0.0)
        to_end = tl.where(number == last, to_end, 0.0)
        carry = tl.where(entering == last, carry, 0.0)
    return cum, rest, from_start, to_end, carry


@triton.jit
def inside_decays(
    cum,
    rest,
    number,
    Q: tl.constexpr,
    EXACT: tl.constexpr,
    MARKS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """exp(cum[q] - cum[s]) for s <= q in one sequence, else 0: (q, s), or (s, q) if TRANSPOSED."""
    i = tl.arange(0, Q)
    if TRANSPOSED:
        difference = cum[None, :] - cum[:, None]
        if EXACT:
            difference += rest[None, :] - rest[:, None]
        keep = i[None, :] >= i[:, None]
    else:
        difference = cum[:, None] - cum[None, :]
        if EXACT:
            difference += rest[:, None] - rest[None, :]
        keep = i[:, None] >= i[None, :]
    if MARKS:
        keep = keep & (number[:, None] == number[None, :])
    # masked before the exponential: on the other side differences are positive and might overflow
    return tl.exp2(tl.where(keep, difference, float("-inf")))


@triton.jit
def load_rows(base, stride_t, real, first, SIZE: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr):
    """(Q, BLOCK) of elements first, first + 1, … of each token; zeros where a token is not real or the vector ends."""
    t = tl.arange(0, Q)
    c = first + tl.arange(0, BLOCK)
    offsets = t[:, None] * stride_t + c[None, :]
    if SIZE % BLOCK == 0:
        return tl.load(base + offsets, mask=real[:, None], other=0.0)
    return tl.load(base + offsets, mask=real[:, None] & (c[None, :] < SIZE), other=0.0)


@triton.jit
def load_gradient(
    dy,
    z,
    stride_dy,
    stride_z,
    real,
    first,
    P: tl.constexpr,
    PB: tl.constexpr,
    Q: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """The gradient of y before the gate, (Q, PB): fp32 if there is one, else in its own dtype."""
    value = load_rows(dy, stride_dy, real, first, P, PB, Q)
    if HAS_Z:
        gate, _sigmoid = silu_parts(load_rows(z, stride_z, real, first, P, PB, Q).to(tl.float32))
        value = value.to(tl.float32) * gate
    return value


@triton.jit
def state_offsets(
    index, head, first, n0, H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr
):
    """Offsets and mask of (PB, NB), from channel `first` and state n0 on, of the state of `head` in (…, H, P, N)."""
    p = first + tl.arange(0, PB)
    n = n0 + tl.arange(0, NB)
    inner = p[:, None] * N + n[None, :]
    mask = (p[:, None] < P) & (n[None, :] < N)
    return (index * H + head) * (P * N) + inner, mask


@triton.jit
def over_states(
    tokens,
    stride_t,
    real,
    states,
    index,
    head,
    first,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PB: tl.constexpr,
    NS: tl.constexpr,
    Q: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    REST: tl.constexpr,
):
    """Products of tokens (…, N) and a state of (…, H, P, N), (Q, PB) in fp32, NS states at a time.

    Operands of fp32 products wait in registers, twice in three TF32 products: for all states at once they do not fit.
    """
    p = first + tl.arange(0, PB)
    states += (index * H + head) * (P * N)
    sums = tl.zeros((Q, PB), tl.float32)
    for start in range(0, N, NS):
        n = start + tl.arange(0, NS)
        mask = (p[:, None] < P) & (n[None, :] < N)
        state = tl.load(states + p[:, None] * N + n[None, :], mask=mask, other=0.0)
        value = load_rows(tokens, stride_t, real, start, N, NS, Q).to(DTYPE)
        b_state, rest_of_state = rounded(state, DTYPE)
        sums += product(value, tl.trans(b_state), PRECISION)
        if REST == 2:
            sums += product(value, tl.trans(rest_of_state), PRECISION)
    return sums


@triton.jit
def chain_states(
    state,
    local,
    decay,
    slot,
    count,
    direction,
    head,
    first,
    n0,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PB: tl.constexpr,
    NB: tl.constexpr,
):
    """`state` after the `count` segments next to `slot`, before it (direction 1) or behind it (-1), nearest last.

    local (slots, H, P, N) is what each segment adds, decay (slots, H) what it leaves of the state that enters.
    """
    for i in range(0, count):
        other = slot - direction * (count - i)
        offsets, mask = state_offsets(other, head, first, n0, H, P, N, PB, NB)
        added = tl.load(local + offsets, mask=mask, other=0.0)
        state = tl.load(decay + other * H + head) * state + added
    return state
