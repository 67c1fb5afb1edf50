"""One or a few tokens of the causal convolution in Triton: all of them in one launch, the state shifted in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import left_to_eager
from ..launch import launch
from .eager import causal_conv1d_update_eager

__all__ = ["causal_conv1d_update_triton"]

# channels of a program
BLOCK = 128


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
    launch(
        _conv_update_kernel,
        (batch * -(-channels // BLOCK),),
        x,
        conv_state,
        weight,
        x if bias is None else bias.contiguous(),
        x if state_indices is None else state_indices.contiguous(),
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
        HAS_BIAS=bias is not None,
        INDEXED=state_indices is not None,
        SILU=activation is not None,
        num_warps=1,
    )
    return y
