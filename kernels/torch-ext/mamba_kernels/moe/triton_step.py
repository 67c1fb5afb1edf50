# mypy: disable-error-code="assignment, misc, var-annotated"
"""`experts_step` in Triton: the chosen experts of a few tokens in two launches that read nothing but their weights.

    a_bj = act(g) u of the expert chosen j-th for token b,     y_b = residual_b + sum_j w_bj (W_down a_bj + b_down)

Both launches find the experts themselves, from the router's logits, or are told. A program reads BO rows of a matrix, BK columns
at a time, as `fused_linear` does; sums are in fp32 and in a fixed order.

The second waits for the first, and would start when that one has ended. Hopper can start it earlier (`early`), so that it fetches
its weights while the first is at work, of which nothing depends on the first but the product. The first can do nothing before it
has the logits, but is there when they are; whether it may start early is asked for, since what is in front of it is not known
here. It waits before it lets the second start, which therefore finds the logits written.

Symbols: B tokens, k experts per token, d model width, E experts, F expert width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..early import knows_early_launches, launches_early
from ..launch import launch
from .sizes import ceil_div, power_of_2
from .triton_activation import act
from .triton_router import choose_experts

__all__ = ["experts_step_triton"]

# rows and columns of a matrix that a program reads at a time, and its warps: of the two launches, the fastest of 12 on an H100
UP, DOWN = (4, 1024, 4), (2, 1024, 4)
# values of weights that a thread holds before it multiplies
MOST_AHEAD = 64


@triton.jit
def _pick(
    logits,
    b,
    j,
    scale,
    K: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The expert that token b chooses j-th, and its weight."""
    e = tl.arange(0, BE)
    found = tl.load(logits + b * E + e, mask=e < E, other=0.0, cache_modifier=".cg")
    left = choose_experts(found[None, :], E, BE, SIGMOID)
    chosen = 0.0
    expert = 0
    weight = 0.0
    for i in tl.static_range(K):
        best, which = tl.max(left, 1, return_indices=True)
        value = tl.max(best, 0)
        number = tl.max(which, 0)
        chosen += value
        expert = tl.where(i == j, number, expert)
        weight = tl.where(i == j, value, weight)
        left = tl.where(e[None, :] == number, -2.0, left)
    if NORMALIZE:
        weight = weight / chosen
    return expert, weight * scale


