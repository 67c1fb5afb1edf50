"""The experts' products in Triton, the first with the gather in front of it and the activation behind it in the same launch.

    a_r = act(W_g x_t(r)) (W_u x_t(r)),     y_r = W_d a_r

A program multiplies BM rows of one expert with BN rows of its matrix, for a gated activation of its gate and of its up matrix, so
that both factors of the product are at hand. How many tiles an expert has, the device alone knows: the grid is as large as it can
be at most, and a program finds its expert from the ends of the groups. Unlike torch's grouped product, which is faster where it is
of use, it needs the host in no dtype, so that it can be captured in a CUDA graph. In fp32 nothing is rounded to TF32.

Symbols: S rows, E experts, d model width, F expert width.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .sizes import ceil_div, power_of_2
from .triton_activation import act
from .triton_plan import Plan

__all__ = ["LARGE", "MOST_CAPTURED", "SMALL", "grouped_rows", "large_tiles_fit", "multiplies"]

# rows, columns and depth of a tile, warps and stages: for many rows in half precision the fastest of three on an H200
LARGE = (128, 128, 64, 8, 4)
# in fp32 a product is no business of tensor cores
SMALL = {2: (32, 64, 64, 4, 3), 4: (16, 32, 32, 4, 2)}
# bytes of shared memory that the stages of the large tile take
MEMORY = 200 << 10
# with fewer rows the large tiles are mostly empty
FEWEST_ROWS = 1024
# rows up to which products in fp32 and fp16 are captured in CUDA graphs; torch's are faster, but wait for the host
MOST_CAPTURED = 8192


@triton.jit
def _grouped_kernel(
    x,
    slot_of_row,
    ends,
    up,
    h,
    a,
    stride,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    KEEP: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a (S, F), and with KEEP also what the activation is of: h (S, F) or (S, 2 F). With GATHER x are tokens, else rows."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    pid = tl.program_id(0)
    e = tl.arange(0, BE)
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (end - begin + BM - 1) // BM
    tiles = tl.where(e < E, tiles, 0)
    last = tl.cumsum(tiles, 0) * COLUMNS
    expert = tl.sum((last <= pid).to(tl.int32), 0)
    if expert >= E:
        return
    is_mine = e == expert
    height = tl.sum(tl.where(is_mine, tiles, 0), 0)
    local = pid - tl.sum(tl.where(is_mine, last, 0), 0) + height * COLUMNS
    # neighbours share columns of the matrix, which are then read once
    first = tl.sum(tl.where(is_mine, begin, 0), 0) + (local % height) * BM
    limit = tl.sum(tl.where(is_mine, end, 0), 0)
    r = first + tl.arange(0, BM)
    o = (local // height) * BN + tl.arange(0, BN)
    if GATHER:
        token = tl.load(slot_of_row + r, mask=r < limit, other=0) // K
    else:
        token = tl.where(r < limit, r, 0)
    c = tl.arange(0, BK)
    x_tile = x + token.to(tl.int64)[:, None] * stride + c[None, :]
    column = tl.where(o < F, o, 0)
    up_tile = up + expert.to(tl.int64) * (WIDTH * D) + column[None, :] * D + c[:, None]
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            value = tl.load(x_tile + start)
            matrix = tl.load(up_tile + start)
        else:
            value = tl.load(x_tile + start, mask=(start + c < D)[None, :], other=0.0)
            matrix = tl.load(up_tile + start, mask=(start + c < D)[:, None], other=0.0)
        g = tl.dot(value, matrix, g, input_precision=PRECISION)
        if GATED:
            if D % BK == 0:
                matrix = tl.load(up_tile + F * D + start)
            else:
                matrix = tl.load(up_tile + F * D + start, mask=(start + c < D)[:, None], other=0.0)
            u = tl.dot(value, matrix, u, input_precision=PRECISION)
    mask = (r < limit)[:, None] & (o < F)[None, :]
    row = r.to(tl.int64)[:, None]
    if KEEP:
        tl.store(h + row * WIDTH + o[None, :], g.to(h.dtype.element_ty), mask=mask)
        g = g.to(h.dtype.element_ty).to(tl.float32)
        if GATED:
            tl.store(h + row * WIDTH + F + o[None, :], u.to(h.dtype.element_ty), mask=mask)
            u = u.to(h.dtype.element_ty).to(tl.float32)
    result = g
    if ACT != "none":
        result = act(g, ACT)
    if GATED:
        result *= u
    tl.store(a + row * F + o[None, :], result.to(a.dtype.element_ty), mask=mask)


def large_tiles_fit(x: Tensor, slots: int, up: Tensor) -> bool:
    """Whether the first product is faster here than between a gather and an activation: in half precision, with many rows."""
    if not x.is_cuda or up.dtype not in (torch.bfloat16, torch.float16) or slots < FEWEST_ROWS:
        return False
    return _shared_memory(x.device.index) >= MEMORY and up.shape[2] % 8 == 0 and up.is_contiguous()


@cache
def _shared_memory(index: int | None) -> int:
    return getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)


def multiplies(x: Tensor, slots: int, matrix: Tensor) -> bool:
    """Whether torch's grouped product would wait for the host, and few enough rows are multiplied here instead."""
    return x.is_cuda and matrix.dtype != torch.bfloat16 and slots <= MOST_CAPTURED


def grouped_rows(
    x: Tensor,
    plan: Plan,
    matrix: Tensor,
    activation: str = "none",
    gated: bool = False,
    keep: bool = False,
    gather: bool = False,
    tuning: tuple[int, ...] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Each row times the matrix of its expert, through an activation.

    Args:
        x: rows (S, d), or with `gather` tokens (N, d); taken in the dtype of `matrix`.
        matrix: (E, F, d), or gated (E, 2 F, d).
        keep: return what the activation is of.

    Returns:
        (S, F) or gated (S, 2 F) if it is to be kept, and (S, F). Rows of no group are left as they are.
    """
    x = x.to(matrix.dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    slots = plan.slot_of_row.numel()
    experts, width, channels = matrix.shape
    inner = width // 2 if gated else width
    rows, columns, depth, warps, stages = SMALL[matrix.element_size()] if tuning is None else tuning
    h = x.new_empty((slots, width)) if keep else None
    a = x.new_empty((slots, inner))
    tiles = ceil_div(slots, rows) + experts
    launch(
        _grouped_kernel,
        (tiles * ceil_div(inner, columns),),
        x,
        plan.slot_of_row,
        plan.ends,
        matrix.contiguous(),
        a if h is None else h,
        a,
        x.stride(0),
        K=slots // x.shape[0] if gather else 1,
        E=experts,
        D=channels,
        F=inner,
        BE=power_of_2(experts),
        BM=rows,
        BN=columns,
        BK=depth,
        ACT=activation,
        GATED=gated,
        KEEP=keep,
        GATHER=gather,
        PRECISION="ieee" if matrix.dtype == torch.float32 else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    return h, a
