"""What a layer does between its projections when it decodes, in one launch: `mamba_step` and `mamba2_step` in Triton.

`mamba_step`, per channel d (Mamba, arXiv 2312.00752, Algorithm 2), with (dt', B, C) = parameters, each divided by its
root mean square where `norm_eps` is given::

    delta = softplus(dt_weight_d . dt' + dt_bias_d)
    h = exp(-delta exp(A_log)) h + delta x B,    y = (C . h + D x) silu(z)

`mamba2_step`, per head (Mamba-2, arXiv 2405.21060, section 3): the same with one delta and A a head and states (P, N).

A program keeps the states of its channels in registers. Addresses inside a batch entry are 32-bit.

Symbols: B batch, D channels, N state size, R rank of dt, H heads, P head dim, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import left_to_eager
from ..early import launches_early
from ..norm.triton_norm import rms_norm_triton
from ..selective_scan.triton_common import LOG2_E, softplus
from .eager import mamba2_step_eager, mamba_step_eager

__all__ = ["mamba2_step_triton", "mamba_step_triton"]

# channels of a program of mamba_step
CHANNELS = 32
# and where there are many rows: one warp with 16 states a thread
PROJECTED_CHANNELS = 32
# from this many rows on, dt_proj is a product of matrices of its own: a program would read its weight for one row only
PROJECTED_ROWS = 8
# elements of a state in a program of mamba2_step, and in a warp
TILE, WARP_TILE = 2048, 512


@triton.jit
def _normed(value, size: tl.constexpr, eps, NORM: tl.constexpr):
    """`value`, zero beyond `size`, divided by its root mean square."""
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    return value


@triton.jit
def _mamba_step_kernel(
    state,
    x,
    parameters,
    dt_weight,
    dt_bias,
    A_log,
    D,
    z,
    y,
    stride_state,
    stride_x,
    stride_parameters,
    stride_z,
    norm_eps,
    DIM: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    NORM: tl.constexpr,
    PROJECTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y (B, D) and the state in place. With PROJECTED, dt_weight is dt (B, D) after `dt_proj`, without its bias."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    blocks: tl.constexpr = (DIM + BD - 1) // BD
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    n = tl.arange(0, BN)
    is_channel = d < DIM
    is_state = n < N
    mask = is_channel[:, None] & is_state[None, :]
    cells = d[:, None] * N + n[None, :]
    # what depends on the launch before comes last
    if not PROJECTED:
        weights = tl.load(
            dt_weight + d[:, None] * R + r[None, :], mask=is_channel[:, None] & (r < R)[None, :], other=0.0
        ).to(tl.float32)
    rate = -tl.exp(tl.load(A_log + cells, mask=mask, other=0.0).to(tl.float32)) * LOG2_E
    bias = tl.load(dt_bias + d, mask=is_channel, other=0.0).to(tl.float32)
    skip = tl.load(D + d, mask=is_channel, other=0.0).to(tl.float32)
    held = state + entry * stride_state + cells
    h = tl.load(held, mask=mask, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    parameters += entry * stride_parameters
    if PROJECTED:
        step = tl.load(dt_weight + entry * DIM + d, mask=is_channel, other=0.0).to(tl.float32)
    else:
        low = _normed(tl.load(parameters + r, mask=r < R, other=0.0).to(tl.float32), R, norm_eps, NORM)
        step = tl.sum(weights * low[None, :], 1)
    b_B = _normed(tl.load(parameters + R + n, mask=is_state, other=0.0).to(tl.float32), N, norm_eps, NORM)
    b_C = _normed(tl.load(parameters + R + N + n, mask=is_state, other=0.0).to(tl.float32), N, norm_eps, NORM)
    inputs = tl.load(x + entry * stride_x + d, mask=is_channel, other=0.0).to(tl.float32)
    gate = tl.load(z + entry * stride_z + d, mask=is_channel, other=0.0).to(tl.float32)
    delta = softplus(step + bias)
    h = tl.exp2(delta[:, None] * rate) * h + (delta * inputs)[:, None] * b_B[None, :]
    out = (tl.sum(h * b_C[None, :], 1) + skip * inputs) * (gate * tl.sigmoid(gate))
    tl.store(y + entry * DIM + d, out.to(y.dtype.element_ty), mask=is_channel)
    tl.store(held, h.to(state.dtype.element_ty), mask=mask)


def mamba_step_triton(
    state: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    norm_eps: float | None = None,
) -> Tensor:
    """`mamba_step` in Triton; arguments as there, assumed to be checked. fp64 and N > 256 run in eager."""
    (batch, channels), size = x.shape, A_log.shape[1]
    if not state[0].is_contiguous() or left_to_eager(x, state, parameters, dt_weight, A_log, state_size=size):
        return mamba_step_eager(state, x, parameters, dt_weight, dt_bias, A_log, D, z, norm_eps=norm_eps)
    x, z, parameters = (v if v.stride(1) == 1 else v.contiguous() for v in (x, z, parameters))
    rank = dt_weight.shape[1]
    projected = batch >= PROJECTED_ROWS
    if projected:
        low = parameters[:, :rank]
        dt_weight = F.linear(low if norm_eps is None else rms_norm_triton(low, None, norm_eps), dt_weight)
    block = PROJECTED_CHANNELS if projected else CHANNELS
    early = launches_early(x)
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    _mamba_step_kernel[(batch * triton.cdiv(channels, block),)](
        state,
        x,
        parameters,
        dt_weight.contiguous(),
        dt_bias,
        A_log,
        D,
        z,
        y,
        state.stride(0),
        x.stride(0),
        parameters.stride(0),
        z.stride(0),
        norm_eps or 0.0,
        DIM=channels,
        N=size,
        R=rank,
        BD=block,
        BN=triton.next_power_of_2(size),
        BR=triton.next_power_of_2(rank),
        NORM=norm_eps is not None,
        PROJECTED=projected,
        EARLY=early,
        num_warps=1 if projected else 4,
        **({"launch_pdl": True} if early else {}),
    )
    return y


@triton.jit
def _mamba2_step_kernel(
    state,
    xBC,
    dt,
    dt_bias,
    A_log,
    D,
    y,
    stride_state,
    stride_xBC,
    stride_dt,
    smallest,
    largest,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y (B, H P) and the state in place."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
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
    held = state + entry * stride_state + rows[:, None] * N + n[None, :]
    h = tl.load(held, mask=mask, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    xBC += entry * stride_xBC
    projections = xBC + HEADS * P + (head // (HEADS // GROUPS)) * N
    delta = softplus(tl.load(dt + entry * stride_dt + head).to(tl.float32) + bias)
    delta = tl.minimum(tl.maximum(delta, smallest), largest)
    inputs = tl.load(xBC + rows, mask=is_row, other=0.0).to(tl.float32)
    b_B = tl.load(projections + n, mask=is_state, other=0.0).to(tl.float32)
    b_C = tl.load(projections + GROUPS * N + n, mask=is_state, other=0.0).to(tl.float32)
    h = tl.exp2(delta * rate) * h + (delta * inputs)[:, None] * b_B[None, :]
    out = tl.sum(h * b_C[None, :], 1) + skip * inputs
    tl.store(y + entry * (HEADS * P) + rows, out.to(y.dtype.element_ty), mask=is_row)
    tl.store(held, h.to(state.dtype.element_ty), mask=mask)


def mamba2_step_triton(
    state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """`mamba2_step` in Triton; arguments as there, assumed to be checked. fp64 and N > 256 run in eager."""
    batch, heads, head_dim, size = state.shape
    if not state[0].is_contiguous() or left_to_eager(xBC, state, dt, A_log, state_size=size):
        return mamba2_step_eager(state, xBC, dt, dt_bias, A_log, D, groups, dt_limit=dt_limit)
    xBC, dt = (v if v.stride(1) == 1 else v.contiguous() for v in (xBC, dt))
    block_n = triton.next_power_of_2(size)
    block_p = min(max(1, TILE // block_n), triton.next_power_of_2(head_dim))
    y = torch.empty(batch, heads * head_dim, dtype=xBC.dtype, device=xBC.device)
    early = launches_early(xBC)
    _mamba2_step_kernel[(batch * heads * triton.cdiv(head_dim, block_p),)](
        state,
        xBC,
        dt,
        dt_bias,
        A_log,
        D,
        y,
        state.stride(0),
        xBC.stride(0),
        dt.stride(0),
        dt_limit[0],
        dt_limit[1],
        HEADS=heads,
        P=head_dim,
        N=size,
        GROUPS=groups,
        BP=block_p,
        BN=block_n,
        EARLY=early,
        num_warps=max(1, block_p * block_n // WARP_TILE),
        **({"launch_pdl": True} if early else {}),
    )
    return y
