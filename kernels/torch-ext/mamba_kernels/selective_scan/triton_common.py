"""What the forward and the backward of the Triton selective scan share.

The sequence is cut in chunks. For a chunk from token s to token e, with a_t = exp(delta_t A) and h_t = a_t h_{t-1} + b_t::

    h_e = P h_{s-1} + local,    P = exp(A sum_{t=s..e} delta_t),    local = sum_t exp(A sum_{r=t+1..e} delta_r) b_t

One kernel of `triton_chain` makes P and `local` of every chunk, all chunks at once, and another chains them, so that every chunk
can then be scanned by itself. The gradient of the state obeys the same recurrence backwards in time.

Symbols: L length, D channels, N state size, G groups of B and C, K tokens of a tile, S chunks of a row; BD channels of a program.
A *slot* is a chunk in the order of memory: row * S + chunk. A program is one warp and works on BD channels of one slot. A tile is
(K, BD): every thread holds all tokens of its channels, so that a scan or a flip over tokens is plain register arithmetic. That
needs loads of one element a thread; `UNALIGNED` keeps Triton from choosing wider ones, which would move tiles between threads.
Strides between tokens are constants of the program, so that all rows of a tile are one address and offsets in the instructions; with
addresses of their own they took a sixth of all instructions and registers that more programs need. They depend on the model alone.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compiling import kernel

__all__ = [
    "LOG2_E",
    "TABLE_COLUMNS",
    "UNDERFLOW",
    "UNUSED",
    "Plan",
    "ScanInputs",
    "Tuning",
    "ceil_div",
    "channels_of",
    "chunk_bounds",
    "combine",
    "decay_of",
    "load_projection",
    "load_tile",
    "load_words",
    "row_of",
    "scalars_of",
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
    # contiguous or transposed
    "stride_A_n",
    "stride_A_d",
]
_OPERANDS = ("x", "dt", "z", "y", "B", "C", "inputs", "gates", "vector")
UNALIGNED = ["channels", "handed", *(f"stride_{name}_{axis}" for name in _OPERANDS for axis in "bdgn")]


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
def channels_of(block, channels, GROUPS: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    """Of a channel block: its group, its channels and which of them there are; with EVEN all are."""
    group_size = channels // GROUPS
    blocks = tl.cdiv(group_size, BD)
    group = block // blocks
    within = (block % blocks) * BD + tl.arange(0, BD)
    mask = within < group_size
    if EVEN:
        mask = tl.full((BD,), True, tl.int1)
    return group, (group * group_size + within).to(tl.int64), mask


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
def tokens_of_tile(flags, t, end, FLAGS: tl.constexpr, WHOLE: tl.constexpr):
    """For tokens `t` (K, 1): whether each is in the chunk, whether it is real too, and whether a sequence starts with it.

    With WHOLE all tiles are full.
    """
    within = t < end
    if WHOLE:
        within = tl.full(t.shape, True, tl.int1)
    real = within
    reset = t < 0
    if FLAGS:
        flag = tl.load(flags + t, mask=real, other=0).to(tl.int32)
        real = (flag & REAL) != 0
        reset = (flag & RESET) != 0
    return within, real, reset


@triton.jit
def load_tile(columns, first, k, stride, mask):
    """(K, BD) as it lies in memory, tokens first + k; zeros outside of `mask`. `columns` (BD,): where the channels start."""
    # in this order most of the address is the same for all threads, or for all tiles
    return tl.load((columns + wide(first) * stride)[None, :] + k.to(tl.int64) * stride, mask=mask, other=0.0)


@triton.jit
def steps_of_tile(dt, bias, real, SOFTPLUS: tl.constexpr):
    """delta of a tile; 0 where a token is not real, which keeps the state, as its decay is 1 then."""
    delta = dt.to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(real, delta, 0.0)


@triton.jit
def two_scalars(word, dtype: tl.constexpr):
    """The two 16-bit floats of 32-bit words."""
    if dtype == tl.bfloat16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def token_scalars(word, dtype: tl.constexpr):
    """The four 16-bit floats of 64-bit words."""
    return two_scalars(word.to(tl.int32), dtype) + two_scalars((word >> 32).to(tl.int32), dtype)


@triton.jit
def load_words(base, first, k, stride_t, stride_n, n, real, NP: tl.constexpr, PACKED: tl.constexpr):
    """B or C of the tokens first + k for NP states from n on, as they lie in memory; `base` is the row's and group's.

    NP tensors (K, 1), or with PACKED a 32-bit word for 2 of them and 64-bit words for 4 or more.
    """
    found = ()
    rows = (base + wide(first) * stride_t) + k.to(tl.int64) * stride_t
    if PACKED and NP == 2:
        found = (tl.load((rows + n).to(tl.pointer_type(tl.int32), bitcast=True), mask=real, other=0),)
    elif PACKED:
        words = (rows + n).to(tl.pointer_type(tl.int64), bitcast=True)
        for i in tl.static_range(NP // 4):
            found = found + (tl.load(words + i, mask=real, other=0),)
    else:
        for j in tl.static_range(NP):
            found = found + (tl.load(rows + wide(n + j) * stride_n, mask=real, other=0.0),)
    return found


@triton.jit
def scalars_of(words, NP: tl.constexpr, PACKED: tl.constexpr, dtype: tl.constexpr):
    """The NP tensors (K, 1), fp32, of what `load_words` found."""
    scalars = ()
    if PACKED and NP == 2:
        scalars = two_scalars(words[0], dtype)
    elif PACKED:
        for i in tl.static_range(NP // 4):
            scalars = scalars + token_scalars(words[i], dtype)
    else:
        for j in tl.static_range(NP):
            scalars = scalars + (words[j].to(tl.float32),)
    return scalars


@triton.jit
def load_projection(base, first, k, stride_t, stride_n, n, real, NP: tl.constexpr, PACKED: tl.constexpr):
    """`load_words` as numbers."""
    words = load_words(base, first, k, stride_t, stride_n, n, real, NP, PACKED)
    return scalars_of(words, NP, PACKED, base.dtype.element_ty)


@triton.jit
def decay_of(delta, A_n, reset, FLAGS: tl.constexpr):
    """exp(delta A), or 0 where a sequence starts; A_n is A / ln 2."""
    decay = tl.exp2(delta * A_n)
    if FLAGS:
        decay = tl.where(reset, 0.0, decay)
    return decay


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; `triton.cdiv` takes its time."""
    return -(-a // b)


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


class Tuning(NamedTuple):
    """How a pass over the sequence is laid out."""

    channels: int  # BD, channels of a program
    tile: int  # K, tokens loaded at a time
    registers: int = 0  # most of a thread, 0 for no limit; only NVIDIA's compiler takes one

    def options(self) -> dict[str, int]:
        """Launch options: programs are single warps, and loads are scheduled by hand."""
        options = {"num_warps": 1, "num_stages": 1}
        if self.registers and torch.version.cuda is not None:
            options["maxnreg"] = self.registers
        return options


class ScanInputs(NamedTuple):
    """The operands of a scan, and what was derived from its packing."""

    x: Tensor  # (B, L, D)
    dt: Tensor  # (B, L, D)
    A_t: Tensor  # (N, D), a transposed view or contiguous
    B: Tensor  # (B, L, N) or (B, L, G, N)
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None  # (S, D, N), contiguous
    flags: Tensor | None  # (B, L) int8, with seq_idx: bits RESET and REAL
    cu_seqlens: Tensor | None
    dt_softplus: bool


class Plan(NamedTuple):
    """Sizes of a scan and how its time is cut."""

    batch: int
    length: int
    channels: int
    size: int  # N
    groups: int
    chunk: int
    n_chunks: int  # of a row
    n_slots: int
    split: bool  # whether the forward scans chunks by themselves, too
    wavefront: bool  # or, where no states are to be saved, whole sequences with several warps each
    whole: bool  # whether chunks are whole tiles
    packed: bool  # whether B and C can be read four numbers at a time
