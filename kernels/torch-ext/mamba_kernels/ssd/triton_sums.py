"""Sums over blocks and over programs that end the backward of the SSD scan, in one launch and in a fixed order."""

import torch
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import ssd_kernel
from .triton_plan import ceil_div

__all__ = ["launch_sums"]

# elements of a program: with many rows to add up it takes a column for each thread of a warp, with few rows many
ROWS, COLUMNS, ELEMENTS = 64, 32, 1024


@ssd_kernel
def _ssd_bwd_sums_kernel(
    sums,
    parts,
    projections,
    totals,
    n_blocks,
    n_totals,
    n_parts,
    n_elements,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """totals (n_totals,) from sums (n_blocks, n_totals), and projections (n_elements,) from parts (n_parts, n_elements)."""
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.cdiv(n_totals, COLUMNS)
    if pid < programs:
        column = pid * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.arange(0, ROWS)
        partial = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, n_blocks, ROWS):
            block = (first + row).to(tl.int64)
            mask = (block < n_blocks)[:, None] & (column < n_totals)[None, :]
            partial += tl.load(sums + block[:, None] * n_totals + column[None, :], mask=mask, other=0.0)
        tl.store(totals + column, tl.sum(partial, 0), mask=column < n_totals)
    else:
        element = (pid - programs) * ELEMENTS + tl.arange(0, ELEMENTS)
        mask = element < n_elements
        total = tl.zeros((ELEMENTS,), tl.float32)
        for part in range(0, n_parts):
            offset = (part + tl.full((), 0, tl.int64)) * n_elements
            total += tl.load(parts + offset + element, mask=mask, other=0.0)
        tl.store(projections + element, total, mask=mask)


def launch_sums(sums: Tensor, parts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sums (blocks, …) over blocks, fp32; parts (parts, …) over parts, in `dtype` or as they are if there is one."""
    totals = torch.empty(sums.shape[1:], dtype=torch.float32, device=sums.device)
    single = parts.shape[0] == 1
    projections = parts[0] if single else torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    n_totals, n_elements = totals.numel(), 0 if single else projections.numel()
    launch(
        _ssd_bwd_sums_kernel,
        (ceil_div(n_totals, COLUMNS) + ceil_div(n_elements, ELEMENTS),),
        sums,
        parts,
        # nothing is stored there if there is one part; for the tracer it is written, and what it takes last counts
        totals if single else projections,
        totals,
        sums.shape[0],
        n_totals,
        parts.shape[0],
        n_elements,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        ELEMENTS=ELEMENTS,
        num_warps=4,
    )
    return totals, projections
