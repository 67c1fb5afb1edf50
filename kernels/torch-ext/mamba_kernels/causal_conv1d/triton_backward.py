"""The causal convolution in Triton, backward: gradients of inputs, weights and initial states.

The formulas are in `triton_common`. A program walks on for W - 1 tokens beyond its run, since these send gradients back to it.
While it walks it holds the inputs of the last W - 1 tokens and what has come together of their gradients.
"""

import triton
import triton.language as tl

from .triton_common import (
    Tuning,
    both,
    conv_kernel,
    is_real,
    load_taps,
    restarted,
    sequence_at,
    sequence_of_state,
    sigmoid_of,
    window_before,
)

__all__ = ["BACKWARD", "conv_bwd_kernel", "conv_initial_gradient_kernel"]

BACKWARD = Tuning(channels=64, tokens=8, longest=16)


@triton.jit
def _gradient_of_sum(gradient, seen, taps, offset, W: tl.constexpr, SILU: tl.constexpr):
    """dpre of a token from the gradient of its output and the inputs that it sees."""
    if SILU:
        pre = offset
        for j in tl.static_range(W):
            pre += seen[j] * taps[j]
        sigmoid = sigmoid_of(pre)
        gradient *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
    return gradient


@triton.jit
def _gradient_of_final(dfinal, s, wanted, end, state, c, mask, channels, W: tl.constexpr):
    """What comes to the input at position s from the final states of a sequence that ends at `end`: (BC,)."""
    i = s - end + (W - 1)
    kept = wanted & (i >= 0) & (i < W - 1)
    place = dfinal + (state * channels + c) * (W - 1) + i
    return tl.load(place, mask=both(mask, kept), other=0.0).to(tl.float32)


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
    stride_dx_b,
    stride_dx_t,
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
    HAS_FINAL: tl.constexpr,
    MARKS: tl.constexpr,
    VARLEN: tl.constexpr,
    SILU: tl.constexpr,
    EIGHTHS: tl.constexpr,
):
    """dx of `run` tokens, and their share of the gradients of the weight and the bias: sums (B · n_runs, W or W + 1, D).

    ends (B,): where the last sequence of each row ends, with MARKS. run + W - 1 is best a multiple of K.
    """
    if EIGHTHS:
        # as in the forward
        stride_t = stride_t // 8 * 8
        stride_b = stride_b // 8 * 8
        stride_dx_t = stride_dx_t // 8 * 8
        stride_dx_b = stride_dx_b // 8 * 8
    blocks = tl.cdiv(channels, BC)
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % blocks).to(tl.int32) * BC + tl.arange(0, BC)
    mask = c < channels
    share = pid // blocks
    start = (share % n_runs).to(tl.int32) * run
    stop = tl.minimum(start + run, length)
    row = share // n_runs
    x += row * stride_b
    dy += row * stride_dy_b
    dx += row * stride_dx_b
    numbers += row * length
    taps = load_taps(weight, c, mask, W, STRIDE_D, STRIDE_W)
    zeros = tl.zeros((BC,), tl.float32)
    offset = zeros
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
    # of the tokens 1, …, W - 1 back: the gradient so far, and whether the present token can add to it
    gathered = ()
    reached = ()
    dtaps = (zeros,)
    for _j in tl.static_range(1, W):
        gathered = gathered + (zeros,)
        reached = reached + (start >= 0,)
        dtaps = dtaps + (zeros,)
    dbias = zeros
    for i in range(0, tl.cdiv(stop - start + (W - 1), K)):
        first = start + i * K
        loaded = ()
        incoming = ()
        for k in tl.static_range(K):
            t = first + k
            real = is_real(numbers, t, length, MARKS)
            loaded = loaded + (tl.load(x + t.to(tl.int64) * stride_t + c, mask=both(mask, real), other=0.0),)
            incoming = incoming + (tl.load(dy + t.to(tl.int64) * stride_dy_t + c, mask=both(mask, real), other=0.0),)
        for k in tl.static_range(K):
            t = first + k
            if MARKS or VARLEN:
                number = sequence_at(numbers, t, length, MARKS, VARLEN)
                changed = number != before
                window = restarted(window, initial, changed, number, c, mask, channels, W, HAS_INITIAL and VARLEN)
                before = number
            seen = (loaded[k].to(tl.float32),) + window
            dpre = _gradient_of_sum(incoming[k].to(tl.float32), seen, taps, offset, W, SILU)
            counted = tl.where(t < stop, dpre, 0.0)
            dbias += counted
            more = ()
            for j in tl.static_range(W):
                more = more + (dtaps[j] + counted * seen[j],)
            dtaps = more
            sums_of_tokens = (dpre * taps[0],)
            for j in tl.static_range(1, W):
                part = dpre * taps[j]
                if MARKS or VARLEN:
                    part = tl.where(reached[j - 1] & (changed == 0), part, 0.0)
                sums_of_tokens = sums_of_tokens + (gathered[j - 1] + part,)
            s = t - (W - 1)
            gradient = sums_of_tokens[W - 1]
            if HAS_FINAL:
                wanted = is_real(numbers, s, length, MARKS)
                end = (s * 0 + length).to(tl.int32)
                state = row
                if MARKS:
                    end = tl.load(ends + row)
                    last = tl.load(numbers + end - 1, mask=end > 0, other=0) >> 1
                    wanted = wanted & (sequence_at(numbers, s, length, MARKS, VARLEN) == last)
                if VARLEN:
                    state = sequence_at(numbers, s, length, MARKS, VARLEN).to(tl.int64)
                    end = tl.load(bounds + state + 1).to(tl.int32)
                gradient += _gradient_of_final(dfinal, s, wanted, end, state, c, mask, channels, W)
            tl.store(dx + s.to(tl.int64) * stride_dx_t + c, gradient, mask=both(mask, (s >= start) & (s < stop)))
            shifted = ()
            kept = ()
            alive = ()
            for j in tl.static_range(W - 1):
                shifted = shifted + (seen[j],)
                kept = kept + (sums_of_tokens[j],)
                if MARKS or VARLEN:
                    if j == 0:
                        alive = alive + (is_real(numbers, t, length, MARKS),)
                    else:
                        alive = alive + (reached[j - 1] & (changed == 0),)
                else:
                    alive = alive + (reached[j],)
            window = shifted
            gathered = kept
            reached = alive
    sums += share * ((W + HAS_BIAS) * channels) + c
    for j in tl.static_range(W):
        tl.store(sums + (W - 1 - j) * channels, dtaps[j], mask=mask)
    if HAS_BIAS:
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
    length,
    channels,
    STRIDE_D: tl.constexpr,
    STRIDE_W: tl.constexpr,
    W: tl.constexpr,
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
    taps = load_taps(weight, c, mask, W, STRIDE_D, STRIDE_W)
    offset = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    window = ()
    gradients = ()
    for i in tl.static_range(W - 1):
        place = initial + (sequence * channels + c) * (W - 1)
        window = window + (tl.load(place + (W - 2 - i), mask=mask, other=0.0).to(tl.float32),)
        gradient = tl.zeros((BC,), tl.float32)
        if HAS_FINAL:
            # a sequence of fewer than W - 1 tokens hands on inputs from before it
            wanted = end >= begin
            if MARKS:
                wanted = wanted & (last == 0)
            gradient = _gradient_of_final(dfinal, begin - (W - 1) + i, wanted, end, sequence, c, mask, channels, W)
        gradients = gradients + (gradient,)
    for k in tl.static_range(W - 1):
        t = begin + k
        # with MARKS a row's first sequence ends where the number changes, else it is known
        real = is_real(numbers, t, length, MARKS)
        if MARKS:
            real = real & (sequence_at(numbers, t, length, MARKS, VARLEN) == 0)
        if VARLEN:
            real = real & (t < end)
        value = tl.load(x + t.to(tl.int64) * stride_t + c, mask=both(mask, real), other=0.0).to(tl.float32)
        dout = tl.load(dy + t.to(tl.int64) * stride_dy_t + c, mask=both(mask, real), other=0.0).to(tl.float32)
        seen = (value,) + window
        dpre = _gradient_of_sum(dout, seen, taps, offset, W, SILU)
        shifted = ()
        more = ()
        for i in tl.static_range(W - 1):
            shifted = shifted + (seen[i],)
            # input i lies k + W - 1 - i tokens before token t
            if i >= k:
                more = more + (gradients[i] + dpre * taps[k + W - 1 - i],)
            else:
                more = more + (gradients[i],)
        window = shifted
        gradients = more
    for i in tl.static_range(W - 1):
        tl.store(dinitial + (sequence * channels + c) * (W - 1) + i, gradients[i], mask=mask)
