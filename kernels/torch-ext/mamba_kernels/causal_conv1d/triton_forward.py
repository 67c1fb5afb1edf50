"""The causal convolution in Triton, forward: outputs and final states. The formulas are in `triton_common`."""

import triton.language as tl

from .triton_common import Tuning, conv_kernel, inputs, load_taps, sequence_of_state, sigmoid_of, token_info

__all__ = ["FORWARD", "conv_final_states_kernel", "conv_fwd_kernel"]

FORWARD = Tuning(tokens=16, channels=256)


@conv_kernel
def conv_fwd_kernel(
    x,
    weight,
    bias,
    initial,
    numbers,
    bounds,
    y,
    stride_b,
    stride_t,
    stride_weight_d,
    stride_weight_w,
    length,
    channels,
    n_tiles,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
):
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    tile = (pid // blocks) % n_tiles
    row = pid // (blocks * n_tiles)
    t = (tile * BT).to(tl.int32) + tl.arange(0, BT)
    x += row * stride_b
    numbers += row * length
    y += row * length * channels
    real, number, begin = token_info(numbers, bounds, t, length, MARKS, VARLEN)
    taps = load_taps(weight, stride_weight_d, stride_weight_w, c, mask, W)
    pre = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        pre += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        value = inputs(
            x,
            initial,
            numbers,
            stride_t,
            t - j,
            real,
            number,
            begin,
            row,
            c,
            mask,
            channels,
            W,
            HAS_INITIAL,
            MARKS,
            VARLEN,
        )
        pre += value * taps[j][None, :]
    if SILU:
        pre *= sigmoid_of(pre)
    pre = tl.where(real[:, None], pre, 0.0)
    offsets = t.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(y + offsets, pre, mask=(t < length)[:, None] & mask[None, :])


@conv_kernel
def conv_final_states_kernel(
    x,
    initial,
    numbers,
    bounds,
    ends,
    final,
    stride_b,
    stride_t,
    length,
    channels,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """final (S, D, W - 1): the last W - 1 inputs of each row's last sequence, or of each packed sequence."""
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    sequence = pid // blocks
    row, number, begin, end = sequence_of_state(numbers, bounds, ends, sequence, length, MARKS, VARLEN)
    i = tl.arange(0, BT)
    s = end - (W - 1) + i
    value = inputs(
        x + row * stride_b,
        initial,
        numbers + row * length,
        stride_t,
        s,
        i < W - 1,
        number + i * 0,
        begin + i * 0,
        row,
        c,
        mask,
        channels,
        W,
        HAS_INITIAL,
        MARKS,
        VARLEN,
    )
    place = (sequence * channels + c[None, :]) * (W - 1) + i[:, None]
    tl.store(final + place, value, mask=(i < W - 1)[:, None] & mask[None, :])
