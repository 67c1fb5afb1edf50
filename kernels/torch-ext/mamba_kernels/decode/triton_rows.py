"""`fused_linear` on more rows than one launch is fast for: a norm in one launch, then a product, ours (`triton_skinny`) or torch's.

The norm (Zhang and Sennrich, arXiv 1910.07467, or Mamba-2's gated one over groups, arXiv 2405.21060, section 7.1) reads the residual
stream in its dtype and writes that of the weight, so that no cast is a launch of its own; the residual is added by the product.
A launch of the norm that starts early (`early`) reads its weight while the kernel in front of it is at work.

Symbols: B rows, K inputs, O outputs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..early import launches_early
from .triton_skinny import beats_the_library, skinny_linear

__all__ = ["linear_of_many_rows"]

# elements of a warp
WARP_TILE = 512


@triton.jit
def _norm_rows_kernel(
    x,
    z,
    weight,
    y,
    stride_x,
    stride_z,
    eps,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    HAS_Z: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y (B, K), contiguous; a program normalises one group of one row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    groups: tl.constexpr = K // GROUP
    row = (tl.program_id(0) // groups).to(tl.int64)
    i = tl.arange(0, BK)
    inside = i < GROUP
    k = (tl.program_id(0) % groups) * GROUP + i
    scale = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_Z:
        gate = tl.load(z + row * stride_z + k, mask=inside, other=0.0).to(tl.float32)
        value *= gate * tl.sigmoid(gate)
    value *= tl.rsqrt(tl.sum(value * value, 0) / GROUP + eps) * scale
    tl.store(y + row * K + k, value.to(y.dtype.element_ty), mask=inside)


def linear_of_many_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    z: Tensor | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear`; arguments as there, assumed to be checked, contiguous in the last dimension and not empty."""
    rows, inputs = x.shape
    if norm_weight is not None:
        group = inputs if group_size is None else group_size
        block = triton.next_power_of_2(group)
        normed = torch.empty(rows, inputs, dtype=weight.dtype, device=x.device)
        early = launches_early(x)
        _norm_rows_kernel[(rows * (inputs // group),)](
            x,
            x if z is None else z,
            norm_weight,
            normed,
            x.stride(0),
            0 if z is None else z.stride(0),
            eps,
            K=inputs,
            GROUP=group,
            BK=block,
            HAS_Z=z is not None,
            EARLY=early,
            num_warps=min(8, max(1, block // WARP_TILE)),
            **({"launch_pdl": True} if early else {}),
        )
        x = normed
    if beats_the_library(rows, weight):
        return skinny_linear(x, weight, bias, residual)
    x = x.to(weight.dtype)
    if residual is None:
        return F.linear(x, weight, bias)
    if bias is None and residual.is_contiguous() and _adds_wider(residual.dtype, weight.dtype, x.device):
        if residual.dtype == weight.dtype:
            return torch.addmm(residual, x, weight.t())
        return torch.addmm(residual, x, weight.t(), out_dtype=residual.dtype)
    return residual + F.linear(x, weight, bias)


@cache
def _adds_wider(residual: torch.dtype, weight: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a residual of this dtype within a product of matrices of the other one."""
    if residual == weight:
        return True
    if residual != torch.float32 or device.type != "cuda":
        return False
    try:
        one = torch.ones(8, 8, dtype=weight, device=device)
        torch.addmm(torch.ones(8, 8, device=device), one, one, out_dtype=residual)
    except (RuntimeError, TypeError, NotImplementedError):
        # before torch 2.9, and where cuBLAS has no such product
        return False
    return True
