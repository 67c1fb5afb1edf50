"""The ops that verify drafted tokens, in Triton: T tokens of a sequence in one launch, with the state after each of them.

A buffer holds what the last launch left: T states, or for the convolution the inputs before its tokens and its tokens. The number
of the last token that was accepted is read on the device; a program takes up the state after it, keeps its channels in
registers through all tokens, and leaves T new states in the same place. It reads what it will overwrite first and nobody else's
channels, so one buffer is enough. Recurrences as in `triton_steps.py`. All operands of all tokens are loaded before the first
token is computed, as only the state goes from one to the next.

Symbols: B batch, T tokens, D channels, N state size, R rank of dt, H heads, P head dim, G groups, K kept inputs, W taps.
"""

# inside kernels a name may change its type while the program is built: tuples grow in unrolled loops
# mypy: disable-error-code="assignment,misc,var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import left_to_eager
from ..norm.triton_norm import rms_norm_triton
from ..selective_scan.triton_common import LOG2_E, softplus
from .triton_steps import _normed
from .verify_eager import conv_verify_eager, mamba2_verify_eager, mamba_verify_eager

__all__ = ["conv_verify_triton", "mamba2_verify_triton", "mamba_verify_triton"]

# channels of a program of the convolution
CONV_CHANNELS = 128
# elements of a state in a program of mamba2_verify, and in a warp; mamba_verify has half a warp's in one warp, as its grid is small
TILE, WARP_TILE = 2048, 512


@triton.jit
def _conv_verify_kernel(
    history,
    accepted,
    x,
    weight,
    bias,
    y,
    stride_x_b,
    stride_x_t,
    DIM: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    BC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """y (B, T, D) and the history (B, K + T, D) in place."""
    blocks: tl.constexpr = (DIM + BC - 1) // BC
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    mask = c < DIM
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + c * W + w, mask=mask, other=0.0).to(tl.float32),)
    offset = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(accepted + entry) + 1
    history += entry * ((K + T) * DIM)
    known = ()
    for k in tl.static_range(K):
        known = known + (tl.load(history + (first + k) * DIM + c, mask=mask, other=0.0),)
    for t in tl.static_range(T):
        value = tl.load(x + entry * stride_x_b + t * stride_x_t + c, mask=mask, other=0.0)
        known = known + (value.to(history.dtype.element_ty),)
    for t in tl.static_range(T):
        sums = offset
        for w in tl.static_range(W):
            sums += taps[w] * known[K - W + 1 + t + w].to(tl.float32)
        if SILU:
            sums *= tl.sigmoid(sums)
        tl.store(y + (entry * T + t) * DIM + c, sums.to(y.dtype.element_ty), mask=mask)
    for i in tl.static_range(K + T):
        tl.store(history + i * DIM + c, known[i], mask=mask)


