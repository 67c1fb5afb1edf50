"""Rows of tokens in the order of their experts, and back, in Triton and without a word from the host.

A counting sort in two launches, stable, with the same result every time: each program counts the slots of its block by
expert; then each finds where its slots go from all counts, which are few. A slot is one choice of one token, slot s = n k + j;
a row is its place in the order of the experts. Slots of experts that do not exist (transformers marks so what another
device computes) come last and belong to no group.

Symbols: N tokens, k experts per token, S slots = N k, E experts, D channels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .sizes import ceil_div, power_of_2

__all__ = ["Plan", "combine", "gather", "make_plan", "spread"]

# slots of a program that counts or places; with experts it spans a tile of one-hot rows
TILE = 8192
# channels that a program moves at a time, and tokens whose rows it moves
CHANNELS, MOVED = 1024, 4


class Plan(NamedTuple):
    """Where the slots of N tokens go.

    Attributes:
        row_of_slot: (S,) int32.
        slot_of_row: (S,) int32.
        ends: (E,) int32, the row after the last one of each expert.
        indices: (S,) the expert of each slot.
    """

    row_of_slot: Tensor
    slot_of_row: Tensor
    ends: Tensor
    indices: Tensor


@triton.jit
def _one_hot(indices, slot, slots, E: tl.constexpr, BE: tl.constexpr):
    """(BS, BE) int32: which bucket each slot falls into; that of experts which do not exist has number E."""
    expert = tl.load(indices + slot, mask=slot < slots, other=E).to(tl.int32)
    expert = tl.where((expert < 0) | (expert > E), E, expert)
    hot = (expert[:, None] == tl.arange(0, BE)[None, :]) & (slot < slots)[:, None]
    return hot.to(tl.int32)


@triton.jit
def _count_kernel(indices, counts, slots, E: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr):
    """counts (blocks, BE)."""
    block = tl.program_id(0)
    hot = _one_hot(indices, block * BS + tl.arange(0, BS), slots, E, BE)
    tl.store(counts + block * BE + tl.arange(0, BE), tl.sum(hot, 0))


@triton.jit
def _place_kernel(
    indices,
    counts,
    row_of_slot,
    slot_of_row,
    ends,
    slots,
    blocks,
    E: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
):
    """Rows of the slots of one block: after all slots of smaller experts, and after those of the same one before it."""
    block = tl.program_id(0)
    bucket = tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    before = tl.zeros((BE,), tl.int32)
    for start in range(0, blocks, BB):
        b = start + tl.arange(0, BB)
        found = tl.load(counts + b[:, None] * BE + bucket[None, :], mask=(b < blocks)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((b < block)[:, None], found, 0), 0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends + bucket, end, mask=bucket < E)
    slot = block * BS + tl.arange(0, BS)
    hot = _one_hot(indices, slot, slots, E, BE)
    # a slot's place is that of its bucket, plus the slots of the same bucket up to it
    place = (end - total + before - 1)[None, :] + tl.cumsum(hot, 0)
    row = tl.sum(tl.where(hot != 0, place, 0), 1)
    tl.store(row_of_slot + slot, row, mask=slot < slots)
    tl.store(slot_of_row + row, slot, mask=slot < slots)


def make_plan(indices: Tensor, num_experts: int) -> Plan:
    """The plan for the experts `indices` (N, k) of each token."""
    flat = indices.contiguous().view(-1)
    slots = flat.numel()
    width = power_of_2(num_experts + 1)
    per_program = max(16, min(512, TILE // width))
    blocks = ceil_div(slots, per_program)
    # the cheapest ways to allocate: the host is awaited here
    row_of_slot = torch.empty_like(flat, dtype=torch.int32)
    slot_of_row = torch.empty_like(row_of_slot)
    counts = row_of_slot.new_empty((blocks, width))
    ends = row_of_slot.new_empty((num_experts,))
    launch(_count_kernel, (blocks,), flat, counts, slots, E=num_experts, BE=width, BS=per_program)
    launch(
        _place_kernel,
        (blocks,),
        flat,
        counts,
        row_of_slot,
        slot_of_row,
        ends,
        slots,
        blocks,
        E=num_experts,
        BE=width,
        BS=per_program,
        BB=max(1, min(128, TILE // width)),
        num_warps=8,
    )
    return Plan(row_of_slot, slot_of_row, ends, flat)


@triton.jit
def _gather_kernel(
    x, slot_of_row, rows, slots, stride, K: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    """rows (S, D): the token of each row's slot."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = r < slots
    token = tl.load(slot_of_row + r, mask=inside, other=0) // K
    for start in tl.static_range(0, D, BD):
        c = start + tl.arange(0, BD)
        mask = inside[:, None] & (c < D)[None, :]
        value = tl.load(x + token.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0.0)
        tl.store(rows + r.to(tl.int64)[:, None] * D + c[None, :], value.to(rows.dtype.element_ty), mask=mask)


