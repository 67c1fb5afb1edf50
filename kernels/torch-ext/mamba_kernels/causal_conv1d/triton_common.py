"""What the kernels of the Triton causal convolution share.

With `pre[t] = bias + Σ_j w[W-1-j] · v(t, j)`, v(t, j) the input j tokens before token t, and y = act(pre)::

    dpre[t] = dy[t] act'(pre[t])          dx[s] = Σ_j w[W-1-j] dpre[s+j]          dw[W-1-j] = Σ_t dpre[t] v(t, j)

v(t, j) is x[t-j] where that token belongs to the sequence of token t and is real; before a sequence's first token it is the
initial state, else 0. Nothing but the inputs is saved.

A program walks through a *run* of tokens of one row, with BC channels and the last W - 1 inputs of each in registers, so that
every input is read once. It loads K tokens at a time, all before the first is used.

Symbols: t, s tokens, c channels, W taps. A row's tokens are numbered from 0; with `cu_seqlens` there is one row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "Tuning",
    "both",
    "conv_kernel",
    "input_at",
    "is_real",
    "load_taps",
    "quarters",
    "restarted",
    "sequence_at",
    "sequence_of_state",
    "sigmoid_of",
    "window_before",
]

# integers that change from call to call: Triton must not compile anew for their divisibility
LENGTH_ARGUMENTS = ("length", "run", "n_runs")
# programs, single warps, that fill a large GPU
TARGET_PROGRAMS = 2048


class Tuning(NamedTuple):
    """How the work is cut. Programs are single warps."""

    channels: int  # of a program
    tokens: int  # K
    longest: int  # most rounds of K tokens of a program
    shortest: int = 2

    def rounds(self, rows: int, length: int, blocks: int) -> int:
        """Rounds of K tokens of a program, fewer where there would be too few programs."""
        rounds = self.longest
        while rounds > self.shortest and rows * blocks * length < TARGET_PROGRAMS * rounds * self.tokens:
            rounds //= 2
        return rounds


def conv_kernel(fn: Callable[..., None]) -> Any:
    """`triton.jit` that does not compile anew for every length."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return triton.jit(fn, do_not_specialize=[name for name in LENGTH_ARGUMENTS if name in names])


@triton.jit
def both(mask, flag):
    """A vector of booleans and a single one; the comparison keeps them booleans under the interpreter."""
    return (mask & flag) != 0


@triton.jit
def is_real(numbers, t, length, MARKS: tl.constexpr):
    """Whether there is a token t and it is no padding; `numbers` as in `sequence_at`."""
    real = (t >= 0) & (t < length)
    if MARKS:
        real = real & ((tl.load(numbers + t, mask=real, other=0) & 1) != 0)
    return real


@triton.jit
def sequence_at(numbers, t, length, MARKS: tl.constexpr, VARLEN: tl.constexpr):
    """The number of the sequence of token t, 0 outside of the row.

    `numbers`: with MARKS 2 · sequence + whether the token is real, with VARLEN the sequence.
    """
    number = (t * 0).to(tl.int32)
    inside = (t >= 0) & (t < length)
    if MARKS:
        number = tl.load(numbers + t, mask=inside, other=0) >> 1
    if VARLEN:
        number = tl.load(numbers + t, mask=inside, other=0)
    return number


@triton.jit
def input_at(
    x,
    initial,
    numbers,
    stride_t,
    s,
    number,
    begin,
    state,
    c,
    mask,
    length,
    channels,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
):
    """The input (BC,) fp32 at position s of the sequence `number` that begins at `begin` and has the initial state `state`."""
    present = (s >= begin) & (s < length)
    if MARKS:
        mark = tl.load(numbers + s, mask=present, other=0)
        present = present & ((mark & 1) != 0) & ((mark >> 1) == number)
    value = tl.load(x + s.to(tl.int64) * stride_t + c, mask=both(mask, present), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = s < begin
        if MARKS:
            before = before & (number == 0)
        place = initial + (state * channels + c) * (W - 1) + (s - begin + (W - 1))
        value += tl.load(place, mask=both(mask, before), other=0.0).to(tl.float32)
    return value


@triton.jit
def window_before(
    x,
    initial,
    numbers,
    bounds,
    stride_t,
    t,
    row,
    c,
    mask,
    length,
    channels,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """The inputs 1, …, W - 1 tokens before token t, as it sees them."""
    number = sequence_at(numbers, t, length, MARKS, VARLEN)
    begin = number * 0
    state = row
    if VARLEN:
        begin = tl.load(bounds + number).to(tl.int32)
        state = number.to(tl.int64)
    window = ()
    for j in tl.static_range(1, W):
        value = input_at(
            x,
            initial,
            numbers,
            stride_t,
            t - j,
            number,
            begin,
            state,
            c,
            mask,
            length,
            channels,
            W,
            HAS_INITIAL,
            MARKS,
        )
        window = window + (value,)
    return window


@triton.jit
def restarted(window, initial, changed, number, c, mask, channels, W: tl.constexpr, HAS_INITIAL: tl.constexpr):
    """`window`, or where a new sequence starts what its first token sees before itself; HAS_INITIAL with VARLEN alone."""
    found = ()
    for j in tl.static_range(1, W):
        value = tl.where(changed, 0.0, window[j - 1])
        if HAS_INITIAL:
            place = initial + (number.to(tl.int64) * channels + c) * (W - 1) + (W - 1 - j)
            value += tl.load(place, mask=both(mask, changed), other=0.0).to(tl.float32)
        found = found + (value,)
    return found


@triton.jit
def quarters(tile, BC: tl.constexpr):
    """The four columns of a tile (BC, 4), which a thread holds together."""
    even, odd = tl.split(tl.reshape(tile, (BC, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_taps(weight, c, mask, W: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_W: tl.constexpr):
    """The weights that meet the input j tokens back, j = 0, 1, …: W vectors (BC,) fp32."""
    if W == 4 and STRIDE_D == 4 and STRIDE_W == 1:
        # those of a channel in one load
        cells = c[:, None].to(tl.int64) * 4 + tl.arange(0, 4)[None, :]
        tile = tl.load(weight + cells, mask=mask[:, None], other=0.0).to(tl.float32)
        tap3, tap2, tap1, tap0 = quarters(tile, c.shape[0])
        taps = (tap0, tap1, tap2, tap3)
    else:
        taps = ()
        for j in tl.static_range(W):
            place = weight + c.to(tl.int64) * STRIDE_D + (W - 1 - j) * STRIDE_W
            taps = taps + (tl.load(place, mask=mask, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def sigmoid_of(v):
    return 1.0 / (1.0 + tl.exp2(v * -1.4426950408889634))


@triton.jit
def sequence_of_state(numbers, bounds, ends, sequence, length, MARKS: tl.constexpr, VARLEN: tl.constexpr):
    """Of a state: its row, the number of its last sequence in that row, where it begins and ends."""
    row = sequence
    number = (sequence * 0).to(tl.int32)
    begin = number
    end = number + length
    if MARKS:
        end = tl.load(ends + sequence)
        number = tl.load(numbers + sequence * length + end - 1, mask=end > 0, other=0) >> 1
    if VARLEN:
        row = sequence * 0
        number = sequence.to(tl.int32)
        begin = tl.load(bounds + sequence).to(tl.int32)
        end = tl.load(bounds + sequence + 1).to(tl.int32)
    return row, number, begin, end
