"""The causal convolution in Triton, backward: gradients of inputs, weights and initial states.

The formulas are in `triton_common`. pre is found again for each of the W tokens that an input reaches; the overlapping reads
come from the caches.
"""

import triton
import triton.language as tl

from .triton_common import Tuning, conv_kernel, inputs, load_taps, sequence_of_state, sigmoid_of, token_info

__all__ = ["BACKWARD", "conv_bwd_kernel", "conv_initial_gradient_kernel"]

BACKWARD = Tuning(tokens=16, channels=128, tiles=8)


@triton.jit
def _gradient_of_sums(
    x,
    dy,
    initial,
    numbers,
    stride_t,
    stride_dy_t,
    t,
    real,
    number,
    begin,
    row,
    c,
    mask,
    channels,
    taps,
    offset,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
):
    """dpre (BT, BC) of tokens t, 0 where they are not real, and their inputs j tokens back, j = 0, 1, …"""
    place = t.to(tl.int64)[:, None] * stride_dy_t + c[None, :]
    gradient = tl.load(dy + place, mask=real[:, None] & mask[None, :], other=0.0).to(tl.float32)
    values = ()
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
        values = values + (value,)
    if SILU:
        pre = offset + values[0] * taps[0][None, :]
        for j in tl.static_range(1, W):
            pre += values[j] * taps[j][None, :]
        sigmoid = sigmoid_of(pre)
        gradient *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
    return gradient, values


@triton.jit
def _gradient_of_inputs(
    gradient,
    x,
    dy,
    initial,
    numbers,
    bounds,
    stride_t,
    stride_dy_t,
    s,
    wanted,
    number,
    row,
    c,
    mask,
    channels,
    length,
    taps,
    offset,
    W: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
):
    """`gradient` plus what comes to the inputs at positions s from the tokens s + FIRST, …, s + W - 1 of their sequence."""
    for i in tl.static_range(FIRST, W):
        real, number_i, begin_i = token_info(numbers, bounds, s + i, length, MARKS, VARLEN)
        reached = real & wanted & (number_i == number)
        dpre, _values = _gradient_of_sums(
            x,
            dy,
            initial,
            numbers,
            stride_t,
            stride_dy_t,
            s + i,
            reached,
            number_i,
            begin_i,
            row,
            c,
            mask,
            channels,
            taps,
            offset,
            W,
            HAS_INITIAL,
            MARKS,
            VARLEN,
            SILU,
        )
        gradient += dpre * taps[i][None, :]
    return gradient


@triton.jit
def _gradient_of_final(dfinal, s, wanted, end, state, c, mask, channels, W: tl.constexpr):
    """What comes to the inputs at positions s from the final states of a sequence that ends at `end`: (BT, BC)."""
    i = s - end + (W - 1)
    kept = (wanted & (i >= 0) & (i < W - 1)) != 0
    place = (state[:, None] * channels + c[None, :]) * (W - 1) + i[:, None]
    return tl.load(dfinal + place, mask=kept[:, None] & mask[None, :], other=0.0).to(tl.float32)


