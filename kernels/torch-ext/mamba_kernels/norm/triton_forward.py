"""The RMS norms in Triton (Zhang and Sennrich, arXiv 1910.07467; the gated one: Mamba-2, arXiv 2405.21060, section 7.1).

With v = x, x + residual or x silu(z), over groups of W channels::

    n = v / sqrt(mean(v^2) + eps)        y = n weight, or n weight silu(z)
    dv = (dn - n mean(dn n)) / sqrt(mean(v^2) + eps)

A row of one group is held in registers up to `LARGEST_BLOCK` channels and read twice, in blocks, beyond. Backward recomputes
from the inputs, both of its sums in one pass over the row. Its programs walk through rows in a fixed order and each leaves one
partial sum of dweight, so that the result is the same bits every time.

Symbols: R rows (all leading dimensions together), W channels of a group, D = groups W channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

__all__ = ["Tuning", "as_rows", "contiguous_like", "load", "norm_forward", "scaled", "tile_of"]


class Tuning(NamedTuple):
    """How rows are laid out over programs."""

    tile: int  # elements of a program, several rows where they are short
    per_warp: int  # elements of a warp
    loop_block: int = 4096  # elements at a time of a row that does not fit
    loop_warps: int = 8


FORWARD = Tuning(tile=1024, per_warp=1024)
# longer rows are read twice
LARGEST_BLOCK = 8192


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_operands(x, extra, mask, total_dtype: tl.constexpr, EXTRA: tl.constexpr):
    """What is normalised, and the gate that scales the result (1 where there is none)."""
    value = load(x, mask)
    gate = 1.0
    if EXTRA == "residual":
        value += load(extra, mask)
    elif EXTRA != "nothing":
        z = load(extra, mask)
        if EXTRA == "gate first":
            value *= z * tl.sigmoid(z)
        else:
            gate = z * tl.sigmoid(z)
    # the norm is that of the sum as it is returned
    return value.to(total_dtype).to(tl.float32), gate


@triton.jit
def scaled(normed, gate, scale, dtype: tl.constexpr, EXTRA: tl.constexpr):
    """The output, from the normalised value, the gate and the weight."""
    if EXTRA == "gate last":
        normed *= gate
    else:
        normed = normed.to(dtype).to(tl.float32)
    return (normed * scale).to(dtype)


@triton.jit
def _store_normed(y, normed, gate, weight, mask, channel_mask, EXTRA: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    scale = 1.0
    if HAS_WEIGHT:
        scale = load(weight, channel_mask)
    tl.store(y, scaled(normed, gate, scale, y.dtype.element_ty, EXTRA), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    x,
    extra,
    weight,
    y,
    total,
    rows,
    stride_x_r,
    stride_x_d,
    stride_extra_r,
    stride_extra_d,
    eps,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXTRA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    EIGHTHS: tl.constexpr,
):
    """y and, with HAS_TOTAL, the sum that was normalised; both contiguous."""
    # inductor passes a float of Python as fp64, which everything after it would become too
    eps = tl.cast(eps, tl.float32)
    if EIGHTHS:
        # Triton knows of 16: with z as a part of a projection, rows often start at multiples of 8, enough for loads of 16 bytes
        stride_extra_r = stride_extra_r // 8 * 8
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // GROUPS) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (pid % GROUPS) * W
    column = tl.arange(0, BLOCK)[None, :]
    total_dtype: tl.constexpr = total.dtype.element_ty if HAS_TOTAL else tl.float32
    x += row * stride_x_r + first * stride_x_d
    extra += row * stride_extra_r + first * stride_extra_d
    weight += first
    y += row * (GROUPS * W) + first
    total += row * (GROUPS * W) + first
    real = row < rows
    if BLOCK >= W:
        mask = real & (column < W)
        d = column.to(tl.int64)
        value, gate = _forward_operands(x + d * stride_x_d, extra + d * stride_extra_d, mask, total_dtype, EXTRA)
        if HAS_TOTAL:
            tl.store(total + column, value.to(total_dtype), mask=mask)
        inverse = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / W + eps)
        _store_normed(y + column, value * inverse, gate, weight + column, mask, column < W, EXTRA, HAS_WEIGHT)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, W, BLOCK):
            c = start + column
            mask = real & (c < W)
            d = c.to(tl.int64)
            value, gate = _forward_operands(x + d * stride_x_d, extra + d * stride_extra_d, mask, total_dtype, EXTRA)
            if HAS_TOTAL:
                tl.store(total + c, value.to(total_dtype), mask=mask)
            squares += value * value
        inverse = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / W + eps)
        for start in range(0, W, BLOCK):
            c = start + column
            mask = real & (c < W)
            d = c.to(tl.int64)
            value, gate = _forward_operands(x + d * stride_x_d, extra + d * stride_extra_d, mask, total_dtype, EXTRA)
            _store_normed(y + c, value * inverse, gate, weight + c, mask, c < W, EXTRA, HAS_WEIGHT)


def tile_of(width: int, tuning: Tuning) -> tuple[int, int, int]:
    """Channels and rows of a program, and its warps, for groups of `width` channels."""
    block = 1 << (width - 1).bit_length()
    if block > LARGEST_BLOCK:
        return tuning.loop_block, 1, tuning.loop_warps
    rows = max(1, tuning.tile // block)
    return block, rows, max(1, block * rows // tuning.per_warp)


def as_rows(value: Tensor) -> tuple[Tensor, int, int]:
    """`value` in a layout of rows, with the strides of rows and channels; a copy only where no view has one row stride."""
    if value.is_contiguous():
        return value, value.shape[-1], 1
    value = value.reshape(-1, value.shape[-1])
    return value, value.stride(0), value.stride(1)


def contiguous_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """New memory of the shape of `x`; a third of the host time of `torch.empty` with its shape and device."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def norm_forward(
    x: Tensor,
    extra: Tensor | None,
    weight: Tensor | None,
    eps: float,
    width: int,
    extra_is: str,
    total_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and the sum in `total_dtype` (x where None)."""
    channels = x.shape[-1]
    y = contiguous_like(x, x.dtype)
    total = x if total_dtype is None else contiguous_like(x, total_dtype)
    block, rows, warps = tile_of(width, FORWARD)
    x, stride_r, stride_d = as_rows(x)
    extra, stride_extra_r, stride_extra_d = (x, 0, 0) if extra is None else as_rows(extra)
    count, groups = y.numel() // channels, channels // width
    launch(
        _rms_norm_fwd_kernel,
        (-(-count // rows) * groups,),
        x,
        extra,
        x if weight is None else weight.contiguous(),
        y,
        total,
        count,
        stride_r,
        stride_d,
        stride_extra_r,
        stride_extra_d,
        eps,
        W=width,
        GROUPS=groups,
        BLOCK=block,
        ROWS=rows,
        EXTRA=extra_is,
        HAS_WEIGHT=weight is not None,
        HAS_TOTAL=total_dtype is not None,
        EIGHTHS=stride_extra_r % 8 == 0,
        num_warps=warps,
    )
    return y, total
