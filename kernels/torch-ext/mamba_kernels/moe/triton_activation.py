"""The experts' activation, gated or not, with its bias, on rows in the order of the experts, in Triton.

    a = act(g + b_g) (u + b_u)   or   act(u + b_u)

Symbols: S rows, F expert width, E experts; of gated experts the gate's F columns come first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .sizes import ceil_div, power_of_2
from .triton_plan import Plan

__all__ = ["activate", "activation_gradient", "sum_of_groups"]

# columns of a program, and rows that it takes of them
COLUMNS, ROWS = 1024, 4


@triton.jit
def act(x, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x, ACT: tl.constexpr):
    """The derivative of `act`."""
    if ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    else:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _activate_kernel(
    h,
    bias,
    slot_of_row,
    indices,
    gradient,
    result,
    rows,
    F: tl.constexpr,
    E: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """a (S, F) from h (S, F) or (S, 2 F); or backward, the gradient of h from that of a."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (r < rows)[:, None] & (c < F)[None, :]
    narrow = r.to(tl.int64)[:, None] * F + c[None, :]
    wide = r.to(tl.int64)[:, None] * WIDTH + c[None, :]
    g = tl.load(h + wide, mask=mask, other=0.0).to(tl.float32)
    bias_at = c[None, :]
    if HAS_BIAS:
        slot = tl.load(slot_of_row + r, mask=r < rows, other=0)
        expert = tl.load(indices + slot, mask=r < rows, other=0).to(tl.int32)
        # rows of no group are not read by anybody
        expert = tl.where((expert < 0) | (expert >= E), 0, expert)
        bias_at = expert[:, None] * WIDTH + c[None, :]
        g += tl.load(bias + bias_at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(h + wide + F, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += tl.load(bias + bias_at + F, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            d = tl.load(gradient + narrow, mask=mask, other=0.0).to(tl.float32)
            tl.store(result + wide, (d * u * _slope(g, ACT)).to(result.dtype.element_ty), mask=mask)
            tl.store(result + wide + F, (d * act(g, ACT)).to(result.dtype.element_ty), mask=mask)
        else:
            tl.store(result + narrow, (act(g, ACT) * u).to(result.dtype.element_ty), mask=mask)
    elif BACKWARD:
        d = tl.load(gradient + narrow, mask=mask, other=0.0).to(tl.float32)
        tl.store(result + narrow, (d * _slope(g, ACT)).to(result.dtype.element_ty), mask=mask)
    else:
        tl.store(result + narrow, act(g, ACT).to(result.dtype.element_ty), mask=mask)


def _launch(
    h: Tensor, bias: Tensor | None, plan: Plan, activation: str, gated: bool, gradient: Tensor | None
) -> Tensor:
    rows, width = h.shape
    inner = width // 2 if gated else width
    result = torch.empty_like(h) if gradient is not None else h.new_empty((rows, inner))
    columns = min(COLUMNS, power_of_2(inner))
    launch(
        _activate_kernel,
        (ceil_div(rows, ROWS), ceil_div(inner, columns)),
        h,
        h if bias is None else bias,
        plan.slot_of_row,
        plan.indices,
        h if gradient is None else gradient,
        result,
        rows,
        F=inner,
        E=plan.ends.numel(),
        BR=ROWS,
        BC=columns,
        ACT=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        BACKWARD=gradient is not None,
        num_warps=8,
    )
    return result


def activate(h: Tensor, bias: Tensor | None, plan: Plan, activation: str, gated: bool) -> Tensor:
    """a (S, F) from h (S, F), or gated (S, 2 F), and the bias (E, F) or (E, 2 F) of each row's expert."""
    return _launch(h, bias, plan, activation, gated, None)


def activation_gradient(
    h: Tensor, bias: Tensor | None, plan: Plan, activation: str, gated: bool, gradient: Tensor
) -> Tensor:
    """The gradient of h from that of a (S, F)."""
    return _launch(h, bias, plan, activation, gated, gradient)


@triton.jit
def _sum_of_groups_kernel(rows, ends, sums, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    expert = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(first, last, BR):
        r = start + tl.arange(0, BR)
        mask = (r < last)[:, None] & (c < C)[None, :]
        total += tl.load(rows + r.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + expert * C + c, tl.sum(total, 0).to(sums.dtype.element_ty), mask=c < C)


def sum_of_groups(rows: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """The sums (E, C) of each expert's rows (S, C): the gradient of a bias. The order of addition is fixed."""
    experts, columns = plan.ends.numel(), rows.shape[1]
    sums = rows.new_empty((experts, columns), dtype=dtype)
    block = min(64, power_of_2(columns))
    launch(
        _sum_of_groups_kernel,
        (experts, ceil_div(columns, block)),
        rows,
        plan.ends,
        sums,
        C=columns,
        BR=32,
        BC=block,
    )
    return sums
