"""What the kernels of the Triton causal convolution share.

With `pre[t] = bias + Σ_j w[W-1-j] · v(t, j)`, v(t, j) the input j tokens before token t, and y = act(pre)::

    dpre[t] = dy[t] act'(pre[t])          dx[s] = Σ_i w[W-1-i] dpre[s+i]          dw[W-1-j] = Σ_t dpre[t] v(t, j)

v(t, j) is x[t-j] where that token belongs to the sequence of token t and is real; before a sequence's first token it is the
initial state, else 0. Nothing but the inputs is saved.

Symbols: t, s tokens, c channels, W taps; a program has tiles of (BT, BC). A row's tokens are numbered from 0; with
`cu_seqlens` there is one row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["Tuning", "conv_kernel", "inputs", "load_taps", "sequence_of_state", "sigmoid_of", "token_info"]

# integers that change from call to call: Triton must not compile anew for their divisibility
LENGTH_ARGUMENTS = ("length", "n_tiles")


class Tuning(NamedTuple):
    """A program's tile and warps."""

    tokens: int
    channels: int
    warps: int = 4
    tiles: int = 1  # that a program takes one after the other


def conv_kernel(fn: Any) -> Any:
    """`triton.jit` that does not compile anew for every length."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return triton.jit(fn, do_not_specialize=[name for name in LENGTH_ARGUMENTS if name in names])


@triton.jit
def token_info(numbers, bounds, t, length, MARKS: tl.constexpr, VARLEN: tl.constexpr):
    """Of tokens t: whether each is real, the number of its sequence, and where that begins.

    `numbers`: with MARKS 2 · sequence + whether the token is real, with VARLEN the sequence.
    """
    real = (t >= 0) & (t < length)
    number = t * 0
    begin = t * 0
    if MARKS:
        mark = tl.load(numbers + t, mask=real, other=0)
        number = mark >> 1
        real = real & ((mark & 1) != 0)
    if VARLEN:
        number = tl.load(numbers + t, mask=real, other=0)
        begin = tl.load(bounds + number, mask=real, other=0).to(tl.int32)
    return real, number, begin


@triton.jit
def inputs(
    x,
    initial,
    numbers,
    stride_t,
    s,
    wanted,
    number,
    begin,
    row,
    c,
    mask,
    channels,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Inputs at positions s (BT,) of the sequences `number` that begin at `begin`: (BT, BC) fp32, 0 where not `wanted`."""
    present = wanted & (s >= begin)
    if MARKS:
        mark = tl.load(numbers + s, mask=present, other=0)
        present = present & ((mark & 1) != 0) & ((mark >> 1) == number)
    offsets = s.to(tl.int64)[:, None] * stride_t + c[None, :]
    value = tl.load(x + offsets, mask=present[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = wanted & (s < begin)
        if MARKS:
            before = before & (number == 0)
        state = number.to(tl.int64) if VARLEN else row + number * 0
        place = (state[:, None] * channels + c[None, :]) * (W - 1) + (s - begin + (W - 1))[:, None]
        value += tl.load(initial + place, mask=before[:, None] & mask[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def load_taps(weight, stride_d, stride_w, c, mask, W: tl.constexpr):
    """The weights that meet the input j tokens back, j = 0, 1, …: W vectors (BC,) fp32."""
    taps = ()
    for j in tl.static_range(W):
        place = weight + c.to(tl.int64) * stride_d + (W - 1 - j) * stride_w
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