@conv_kernel
def conv_bwd_kernel(
    x,
    dy,
    weight,
    bias,
    initial,
    numbers,
    bounds,
    ends,
    dfinal,
    dx,
    sums,
    stride_b,
    stride_t,
    stride_dy_b,
    stride_dy_t,
    stride_weight_d,
    stride_weight_w,
    length,
    channels,
    n_tiles,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx of TILES tiles, and their share of the gradients of the weight and the bias: sums (B · n_tiles, W + 1, D).

    ends (B,): where the last sequence of each row ends, with MARKS.
    """
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    share = pid // blocks
    run = share % n_tiles
    row = share // n_tiles
    x += row * stride_b
    dy += row * stride_dy_b
    dx += row * length * channels
    numbers += row * length
    taps = load_taps(weight, stride_weight_d, stride_weight_w, c, mask, W)
    offset = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]
    dtaps = ()
    for _j in tl.static_range(W):
        dtaps = dtaps + (tl.zeros((BC,), tl.float32),)
    dbias = tl.zeros((BC,), tl.float32)
    for tile in range(0, TILES):
        t = ((run * TILES + tile) * BT).to(tl.int32) + tl.arange(0, BT)
        real, number, begin = token_info(numbers, bounds, t, length, MARKS, VARLEN)
        dpre, values = _gradient_of_sums(
            x,
            dy,
            initial,
            numbers,
            stride_t,
            stride_dy_t,
            t,
            real,
            number,
            begin,
            row,
            c,
            mask,
            channels,
            taps,
            offset,
            W,
            HAS_INITIAL,
            MARKS,
            VARLEN,
            SILU,
        )
        dbias += tl.sum(dpre, 0)
        more = ()
        for j in tl.static_range(W):
            more = more + (dtaps[j] + tl.sum(dpre * values[j], 0),)
        dtaps = more
        gradient = _gradient_of_inputs(
            dpre * taps[0][None, :],
            x,
            dy,
            initial,
            numbers,
            bounds,
            stride_t,
            stride_dy_t,
            t,
            real,
            number,
            row,
            c,
            mask,
            channels,
            length,
            taps,
            offset,
            W,
            1,
            HAS_INITIAL,
            MARKS,
            VARLEN,
            SILU,
        )
        if HAS_FINAL:
            end = t * 0 + length
            state = row + number.to(tl.int64) * 0
            wanted = real
            if MARKS:
                end = t * 0 + tl.load(ends + row)
                last = tl.load(numbers + tl.load(ends + row) - 1, mask=tl.load(ends + row) > 0, other=0) >> 1
                wanted = wanted & (number == last)
            if VARLEN:
                end = tl.load(bounds + number + 1, mask=real, other=0).to(tl.int32)
                state = number.to(tl.int64)
            gradient += _gradient_of_final(dfinal, t, wanted, end, state, c, mask, channels, W)
        offsets = t.to(tl.int64)[:, None] * channels + c[None, :]
        tl.store(dx + offsets, gradient, mask=(t < length)[:, None] & mask[None, :])
    sums += share * ((W + 1) * channels) + c
    for j in tl.static_range(W):
        tl.store(sums + (W - 1 - j) * channels, dtaps[j], mask=mask)
    tl.store(sums + W * channels, dbias, mask=mask)


@conv_kernel
def conv_initial_gradient_kernel(
    x,
    dy,
    weight,
    bias,
    initial,
    numbers,
    bounds,
    ends,
    dfinal,
    dinitial,
    stride_b,
    stride_t,
    stride_dy_b,
    stride_dy_t,
    stride_weight_d,
    stride_weight_w,
    length,
    channels,
    W: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
):
    """dinitial (S, D, W - 1): the gradient of the inputs before each sequence; with MARKS of each row's first."""
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    sequence = pid // blocks
    row, last, begin, end = sequence_of_state(numbers, bounds, ends, sequence, length, MARKS, VARLEN)
    x += row * stride_b
    dy += row * stride_dy_b
    numbers += row * length
    taps = load_taps(weight, stride_weight_d, stride_weight_w, c, mask, W)
    offset = tl.zeros((BT, BC), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]
    i = tl.arange(0, BT)
    s = begin - (W - 1) + i
    wanted = i < W - 1
    number = i * 0
    if VARLEN:
        number += sequence.to(tl.int32)
    gradient = tl.zeros((BT, BC), tl.float32)
    # tokens before `begin` belong to another sequence, or are none
    gradient = _gradient_of_inputs(
        gradient,
        x,
        dy,
        initial,
        numbers,
        bounds,
        stride_t,
        stride_dy_t,
        s,
        wanted,
        number,
        row,
        c,
        mask,
        channels,
        length,
        taps,
        offset,
        W,
        1,
        True,
        MARKS,
        VARLEN,
        SILU,
    )
    if HAS_FINAL:
        if MARKS:
            wanted = (wanted & (last == 0)) != 0
        gradient += _gradient_of_final(dfinal, s, wanted, end + i * 0, sequence + i * 0, c, mask, channels, W)
    place = (sequence * channels + c[None, :]) * (W - 1) + i[:, None]
    tl.store(dinitial + place, gradient, mask=(i < W - 1)[:, None] & mask[None, :])
