"""The product of a weight with 2 to 8 rows on tensor cores: every value of the weight and of x is read once by a program.

    y_bo = residual_bo + bias_o + sum_k W_ok x_bk

The weight stands on the left of `tl.dot`, so that its many outputs fill the 16 rows that a tensor core takes; the rows of x are
padded to BR columns. A program reads BO rows of the weight, BK columns at a time, with the next tiles on their way. Sums are in
fp32 and in a fixed order. It never starts early (`early`): programs of the next launch would take the shared memory of those that
still wait for their own, which makes a step of 3 to 8 rows up to a fifth slower (docs/performance.md).

Symbols: B rows of x, K inputs, O outputs.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_SKINNY_ROWS", "beats_the_library", "multiplies", "skinny_linear"]


class Tuning(NamedTuple):
    """Rows and columns of the weight that a program reads at a time, tiles in flight, and its warps."""

    outputs: int
    inputs: int
    stages: int
    warps: int


# of seven on an H100 in bf16 with 2 to 8 rows, the fastest or within 5 % of it for many outputs, 9 % for few. With 4 rows: in_proj
# of mamba-370m (4,096 outputs) 6.67 µs and with the other tuning 7.62, out_proj of mamba-130m (768 outputs) 4.87 and 4.45
MANY_OUTPUTS, FEW_OUTPUTS = Tuning(16, 128, 6, 2), Tuning(16, 256, 4, 4)
FEWEST_MANY = 2048
# rows to which x is padded, 16 as it was measured
PADDED_ROWS = 16
MOST_SKINNY_ROWS = 8
# for tests under the interpreter, whose cases are in fp32, to replace; on a GPU fp32 would be rounded to TF32
DTYPES = (torch.float16, torch.bfloat16)
# with fewer outputs only some multiprocessors read, about 20 bytes a ns each: with more inputs than this, torch, which
# shares out the inputs as well, is expected to be ahead (x_proj of mamba-2.8b; inferred from the smaller shapes)
FEWEST_OUTPUTS, MOST_INPUTS = 512, 2048


@triton.jit
def _skinny_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    rows,
    outputs,
    stride_x,
    stride_residual,
    K: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """y (B, O), contiguous."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    is_output = o < outputs
    b = tl.arange(0, BR)
    is_row = b < rows
    k = tl.arange(0, BK)
    tile = weight + o[:, None].to(tl.int64) * K + k[None, :]
    inputs = x + b[:, None].to(tl.int64) * stride_x + k[None, :]
    sums = tl.zeros((BO, BR), tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        weight_mask = is_output[:, None]
        x_mask = is_row[:, None]
        if K % BK != 0:
            inside = start + k < K
            weight_mask = weight_mask & inside[None, :]
            x_mask = x_mask & inside[None, :]
        values = tl.load(tile + start, mask=weight_mask, other=0.0, eviction_policy="evict_first")
        v = tl.load(inputs + start, mask=x_mask, other=0.0).to(values.dtype)
        sums = tl.dot(values, tl.trans(v), sums)
    mask = is_output[:, None] & is_row[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=is_output, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        added = residual + b[None, :].to(tl.int64) * stride_residual + o[:, None]
        sums += tl.load(added, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + b[None, :] * outputs + o[:, None], sums.to(y.dtype.element_ty), mask=mask)


def multiplies(weight: Tensor) -> bool:
    """Whether the kernel is for weights of this dtype on this device: 16 bits, on tensor cores that take bf16."""
    return weight.dtype in DTYPES and _is_known(weight.device.type, weight.device.index)


# a constant to torch.compile, which cannot look into it
@torch.compiler.assume_constant_result
def _is_known(device_type: str, index: int | None) -> bool:
    return _knows(device_type, index)


@cache
def _knows(device_type: str, index: int | None) -> bool:
    if device_type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(index) >= (8, 0)
    return device_type == "cpu"


def beats_the_library(rows: int, weight: Tensor) -> bool:
    """Whether the product of so many rows with `weight` (O, K) is faster here than in torch."""
    outputs, inputs = weight.shape
    shared_out = outputs >= FEWEST_OUTPUTS or inputs <= MOST_INPUTS
    return 2 <= rows <= MOST_SKINNY_ROWS and shared_out and multiplies(weight)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`residual + weight @ x + bias`, (B, O) in the wider dtype of weight and residual.

    Args:
        x: (B, K), at most `MOST_SKINNY_ROWS` rows, contiguous in the last dimension; rounded to the weight's dtype.
        weight: (O, K) in a dtype that `multiplies` takes.
        bias: (O,), or None.
        residual: (B, O), or None.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    tuning = MANY_OUTPUTS if outputs >= FEWEST_MANY else FEW_OUTPUTS
    added = x if residual is None else residual if residual.stride(1) == 1 else residual.contiguous()
    dtype = weight.dtype if residual is None else torch.promote_types(residual.dtype, weight.dtype)
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    _skinny_kernel[(triton.cdiv(outputs, tuning.outputs),)](
        x,
        weight.contiguous(),
        x if bias is None else bias,
        added,
        y,
        rows,
        outputs,
        x.stride(0),
        added.stride(0),
        K=inputs,
        BO=tuning.outputs,
        BK=tuning.inputs,
        BR=PADDED_ROWS,
        STAGES=tuning.stages,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        num_warps=tuning.warps,
    )
    return y
