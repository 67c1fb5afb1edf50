"""The causal convolution in Triton, forward: outputs and final states. The formulas are in `triton_common`."""

import triton.language as tl

from .triton_common import (
    Tuning,
    both,
    conv_kernel,
    input_at,
    is_real,
    load_taps,
    restarted,
    sequence_at,
    sequence_of_state,
    sigmoid_of,
    window_before,
)

__all__ = ["FORWARD", "conv_final_states_kernel", "conv_fwd_kernel"]

FORWARD = Tuning(channels=64, tokens=8, longest=4)


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
    length,
    channels,
    run,
    n_runs,
    STRIDE_D: tl.constexpr,
    STRIDE_W: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
    EIGHTHS: tl.constexpr,
):
    """y (B, L, D) of `run` tokens, a multiple of K."""
    if EIGHTHS:
        # Triton knows of 16: rows of a part of a projection often start at multiples of 8, and so do pairs of channels
        stride_t = stride_t // 8 * 8
        stride_b = stride_b // 8 * 8
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    start = ((pid // blocks) % n_runs).to(tl.int32) * run
    row = pid // (blocks * n_runs)
    x += row * stride_b
    numbers += row * length
    y += row * length * channels
    taps = load_taps(weight, c, mask, W, STRIDE_D, STRIDE_W)
    offset = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    window = window_before(
        x,
        initial,
        numbers,
        bounds,
        stride_t,
        start,
        row,
        c,
        mask,
        length,
        channels,
        W,
        HAS_INITIAL,
        MARKS,
        VARLEN,
    )
    before = sequence_at(numbers, start, length, MARKS, VARLEN)
    for i in range(0, tl.cdiv(tl.minimum(run, length - start), K)):
        first = start + i * K
        loaded = ()
        for k in tl.static_range(K):
            t = first + k
            real = is_real(numbers, t, length, MARKS)
            loaded = loaded + (tl.load(x + t.to(tl.int64) * stride_t + c, mask=both(mask, real), other=0.0),)
        for k in tl.static_range(K):
            t = first + k
            if MARKS or VARLEN:
                number = sequence_at(numbers, t, length, MARKS, VARLEN)
                window = restarted(
                    window, initial, number != before, number, c, mask, channels, W, HAS_INITIAL and VARLEN
                )
                before = number
            seen = (loaded[k].to(tl.float32),) + window
            pre = offset
            for j in tl.static_range(W):
                pre += seen[j] * taps[j]
            if SILU:
                pre *= sigmoid_of(pre)
            if MARKS:
                pre = tl.where(is_real(numbers, t, length, MARKS), pre, 0.0)
            tl.store(y + t.to(tl.int64) * channels + c, pre, mask=both(mask, (t < length)))
            shifted = ()
            for j in tl.static_range(W - 1):
                shifted = shifted + (seen[j],)
            window = shifted


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
    for i in tl.static_range(W - 1):
        value = input_at(
            x + row * stride_b,
            initial,
            numbers + row * length,
            stride_t,
            end - (W - 1) + i,
            number,
            begin,
            sequence,
            c,
            mask,
            length,
            channels,
            W,
            HAS_INITIAL,
            MARKS,
        )
        tl.store(final + (sequence * channels + c) * (W - 1) + i, value, mask=mask)
