"""`route` in Triton: logits, scores and the choice of k experts in one launch, and their gradient in another.

Logits are those of fp32: bf16 tokens are multiplied with the weight in three bf16 parts, whose sum is the fp32 weight to the
last bit, so that every product is exact and the tensor cores' sums are in fp32. Other dtypes are multiplied in fp32.

Symbols: N tokens, d model width, E experts, k experts per token.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autograd import first_order_only
from ..launch import launch
from .sizes import ceil_div, power_of_2

__all__ = ["choose_experts", "route_triton"]

# tokens and channels of a tile
TOKENS, CHANNELS = 64, 64


@triton.jit
def choose_experts(logits, E: tl.constexpr, BE: tl.constexpr, SIGMOID: tl.constexpr):
    """Scores (R, BE) of logits (R, BE), -1 where there is no expert."""
    is_expert = (tl.arange(0, BE) < E)[None, :]
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(is_expert, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    return tl.where(is_expert, scores, -1.0)


@triton.jit
def _route_kernel(
    x,
    weight,
    bias,
    logits,
    weights,
    indices,
    tokens,
    stride,
    scale,
    one,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """logits (N, E), weights (N, k), indices (N, k)."""
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside, is_expert = n < tokens, e < E
    total = tl.zeros((BT, BE), tl.float32)
    for start in range(0, D, BC):
        c = start + tl.arange(0, BC)
        w = tl.load(weight + e[None, :] * D + c[:, None], mask=is_expert[None, :] & (c < D)[:, None], other=0.0)
        value = tl.load(
            x + n.to(tl.int64)[:, None] * stride + c[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0
        )
        if SPLIT:
            first = w.to(tl.bfloat16)
            rest = w - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            part = tl.dot(value, third)
            part = tl.dot(value, second, part)
            # tensor cores cut their sums off, so that long ones are added outside; without the factor the compiler undoes it
            total += tl.dot(value, first, part) * one
        else:
            total = tl.dot(value.to(tl.float32), w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + e, mask=is_expert, other=0.0)[None, :]
    tl.store(logits + n.to(tl.int64)[:, None] * E + e[None, :], total, mask=inside[:, None] & is_expert[None, :])
    scores = choose_experts(total, E, BE, SIGMOID)
    left = scores
    chosen = tl.zeros((BT,), tl.float32)
    for j in tl.static_range(K):
        best, which = tl.max(left, 1, return_indices=True)
        chosen += best
        tl.store(indices + n * K + j, which.to(tl.int64), mask=inside)
        tl.store(weights + n * K + j, best * scale, mask=inside)
        left = tl.where(e[None, :] == which[:, None], -2.0, left)
    if NORMALIZE:
        left = scores
        for j in tl.static_range(K):
            best, which = tl.max(left, 1, return_indices=True)
            tl.store(weights + n * K + j, best / chosen * scale, mask=inside)
            left = tl.where(e[None, :] == which[:, None], -2.0, left)


@triton.jit
def _route_gradient_kernel(
    logits,
    indices,
    weight_gradient,
    logit_gradient,
    result,
    tokens,
    scale,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_LOGIT_GRADIENT: tl.constexpr,
):
    """The gradient of the logits (N, E), from those of the weights (N, k) and of the logits as an output."""
    n = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside, is_expert = n < tokens, e < E
    mask = inside[:, None] & is_expert[None, :]
    at = n.to(tl.int64)[:, None] * E + e[None, :]
    found = tl.load(logits + at, mask=mask, other=0.0)
    scores = tl.where(is_expert[None, :], choose_experts(found, E, BE, SIGMOID), 0.0)
    # the gradient of the scores: first of w / sum(w), then of the choice
    is_chosen = tl.zeros((BT, BE), tl.float32)
    gradient = tl.zeros((BT, BE), tl.float32)
    for j in tl.static_range(K):
        which = tl.load(indices + n * K + j, mask=inside, other=0).to(tl.int32)
        g = tl.load(weight_gradient + n * K + j, mask=inside, other=0.0) * scale
        hot = tl.where(e[None, :] == which[:, None], 1.0, 0.0)
        is_chosen += hot
        gradient += hot * g[:, None]
    if NORMALIZE:
        chosen = tl.sum(scores * is_chosen, 1)[:, None]
        chosen = tl.where(inside[:, None], chosen, 1.0)
        mean = tl.sum(gradient * scores, 1)[:, None] / chosen
        gradient = is_chosen * (gradient - mean) / chosen
    if SIGMOID:
        gradient = gradient * scores * (1.0 - scores)
    else:
        gradient = scores * (gradient - tl.sum(gradient * scores, 1)[:, None])
    if HAS_LOGIT_GRADIENT:
        gradient += tl.load(logit_gradient + at, mask=mask, other=0.0)
    tl.store(result + at, gradient, mask=mask)


def run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and indices."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, channels), experts = x.shape, weight.shape[0]
    weight = weight.float().contiguous()
    logits = weight.new_empty((tokens, experts))
    weights = weight.new_empty((tokens, top_k))
    indices = torch.empty_like(weights, dtype=torch.int64)
    width = max(16, power_of_2(experts))
    split = x.dtype == torch.bfloat16
    per_program = TOKENS if split else 16
    launch(
        _route_kernel,
        (ceil_div(tokens, per_program),),
        x,
        weight,
        x if bias is None else bias.float(),
        logits,
        weights,
        indices,
        tokens,
        x.stride(0),
        scale,
        1.0,
        K=top_k,
        E=experts,
        D=channels,
        BE=width,
        BT=per_program,
        BC=CHANNELS if split else 32,
        SIGMOID=sigmoid,
        NORMALIZE=normalize,
        HAS_BIAS=bias is not None,
        SPLIT=split,
        num_warps=4,
    )
    return logits, weights, indices


class Route(torch.autograd.Function):
    """The op and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        top_k: int,
        sigmoid: bool,
        normalize: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = run_forward(x, weight, bias, top_k, sigmoid, normalize, scale)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, logits, indices)
        ctx.options, ctx.bias_dtype = (sigmoid, normalize, scale), None if bias is None else bias.dtype
        return logits, weights, indices

    @staticmethod
    @first_order_only("route")
    def backward(
        ctx: Any, logit_gradient: Tensor | None, weight_gradient: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, logits, indices = ctx.saved_tensors
        sigmoid, normalize, scale = ctx.options
        if weight_gradient is None:
            if logit_gradient is None:
                return (None,) * 7
            gradient = logit_gradient
        else:
            tokens, experts = logits.shape
            gradient = torch.empty_like(logits)
            launch(
                _route_gradient_kernel,
                (ceil_div(tokens, 16),),
                logits,
                indices,
                weight_gradient.contiguous(),
                logits if logit_gradient is None else logit_gradient.contiguous(),
                gradient,
                tokens,
                scale,
                K=indices.shape[1],
                E=experts,
                BE=power_of_2(experts),
                BT=16,
                SIGMOID=sigmoid,
                NORMALIZE=normalize,
                HAS_LOGIT_GRADIENT=logit_gradient is not None,
            )
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            (gradient @ weight.float()).to(x.dtype) if needs_x else None,
            (gradient.mT @ x.float()).to(weight.dtype) if needs_weight else None,
            gradient.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
            None,
            None,
        )


def route_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, scoring: str, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`route`; arguments as there, assumed to be checked."""
    run = Route.apply if torch.is_grad_enabled() else run_forward
    return run(x, weight, bias, top_k, scoring == "sigmoid", normalize, float(scale))
