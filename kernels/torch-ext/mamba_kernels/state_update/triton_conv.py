"""One or a few tokens of the causal convolution in Triton: all of them in one launch, the state shifted in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..causal_conv1d.triton_common import quarters
from ..dispatch import left_to_eager
from ..early import launches_early
from ..launch import launch
from .eager import causal_conv1d_update_eager

__all__ = ["causal_conv1d_update_triton"]

# channels of a program; half as many in a step, two for each thread
BLOCK, STEP_BLOCK = 128, 64


@triton.jit
def _known(state, x, position, c, mask, stride_state_d, stride_state_k, stride_x_t, K: tl.constexpr):
    """Inputs at `position` of the state followed by the new tokens: (BC, positions) fp32."""
    old = position < K
    in_state = c[:, None].to(tl.int64) * stride_state_d + position[None, :] * stride_state_k
    value = tl.load(state + in_state, mask=mask[:, None] & old[None, :], other=0.0).to(tl.float32)
    in_x = c[:, None] + (position - K).to(tl.int64)[None, :] * stride_x_t
    return value + tl.load(x + in_x, mask=mask[:, None] & (position >= K)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _conv_update_kernel(
    x,
    state,
    weight,
    bias,
    indices,
    y,
    stride_x_b,
    stride_x_t,
    stride_state_b,
    stride_state_d,
    stride_state_k,
    stride_weight_d,
    stride_weight_w,
    tokens,
    channels,
    K: tl.constexpr,
    KB: tl.constexpr,
    W: tl.constexpr,
    WB: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
    SILU: tl.constexpr,
):
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    entry = pid // blocks
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    row = entry
    if INDEXED:
        row = tl.load(indices + entry).to(tl.int64)
    used = (mask & (row >= 0)) != 0
    x += entry * stride_x_b
    state += tl.maximum(row, 0) * stride_state_b
    k = tl.arange(0, WB)
    place = weight + c[:, None].to(tl.int64) * stride_weight_d + k[None, :] * stride_weight_w
    taps = tl.load(place, mask=mask[:, None] & (k < W)[None, :], other=0.0).to(tl.float32)
    offset = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    for t in range(0, tokens):
        # taps beyond the last meet whatever is there with a weight of 0, so they must stay inside
        position = K - W + 1 + t + tl.minimum(k, W - 1)
        window = _known(state, x, position, c, used, stride_state_d, stride_state_k, stride_x_t, K)
        sums = offset + tl.sum(tl.where((k < W)[None, :], taps * window, 0.0), 1)
        if SILU:
            sums *= 1.0 / (1.0 + tl.exp2(sums * -1.4426950408889634))
        sums = tl.where(row >= 0, sums, 0.0)
        tl.store(y + (entry * tokens + t) * channels + c, sums, mask=mask)
    m = tl.arange(0, KB)
    kept = _known(state, x, tokens + tl.minimum(m, K - 1), c, used, stride_state_d, stride_state_k, stride_x_t, K)
    # nobody overwrites what another thread still has to read
    tl.debug_barrier()
    place = state + c[:, None].to(tl.int64) * stride_state_d + m[None, :] * stride_state_k
    tl.store(place, kept, mask=used[:, None] & (m < K)[None, :])


@triton.jit
def _conv_step_kernel(
    x,
    state,
    weight,
    bias,
    indices,
    y,
    stride_x_b,
    stride_state_b,
    channels,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INDEXED: tl.constexpr,
    SILU: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token, four taps and states of four inputs, both contiguous: everything is read once, in whole words."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    entry = pid // blocks
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    cells = c[:, None] * 4 + tl.arange(0, 4)[None, :]
    is_channel = c[:, None] < channels
    row = entry
    if INDEXED:
        row = tl.load(indices + entry).to(tl.int64)
    used = (mask & (row >= 0)) != 0
    held = state + tl.maximum(row, 0) * stride_state_b + cells
    is_held = (is_channel & (row >= 0)) != 0
    taps = tl.load(weight + cells, mask=is_channel, other=0.0)
    known = tl.load(held, mask=is_held, other=0.0)
    sums = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    new = tl.load(x + entry * stride_x_b + c, mask=used, other=0.0)
    tap0, tap1, tap2, tap3 = quarters(taps.to(tl.float32), BC)
    _, old1, old2, old3 = quarters(known, BC)
    # in the order of the parallel kernel, from the newest to the oldest
    sums += new.to(tl.float32) * tap3
    sums += old3.to(tl.float32) * tap2
    sums += old2.to(tl.float32) * tap1
    sums += old1.to(tl.float32) * tap0
    if SILU:
        sums *= 1.0 / (1.0 + tl.exp2(sums * -1.4426950408889634))
    sums = tl.where(row >= 0, sums, 0.0)
    tl.store(y + entry * channels + c, sums, mask=mask)
    kept = tl.join(tl.join(old1, old3), tl.join(old2, new.to(state.dtype.element_ty)))
    # nobody overwrites what another thread still has to read
    tl.debug_barrier()
    tl.store(held, tl.reshape(kept, (BC, 4)), mask=is_held)


def causal_conv1d_update_triton(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in Triton; arguments as there, assumed to be checked. fp64 and empty inputs run in eager."""
    size, taps = conv_state.shape[2], weight.shape[1]
    if size == 0 or left_to_eager(x, conv_state, weight, bias):
        return causal_conv1d_update_eager(
            x, conv_state, weight, bias=bias, activation=activation, state_indices=state_indices
        )
    single = x.dim() == 2
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, tokens, channels = x.shape[0], 1 if single else x.shape[1], x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    bias_or_x = x if bias is None else bias.contiguous()
    indices = x if state_indices is None else state_indices.contiguous()
    flags = {"HAS_BIAS": bias is not None, "INDEXED": state_indices is not None, "SILU": activation is not None}
    if (
        tokens == 1
        and size == taps == 4
        and conv_state.stride(1) == 4
        and conv_state.stride(2) == 1
        and weight.is_contiguous()
    ):
        # which rows there are may come from the kernel in front
        early = state_indices is None and launches_early(x)
        launch(
            _conv_step_kernel,
            (batch * -(-channels // STEP_BLOCK),),
            x,
            conv_state,
            weight,
            bias_or_x,
            indices,
            y,
            x.stride(0),
            conv_state.stride(0),
            channels,
            BC=STEP_BLOCK,
            **flags,
            EARLY=early,
            num_warps=1,
            **({"launch_pdl": True} if early else {}),
        )
        return y
    launch(
        _conv_update_kernel,
        (batch * -(-channels // BLOCK),),
        x,
        conv_state,
        weight,
        bias_or_x,
        indices,
        y,
        x.stride(0),
        0 if single else x.stride(1),
        *conv_state.stride(),
        *weight.stride(),
        tokens,
        channels,
        K=size,
        KB=1 << (size - 1).bit_length(),
        W=taps,
        WB=1 << (taps - 1).bit_length(),
        BC=BLOCK,
        **flags,
        num_warps=1,
    )
    return y