@triton.jit
def _up_kernel(
    x,
    norm_weight,
    logits,
    up,
    bias,
    a,
    indices,
    weights,
    stride,
    eps,
    scale,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BE: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EARLY: tl.constexpr,
    NEXT_EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """a (B, k, F), and with logits also the choice: indices and weights (B, k). With AHEAD all weights are fetched at once."""
    WIDTH: tl.constexpr = 2 * F if GATED else F
    pid, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if NEXT_EARLY:
        # behind the wait: the next launch reads the logits before it waits itself
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_LOGITS:
        expert, weight = _pick(logits, b, j, scale, K, E, BE, SIGMOID, NORMALIZE)
        if pid == 0:
            tl.store(indices + b * K + j, expert.to(tl.int64))
            tl.store(weights + b * K + j, weight)
    else:
        expert = tl.load(indices + b * K + j).to(tl.int32)
    o = pid * BO + tl.arange(0, BO)
    is_output = o < F
    c = tl.arange(0, BK)
    # an expert that does not exist reads nothing
    is_read = o < tl.where((expert >= 0) & (expert < E), F, 0)
    tile = up + expert.to(tl.int64) * (WIDTH * D) + o[:, None] * D + c[None, :]
    fetched = ()
    if AHEAD:
        for start in tl.static_range(0, D, BK):
            mask = is_read[:, None] & (start + c < D)[None, :]
            fetched = fetched + (tl.load(tile + start, mask=mask, other=0.0, eviction_policy="evict_first"),)
            if GATED:
                other = tl.load(tile + F * D + start, mask=mask, other=0.0, eviction_policy="evict_first")
                fetched = fetched + (other,)
        # without it the assembler saves registers: it waits for a part before it fetches the next
        tl.debug_barrier()
    PARTS: tl.constexpr = 2 if GATED else 1
    g = tl.zeros((BO, BK), tl.float32)
    u = tl.zeros((BO, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for start in tl.static_range(0, D, BK):
        inside = start + c < D
        if AHEAD:
            first = fetched[start // BK * PARTS].to(tl.float32)
            if GATED:
                second = fetched[start // BK * PARTS + 1].to(tl.float32)
        else:
            mask = is_read[:, None] & inside[None, :]
            first = tl.load(tile + start, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if GATED:
                other = tl.load(tile + F * D + start, mask=mask, other=0.0, eviction_policy="evict_first")
                second = other.to(tl.float32)
        v = tl.load(x + b * stride + start + c, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += v * v
            v *= tl.load(norm_weight + start + c, mask=inside, other=0.0).to(tl.float32)
        g += first * v[None, :]
        if GATED:
            u += second * v[None, :]
    inverse = 1.0
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    result = tl.sum(g, 1) * inverse
    if HAS_BIAS:
        result += tl.load(bias + expert * WIDTH + o, mask=is_read, other=0.0).to(tl.float32)
    result = act(result, ACT)
    if GATED:
        factor = tl.sum(u, 1) * inverse
        if HAS_BIAS:
            factor += tl.load(bias + expert * WIDTH + F + o, mask=is_read, other=0.0).to(tl.float32)
        result *= factor
    tl.store(a + (b * K + j) * F + o, result.to(a.dtype.element_ty), mask=is_output)


@triton.jit
def _down_kernel(
    a,
    logits,
    indices,
    weights,
    down,
    bias,
    residual,
    y,
    stride,
    scale,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BE: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y (B, D). With AHEAD all weights are fetched before `a` is there."""
    pid, b = tl.program_id(0), tl.program_id(1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o = pid * BO + tl.arange(0, BO)
    is_output = o < D
    c = tl.arange(0, BK)
    chosen = ()
    fetched = ()
    for j in tl.static_range(K):
        if HAS_LOGITS:
            expert, weight = _pick(logits, b, j, scale, K, E, BE, SIGMOID, NORMALIZE)
        else:
            expert = tl.load(indices + b * K + j).to(tl.int32)
            weight = tl.load(weights + b * K + j).to(tl.float32)
        is_read = o < tl.where((expert >= 0) & (expert < E), D, 0)
        tile = down + expert.to(tl.int64) * (D * F) + o[:, None] * F + c[None, :]
        chosen = chosen + ((expert, weight, is_read, tile),)
        if AHEAD:
            for start in tl.static_range(0, F, BK):
                mask = is_read[:, None] & (start + c < F)[None, :]
                fetched = fetched + (tl.load(tile + start, mask=mask, other=0.0, eviction_policy="evict_first"),)
    total = tl.zeros((BO,), tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + b * stride + o, mask=is_output, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    elif AHEAD:
        tl.debug_barrier()
    BLOCKS: tl.constexpr = (F + BK - 1) // BK
    for j in tl.static_range(K):
        expert, weight, is_read, tile = chosen[j]
        sums = tl.zeros((BO, BK), tl.float32)
        for i in tl.static_range(BLOCKS):
            inside = i * BK + c < F
            if AHEAD:
                values = fetched[j * BLOCKS + i].to(tl.float32)
            else:
                mask = is_read[:, None] & inside[None, :]
                values = tl.load(tile + i * BK, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            v = tl.load(a + (b * K + j) * F + i * BK + c, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            sums += values * v[None, :]
        result = tl.sum(sums, 1)
        if HAS_BIAS:
            result += tl.load(bias + expert * D + o, mask=is_read, other=0.0).to(tl.float32)
        total += result * weight
    tl.store(y + b * D + o, total.to(y.dtype.element_ty), mask=is_output)


def experts_step_triton(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    router_logits: Tensor | None = None,
    top_k: int = 1,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`experts_step`; arguments as there, assumed to be checked."""
    (batch, channels), (experts, _, inner) = x.shape, down.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    has_logits = indices is None or weights is None
    if has_logits:
        assert router_logits is not None
        indices = torch.empty(batch, top_k, dtype=torch.int64, device=x.device)
        weights = torch.empty(batch, top_k, dtype=torch.float32, device=x.device)
    assert indices is not None and weights is not None
    indices, weights = indices.contiguous(), weights.contiguous()
    router_logits = None if router_logits is None else router_logits.contiguous()
    top_k = indices.shape[1]
    added = x if residual is None else residual if residual.stride(1) == 1 else residual.contiguous()
    a = torch.empty(batch, top_k, inner, dtype=up.dtype, device=x.device)
    dtype = down.dtype if residual is None else torch.promote_types(residual.dtype, down.dtype)
    y = torch.empty(batch, channels, dtype=dtype, device=x.device)
    next_early = knows_early_launches(x.device.type, x.device.index)
    # logits come from a kernel; what made a choice that is told may have been a copy or a fill
    early = has_logits and launches_early(x)
    options: dict[str, Any] = {
        "HAS_LOGITS": has_logits,
        "SIGMOID": scoring == "sigmoid",
        "NORMALIZE": normalize,
    }
    rows, columns, warps = UP
    columns = min(columns, power_of_2(channels))
    fetched = (2 if gated else 1) * rows * ceil_div(channels, columns) * columns
    launch(
        _up_kernel,
        (ceil_div(inner, rows), top_k, batch),
        x,
        x if norm_weight is None else norm_weight,
        x if router_logits is None else router_logits,
        up,
        x if up_bias is None else up_bias,
        a,
        indices,
        weights,
        x.stride(0),
        eps,
        float(scale),
        K=top_k,
        E=experts,
        D=channels,
        F=inner,
        BE=power_of_2(experts),
        BO=rows,
        BK=columns,
        ACT=activation,
        GATED=gated,
        HAS_NORM=norm_weight is not None,
        HAS_BIAS=up_bias is not None,
        EARLY=early,
        NEXT_EARLY=next_early,
        AHEAD=fetched <= 32 * warps * MOST_AHEAD,
        num_warps=warps,
        **options,
        **({"launch_pdl": True} if early else {}),
    )
    rows, columns, warps = DOWN
    columns = min(columns, power_of_2(inner))
    launch(
        _down_kernel,
        (ceil_div(channels, rows), batch),
        a,
        x if router_logits is None else router_logits,
        indices,
        weights,
        down,
        x if down_bias is None else down_bias,
        added,
        y,
        added.stride(0),
        float(scale),
        K=top_k,
        E=experts,
        D=channels,
        F=inner,
        BE=power_of_2(experts),
        BO=rows,
        BK=columns,
        HAS_BIAS=down_bias is not None,
        HAS_RESIDUAL=residual is not None,
        EARLY=next_early,
        AHEAD=top_k * rows * ceil_div(inner, columns) * columns <= 32 * warps * MOST_AHEAD,
        num_warps=warps,
        **options,
        **({"launch_pdl": True} if next_early else {}),
    )
    return y, indices, weights
