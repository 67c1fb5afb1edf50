"""Sums over the partial results of programs, in a fixed order: the last step of a gradient that all programs add to."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

__all__ = ["sum_partials"]

# channels and partial sums of a program at a time
CHANNELS, PARTS = 32, 64


@triton.jit(do_not_specialize=["parts"])
def _sum_partials_kernel(
    partials,
    columns,
    last,
    parts,
    channels,
    K: tl.constexpr,
    SEPARATE: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """columns (D, K) from partials (parts, K, D); with SEPARATE the last of K goes to `last` (D,)."""
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0)
    column = pid // blocks
    c = (pid % blocks) * BC + tl.arange(0, BC)[None, :]
    part = tl.arange(0, BP)[:, None]
    is_channel = c < channels
    partials += column * channels + c
    total = tl.zeros((BP, BC), tl.float32)
    for first in range(0, parts, BP):
        p = first + part
        total += tl.load(partials + p.to(tl.int64) * (K * channels), mask=(p < parts) & is_channel, other=0.0)
    result = tl.sum(total, 0, keep_dims=True)
    if SEPARATE:
        is_last = column == K - 1
        # compared with 0, as the interpreter has integers here
        first_columns = (is_channel & (column < K - 1)) != 0
        tl.store(columns + c.to(tl.int64) * (K - 1) + column, result.to(columns.dtype.element_ty), mask=first_columns)
        tl.store(last + c, result.to(last.dtype.element_ty), mask=(is_channel & is_last) != 0)
    else:
        tl.store(columns + c.to(tl.int64) * K + column, result.to(columns.dtype.element_ty), mask=is_channel)


def sum_partials(partials: Tensor, columns: Tensor, last: Tensor | None = None) -> None:
    """Fill `columns` (D, K), and `last` (D,) with one more if given, by the sums over partials (parts, K or K + 1, D) fp32."""
    parts, k, channels = partials.shape
    launch(
        _sum_partials_kernel,
        (-(-channels // CHANNELS) * k,),
        partials,
        columns,
        columns if last is None else last,
        parts,
        channels,
        K=k,
        SEPARATE=last is not None,
        BC=CHANNELS,
        BP=PARTS,
        num_warps=4,
    )
