"""Linear layers on a few rows, as in decoding, where reading the weight once is all the work there is.

Symbols: B batch, L length, d inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mamba_kernels import fused_linear
from mamba_kernels.dispatch import MOST_ROWS, select

from .linear import is_plain_linear

__all__ = ["MAX_ROWS", "parts_of", "product_in_parts", "project", "splits"]

# parts of the weight; divides the widths of the published models and their padded vocabularies
PARTS = 8
# beyond these a single product is as fast (docs/performance.md)
MAX_ROWS, MIN_ELEMENTS = 32, 2**17


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)` for x (B, L, d), faster without gradients where x has few rows.

    On a GPU our kernel reads the weight at the speed of its memory. On a CPU, MKL multiplies one row with a matrix on one thread, which reads the weight at half the speed of the memory. A batch of
    products with parts of the weight uses all threads, and forms the same sums.
    """
    # a reentrant checkpoint runs without gradients first, and has to find the same values with them
    if linear.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear(x)
    if not is_plain_linear(linear):
        return linear(x)
    plain: Any = linear
    weight, bias = plain.weight, plain.bias
    batch, length, in_features = x.shape
    rows = batch * length
    if x.device.type != "cpu":
        # a quantised or distributed weight is of another type
        known = type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device
        if not known or not 0 < rows <= MOST_ROWS or torch.is_autocast_enabled(x.device.type):
            return linear(x)
        if select("fused_linear", x.device) != "triton":
            return linear(x)
        return fused_linear(x.reshape(rows, in_features), weight, bias=bias).view(batch, length, -1)
    if not 0 < rows <= MAX_ROWS or not splits(weight, x):
        return linear(x)
    out = product_in_parts(x.reshape(rows, in_features), parts_of(weight)).view(batch, length, -1)
    return out if bias is None else out + bias


def parts_of(weight: Tensor) -> Tensor:
    """`weight` (O, K) as (PARTS, K, O / PARTS), a view."""
    return weight.view(PARTS, -1, weight.shape[1]).mT


def product_in_parts(x: Tensor, parts: Tensor) -> Tensor:
    """x (B, K) times a weight out of `parts_of`, (B, O)."""
    rows = len(x)
    out = torch.bmm(x.expand(PARTS, *x.shape), parts)
    return out.view(1, -1) if rows == 1 else out.transpose(0, 1).reshape(rows, -1)


def splits(weight: Any, x: Tensor) -> bool:
    """Whether the product with `weight` (out, in) may and should be made in parts."""
    return (
        # a quantised or distributed weight is of another type
        type(weight) is nn.Parameter
        and weight.numel() >= MIN_ELEMENTS
        and weight.shape[0] % PARTS == 0
        and weight.shape[1] == x.shape[-1]
        and weight.dtype == x.dtype == torch.float32
        and weight.device == x.device
        and weight.is_contiguous()
        and torch.backends.mkl.is_available()
        # autocast keeps its copies of weights, but not of their parts
        and not torch.is_autocast_enabled("cpu")
    )
