"""`routed_experts`: torch's grouped products with lean Triton kernels around them.

Forward: the plan (two launches), the rows gathered, the first product, activation, the second product, and the weighted sum
of a token's rows. Torch's grouped product is the vendor's (CUTLASS) and takes the groups' ends from the device's memory. In half
precision, where a multiprocessor has the memory for it, gather, first product and activation are one launch of our own. In fp32
and fp16 torch's product waits for the host; so few rows as a prompt has, which may be captured in a CUDA graph, are multiplied by
our kernel too.

Symbols: N tokens, k experts per token, S = N k rows, d model width, E experts, F expert width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autograd import first_order_only
from .triton_activation import activate, activation_gradient, sum_of_groups
from .triton_grouped import LARGE, grouped_rows, large_tiles_fit, multiplies
from .triton_plan import Plan, combine, gather, make_plan, spread

__all__ = ["routed_experts_triton"]

_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a (S, x) times b (E, x, y), or a (x, S) times b (S, y), group by group of S."""
    assert _grouped_mm is not None
    return _grouped_mm(a, b, offs=ends)


def run_forward(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, tuple[Any, ...]]:
    """The result, and what the gradients need of it: h if it is kept, a, y and the plan."""
    plan = make_plan(indices, up.shape[0])
    slots = indices.numel()
    captured = not keep and multiplies(x, slots, up)
    large = large_tiles_fit(x, slots, up)
    h: Tensor | None
    if up_bias is None and (large or captured):
        tuning = LARGE if large else None
        h, a = grouped_rows(x, plan, up, activation, gated, keep=keep, gather=True, tuning=tuning)
    else:
        rows = gather(x, plan, up.dtype)
        h = grouped_rows(rows, plan, up)[1] if captured else grouped(rows, up.mT, plan.ends)
        a = activate(h, up_bias, plan, activation, gated)
    y = grouped_rows(a, plan, down)[1] if captured else grouped(a, down.mT, plan.ends)
    return combine(y, plan, weights, x.dtype, x.shape[0], down_bias), (h, a, y, *plan)


class RoutedExperts(torch.autograd.Function):
    """The op and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        gated: bool,
    ) -> Tensor:
        operands = (up, down, up_bias, down_bias)
        out, kept = run_forward(x, indices, weights, *operands, activation, gated, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, weights, *operands, *kept)
        ctx.activation, ctx.gated = activation, gated
        return out

    @staticmethod
    @first_order_only("routed_experts")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, up_bias, down_bias, h, a, y, *parts = ctx.saved_tensors
        plan = Plan(*parts)
        needs_x, _, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias, *_ = ctx.needs_input_grad
        dy, dweights = spread(gradient, y, plan, weights, down_bias)
        da = grouped(dy, down, plan.ends)
        dh = activation_gradient(h, up_bias, plan, ctx.activation, ctx.gated, da)
        dx = None
        if needs_x:
            dx = combine(grouped(dh, up, plan.ends), plan, None, x.dtype, x.shape[0])
        return (
            dx,
            None,
            dweights.to(weights.dtype) if needs_weights else None,
            grouped(dh.mT, gather(x, plan, up.dtype), plan.ends) if needs_up else None,
            grouped(dy.mT, a, plan.ends) if needs_down else None,
            sum_of_groups(dh, plan, up.dtype) if needs_up_bias else None,
            sum_of_groups(dy, plan, down.dtype) if needs_down_bias else None,
            None,
            None,
        )


def routed_experts_triton(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """`routed_experts`; arguments as there, assumed to be checked."""
    weights = weights.contiguous()
    if not torch.is_grad_enabled():
        return run_forward(x, indices, weights, up, down, up_bias, down_bias, activation, gated, keep=False)[0]
    return RoutedExperts.apply(x, indices, weights, up, down, up_bias, down_bias, activation, gated)