def conv_verify_triton(
    history: Tensor,
    accepted: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`conv_verify` in Triton; arguments as there, assumed to be checked. fp64 and long convolutions run in eager."""
    taps = weight.shape[1]
    if left_to_eager(x, history, weight, bias, taps=taps):
        return conv_verify_eager(history, accepted, x, weight, bias, activation=activation)
    batch, tokens, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    _conv_verify_kernel[(batch * triton.cdiv(channels, CONV_CHANNELS),)](
        history,
        accepted,
        x,
        weight.contiguous(),
        x if bias is None else bias,
        y,
        x.stride(0),
        x.stride(1),
        DIM=channels,
        T=tokens,
        K=history.shape[1] - tokens,
        W=taps,
        BC=CONV_CHANNELS,
        HAS_BIAS=bias is not None,
        SILU=activation is not None,
        num_warps=4,
    )
    return y


@triton.jit
def _mamba_verify_kernel(
    states,
    accepted,
    x,
    dt,
    parameters,
    dt_bias,
    A_log,
    D,
    z,
    y,
    stride_x_b,
    stride_x_t,
    stride_parameters_b,
    stride_parameters_t,
    stride_z_b,
    stride_z_t,
    norm_eps,
    T: tl.constexpr,
    DIM: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    NORM: tl.constexpr,
):
    """y (B, T, D) and the states (B, T, D, N) in place; dt (B, T, D) is after `dt_proj`, without its bias."""
    blocks: tl.constexpr = (DIM + BD - 1) // BD
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    is_channel = d < DIM
    is_state = n < N
    mask = is_channel[:, None] & is_state[None, :]
    cells = d[:, None] * N + n[None, :]
    rate = -tl.exp(tl.load(A_log + cells, mask=mask, other=0.0).to(tl.float32)) * LOG2_E
    bias = tl.load(dt_bias + d, mask=is_channel, other=0.0).to(tl.float32)
    skip = tl.load(D + d, mask=is_channel, other=0.0).to(tl.float32)
    states += entry * (T * DIM * N)
    row = tl.load(accepted + entry).to(tl.int64)
    h = tl.load(states + row * (DIM * N) + cells, mask=mask, other=0.0).to(tl.float32)
    deltas = ()
    inputs = ()
    gates = ()
    projections = ()
    for t in tl.static_range(T):
        token = parameters + entry * stride_parameters_b + t * stride_parameters_t + R
        b_B = _normed(tl.load(token + n, mask=is_state, other=0.0).to(tl.float32), N, norm_eps, NORM)
        b_C = _normed(tl.load(token + N + n, mask=is_state, other=0.0).to(tl.float32), N, norm_eps, NORM)
        gate = tl.load(z + entry * stride_z_b + t * stride_z_t + d, mask=is_channel, other=0.0).to(tl.float32)
        value = tl.load(x + entry * stride_x_b + t * stride_x_t + d, mask=is_channel, other=0.0).to(tl.float32)
        delta = tl.load(dt + (entry * T + t) * DIM + d, mask=is_channel, other=0.0).to(tl.float32)
        deltas = deltas + (softplus(delta + bias),)
        inputs = inputs + (value,)
        gates = gates + (gate * tl.sigmoid(gate),)
        projections = projections + (b_B, b_C)
    for t in tl.static_range(T):
        h = tl.exp2(deltas[t][:, None] * rate) * h + (deltas[t] * inputs[t])[:, None] * projections[2 * t][None, :]
        out = (tl.sum(h * projections[2 * t + 1][None, :], 1) + skip * inputs[t]) * gates[t]
        tl.store(y + (entry * T + t) * DIM + d, out.to(y.dtype.element_ty), mask=is_channel)
        # the next token goes on from what was stored, as it does where tokens come one by one
        kept = h.to(states.dtype.element_ty)
        tl.store(states + t * (DIM * N) + cells, kept, mask=mask)
        h = kept.to(tl.float32)


def mamba_verify_triton(
    states: Tensor,
    accepted: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    norm_eps: float | None = None,
) -> Tensor:
    """`mamba_verify` in Triton; arguments as there, assumed to be checked. fp64 and N > 256 run in eager."""
    (batch, tokens, channels), size = x.shape, A_log.shape[1]
    if left_to_eager(x, states, parameters, dt_weight, A_log, state_size=size):
        return mamba_verify_eager(states, accepted, x, parameters, dt_weight, dt_bias, A_log, D, z, norm_eps=norm_eps)
    x, z, parameters = (v if v.stride(2) == 1 else v.contiguous() for v in (x, z, parameters))
    rank = dt_weight.shape[1]
    low = parameters[..., :rank]
    # a program with dt_proj inside would hold its weight and the operands of T tokens, more than there are registers
    dt = F.linear(low if norm_eps is None else rms_norm_triton(low, None, norm_eps), dt_weight)
    block_n = triton.next_power_of_2(size)
    block_d = max(1, WARP_TILE // 2 // block_n)
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    _mamba_verify_kernel[(batch * triton.cdiv(channels, block_d),)](
        states,
        accepted,
        x,
        dt,
        parameters,
        dt_bias,
        A_log,
        D,
        z,
        y,
        x.stride(0),
        x.stride(1),
        parameters.stride(0),
        parameters.stride(1),
        z.stride(0),
        z.stride(1),
        norm_eps or 0.0,
        T=tokens,
        DIM=channels,
        N=size,
        R=rank,
        BD=block_d,
        BN=block_n,
        NORM=norm_eps is not None,
        num_warps=1,
    )
    return y


@triton.jit
def _mamba2_verify_kernel(
    states,
    accepted,
    xBC,
    dt,
    dt_bias,
    A_log,
    D,
    y,
    stride_xBC_b,
    stride_xBC_t,
    stride_dt_b,
    stride_dt_t,
    smallest,
    largest,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """y (B, T, H P) and the states (B, T, H, P, N) in place."""
    blocks: tl.constexpr = (P + BP - 1) // BP
    pid = tl.program_id(0)
    entry = (pid // (blocks * HEADS)).to(tl.int64)
    head = (pid // blocks) % HEADS
    p = (pid % blocks) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    is_row = p < P
    is_state = n < N
    mask = is_row[:, None] & is_state[None, :]
    rate = -tl.exp(tl.load(A_log + head).to(tl.float32)) * LOG2_E
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    rows = head * P + p
    cells = rows[:, None] * N + n[None, :]
    states += entry * (T * HEADS * P * N)
    row = tl.load(accepted + entry).to(tl.int64)
    h = tl.load(states + row * (HEADS * P * N) + cells, mask=mask, other=0.0).to(tl.float32)
    deltas = ()
    inputs = ()
    projections = ()
    for t in tl.static_range(T):
        token = xBC + entry * stride_xBC_b + t * stride_xBC_t
        group = token + HEADS * P + (head // (HEADS // GROUPS)) * N
        delta = softplus(tl.load(dt + entry * stride_dt_b + t * stride_dt_t + head).to(tl.float32) + bias)
        deltas = deltas + (tl.minimum(tl.maximum(delta, smallest), largest),)
        inputs = inputs + (tl.load(token + rows, mask=is_row, other=0.0).to(tl.float32),)
        b_B = tl.load(group + n, mask=is_state, other=0.0).to(tl.float32)
        b_C = tl.load(group + GROUPS * N + n, mask=is_state, other=0.0).to(tl.float32)
        projections = projections + (b_B, b_C)
    for t in tl.static_range(T):
        h = tl.exp2(deltas[t] * rate) * h + (deltas[t] * inputs[t])[:, None] * projections[2 * t][None, :]
        out = tl.sum(h * projections[2 * t + 1][None, :], 1) + skip * inputs[t]
        tl.store(y + (entry * T + t) * (HEADS * P) + rows, out.to(y.dtype.element_ty), mask=is_row)
        # the next token goes on from what was stored, as it does where tokens come one by one
        kept = h.to(states.dtype.element_ty)
        tl.store(states + t * (HEADS * P * N) + cells, kept, mask=mask)
        h = kept.to(tl.float32)


def mamba2_verify_triton(
    states: Tensor,
    accepted: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """`mamba2_verify` in Triton; arguments as there, assumed to be checked. fp64 and N > 256 run in eager."""
    batch, tokens, heads, head_dim, size = states.shape
    if left_to_eager(xBC, states, dt, A_log, state_size=size):
        return mamba2_verify_eager(states, accepted, xBC, dt, dt_bias, A_log, D, groups, dt_limit=dt_limit)
    xBC, dt = (v if v.stride(2) == 1 else v.contiguous() for v in (xBC, dt))
    block_n = triton.next_power_of_2(size)
    block_p = min(max(1, TILE // block_n), triton.next_power_of_2(head_dim))
    y = torch.empty(batch, tokens, heads * head_dim, dtype=xBC.dtype, device=xBC.device)
    _mamba2_verify_kernel[(batch * heads * triton.cdiv(head_dim, block_p),)](
        states,
        accepted,
        xBC,
        dt,
        dt_bias,
        A_log,
        D,
        y,
        xBC.stride(0),
        xBC.stride(1),
        dt.stride(0),
        dt.stride(1),
        dt_limit[0],
        dt_limit[1],
        T=tokens,
        HEADS=heads,
        P=head_dim,
        N=size,
        GROUPS=groups,
        BP=block_p,
        BN=block_n,
        num_warps=max(1, block_p * block_n // WARP_TILE),
    )
    return y
