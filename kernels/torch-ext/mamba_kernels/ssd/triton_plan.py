"""How a Triton SSD scan is cut: blocks, segments, programs; and the sizes and options that all its kernels take."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..packing import remembered
from ..selective_scan.triton_chain import chunk_table

__all__ = [
    "Operands",
    "Places",
    "Plan",
    "Tuning",
    "ceil_div",
    "has_room",
    "plan_of",
    "power_of_two",
    "segment_table",
    "strides_of",
]

# enough programs to give each multiprocessor of a large GPU two of them
TARGET_PROGRAMS = 264
# most channels of a program; the operands of fp32 products take more registers
LARGEST_CHANNELS, LARGEST_CHANNELS_FP32 = 64, 32
# tokens of the shortest segment, and of the shortest sequence worth a second launch and a second pass over its inputs
SHORTEST_SEGMENT, SHORTEST_SPLIT = 128, 512
# most heads, or else most elements of the states of all blocks, whose states are kept in fp32 for backward
FEW_HEADS, FEW_ELEMENTS = 8, 1 << 25


class Tuning(NamedTuple):
    """Launch options of a kernel."""

    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Operands(NamedTuple):
    """The operands of a scan; innermost strides are 1, small vectors are contiguous."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    A: Tensor  # (H,)
    B: Tensor  # (B, L, G, N)
    C: Tensor
    D: Tensor | None  # (H,) or (H, P)
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None  # (S, H, P, N)
    # (B, L) int32 with seq_idx: 2 * number of the sequence in its row + whether the token is real
    marks: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float] | None


class Places(NamedTuple):
    """Where gradients are to be written: slices of wider rows, in the dtypes of the operands. dx, dB and dC share their rows."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    B: Tensor  # (B, L, G, N)
    C: Tensor
    # elements of a row; strides do not say where there is one token
    row: int
    row_of_dt: int

    def projections(self) -> Tensor:
        """B and C as one view (2, B, L, G, N)."""
        offset = self.B.storage_offset()
        batch, length, groups, size = self.B.shape
        strides = (self.C.storage_offset() - offset, length * self.row, self.row, size, 1)
        return self.B.as_strided((2, batch, length, groups, size), strides, offset)


class Plan(NamedTuple):
    """Sizes of a scan and how it is cut."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    size: int
    block: int  # Q
    n_blocks: int  # of a row; of everything with cu_seqlens
    segment: int  # tokens
    n_segments: int  # of a row; of everything with cu_seqlens
    n_states: int
    split: bool  # whether sequences are cut into segments
    channels: int  # PB
    channel_blocks: int
    dtype: torch.dtype  # of the operands of matrix products
    rest: int  # what of 16-bit rounding backward makes good: 0 nothing, 1 that of the gradient of y, 2 that of the states too

    @property
    def n_slots(self) -> int:
        """Segments in all."""
        return self.n_segments * self.batch

    @property
    def states_dtype(self) -> torch.dtype:
        """Of the states and their gradients that backward keeps for all blocks."""
        return torch.float32 if self.rest == 2 else self.dtype

    def meta(self, operands: Operands) -> dict[str, Any]:
        """Compile-time arguments that all kernels take."""
        return {
            "H": self.heads,
            "P": self.head_dim,
            "G": self.groups,
            "N": self.size,
            "NB": max(16, power_of_two(self.size)),
            "PB": self.channels,
            "Q": self.block,
            "HAS_Z": operands.z is not None,
            "HAS_BIAS": operands.dt_bias is not None,
            "SOFTPLUS": operands.dt_softplus,
            "CLAMP": operands.dt_limit is not None,
            "MARKS": operands.marks is not None,
            "VARLEN": operands.cu_seqlens is not None,
            "PRECISION": precision_of(self.dtype),
            "DTYPE": _TRITON_DTYPES[self.dtype],
            "EXACT": self.dtype == torch.float32,
            "REST": self.rest,
        }