def gather(x: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Tokens x (N, D) as rows (S, D) of `dtype`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    slots, channels = plan.slot_of_row.numel(), x.shape[1]
    rows = x.new_empty((slots, channels), dtype=dtype)
    launch(
        _gather_kernel,
        (ceil_div(slots, MOVED),),
        x,
        plan.slot_of_row,
        rows,
        slots,
        x.stride(0),
        K=slots // x.shape[0],
        D=channels,
        BR=MOVED,
        BD=min(CHANNELS, power_of_2(channels)),
    )
    return rows


@triton.jit
def _combine_kernel(
    rows,
    row_of_slot,
    indices,
    weights,
    bias,
    out,
    tokens,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out (N, D): the sum of a token's rows in the order of its choices, in fp32."""
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = n < tokens
    for start in tl.static_range(0, D, BD):
        c = start + tl.arange(0, BD)
        is_channel = c < D
        total = tl.zeros((BR, BD), tl.float32)
        for j in tl.static_range(K):
            row = tl.load(row_of_slot + n * K + j, mask=inside, other=0)
            expert = tl.load(indices + n * K + j, mask=inside, other=E).to(tl.int32)
            # rows of no group are not computed
            mask = (inside & (expert >= 0) & (expert < E))[:, None] & is_channel[None, :]
            value = tl.load(rows + row.to(tl.int64)[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                value += tl.load(bias + expert[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                value *= tl.load(weights + n * K + j, mask=inside, other=0.0).to(tl.float32)[:, None]
            total += value
        tl.store(
            out + n.to(tl.int64)[:, None] * D + c[None, :],
            total.to(out.dtype.element_ty),
            mask=inside[:, None] & is_channel[None, :],
        )


def combine(
    rows: Tensor,
    plan: Plan,
    weights: Tensor | None,
    dtype: torch.dtype,
    tokens: int,
    bias: Tensor | None = None,
) -> Tensor:
    """The sum (N, D) of each token's rows (S, D), times `weights` (N, k), after `bias` (E, D) is added to them."""
    slots, channels = rows.shape
    out = rows.new_empty((tokens, channels), dtype=dtype)
    launch(
        _combine_kernel,
        (ceil_div(tokens, MOVED),),
        rows,
        plan.row_of_slot,
        plan.indices,
        rows if weights is None else weights,
        rows if bias is None else bias,
        out,
        tokens,
        K=slots // tokens,
        D=channels,
        E=plan.ends.numel(),
        BR=MOVED,
        BD=min(CHANNELS, power_of_2(channels)),
        HAS_WEIGHTS=weights is not None,
        HAS_BIAS=bias is not None,
    )
    return out


@triton.jit
def _spread_kernel(
    gradient,
    rows,
    slot_of_row,
    indices,
    weights,
    bias,
    spread_rows,
    weight_gradient,
    slots,
    stride,
    K: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The gradient of `combine`: of its rows (S, D) and its weights (S,)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = r < slots
    slot = tl.load(slot_of_row + r, mask=inside, other=0)
    expert = tl.load(indices + slot, mask=inside, other=E).to(tl.int32)
    weight = tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)
    token = (slot // K).to(tl.int64)
    is_group = inside & (expert >= 0) & (expert < E)
    dot = tl.zeros((BR,), tl.float32)
    for start in tl.static_range(0, D, BD):
        c = start + tl.arange(0, BD)
        mask = is_group[:, None] & (c < D)[None, :]
        g = tl.load(gradient + token[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        address = r.to(tl.int64)[:, None] * D + c[None, :]
        value = tl.load(rows + address, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + expert[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(g * value, 1)
        g *= weight[:, None]
        tl.store(spread_rows + address, g.to(spread_rows.dtype.element_ty), mask=inside[:, None] & (c < D)[None, :])
    tl.store(weight_gradient + slot, dot, mask=inside)


def spread(
    gradient: Tensor, rows: Tensor, plan: Plan, weights: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `rows` (S, D) and of `weights` (N, k) fp32 from that of what `combine` made of them (N, D)."""
    gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
    slots, channels = rows.shape
    result = torch.empty_like(rows)
    weight_gradient = torch.empty_like(weights, dtype=torch.float32)
    launch(
        _spread_kernel,
        (ceil_div(slots, MOVED),),
        gradient,
        rows,
        plan.slot_of_row,
        plan.indices,
        weights,
        rows if bias is None else bias,
        result,
        weight_gradient,
        slots,
        gradient.stride(0),
        K=slots // gradient.shape[0],
        D=channels,
        E=plan.ends.numel(),
        BR=MOVED,
        BD=min(CHANNELS, power_of_2(channels)),
        HAS_BIAS=bias is not None,
    )
    return result, weight_gradient