# a constant to torch.compile, which cannot look into it
@torch.compiler.assume_constant_result
def has_room(device_type: str, index: int | None) -> bool:
    """Whether a program may take 160 KB of shared memory, as on an A100 or H100; most GPUs give it 99 KB."""
    return _has_room(device_type, index)


@cache
def _has_room(device_type: str, index: int | None) -> bool:
    if device_type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0) > 160_000


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes 5 µs outside of a kernel."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two from `n` ≥ 1 on."""
    return 1 << (n - 1).bit_length()


def precision_of(dtype: torch.dtype) -> str:
    """How matrix products of `dtype` are computed. fp32 takes three TF32 products, which lose nothing against fp32."""
    if dtype != torch.float32 or torch.version.cuda is None:
        return "ieee"
    return "tf32x3"


def block_of(dtype: torch.dtype, size: int) -> int:
    """Q: as many tokens as leave room for the operands of a block in shared memory."""
    return 32 if size > 128 or dtype == torch.float32 else 64


def plan_of(operands: Operands) -> Plan:
    """How a scan of these operands is cut; the same for forward and backward."""
    batch, length, heads, head_dim = operands.x.shape
    groups, size = operands.B.shape[2:]
    same = operands.x.dtype == operands.B.dtype == operands.C.dtype
    dtype = operands.x.dtype if same else torch.float32
    block = block_of(dtype, size)
    # a program keeps (channels, states) in registers
    largest = LARGEST_CHANNELS_FP32 if dtype == torch.float32 else LARGEST_CHANNELS
    channels = min(largest // 2 if size > 128 else largest, max(16, power_of_two(head_dim)))
    channel_blocks = ceil_div(head_dim, channels)
    sequences = batch if operands.cu_seqlens is None else operands.cu_seqlens.shape[0] - 1
    pieces = TARGET_PROGRAMS // max(1, sequences * heads * channel_blocks)
    longest = length if operands.cu_seqlens is None else length // sequences
    pieces = min(pieces, longest // SHORTEST_SEGMENT) if longest >= SHORTEST_SPLIT else 1
    split = pieces > 1
    segment = ceil_div(ceil_div(length, pieces), block) * block if split else ceil_div(length, block) * block
    if operands.cu_seqlens is None:
        n_blocks, n_segments = ceil_div(length, block), ceil_div(length, segment)
    else:
        # slots of a packed row as `chunk_table` numbers them
        if split:
            segment = ceil_div(ceil_div(longest, pieces), block) * block
        n_blocks, n_segments = length // block + sequences, length // segment + sequences
    elements = n_blocks * (batch if operands.cu_seqlens is None else 1) * heads * head_dim * size
    return Plan(
        batch=batch,
        length=length,
        heads=heads,
        head_dim=head_dim,
        groups=groups,
        size=size,
        block=block,
        n_blocks=n_blocks,
        segment=segment,
        n_segments=n_segments,
        n_states=sequences,
        split=split,
        channels=channels,
        channel_blocks=channel_blocks,
        dtype=dtype,
        rest=0 if dtype == torch.float32 else 2 if heads <= FEW_HEADS or elements <= FEW_ELEMENTS else 1,
    )


def segment_table(operands: Operands, plan: Plan, tokens: int) -> Tensor | None:
    """Where packed sequences are cut, in pieces of `tokens`; see `chunk_table`."""
    bounds = operands.cu_seqlens
    if bounds is None:
        return None
    return remembered(bounds, f"ssd_table {plan.length} {tokens}", lambda: chunk_table(bounds, plan.length, tokens))


def strides_of(operands: Operands, grad_y: Tensor) -> tuple[int, ...]:
    """Strides of x, grad_y, z, dt, B and C that backward kernels take."""
    z = operands.z
    return (
        *operands.x.stride()[:3],
        *grad_y.stride()[:3],
        *((0, 0, 0) if z is None else z.stride()[:3]),
        *operands.dt.stride(),
        *operands.B.stride()[:3],
        *operands.C.stride()[:3],
    )
