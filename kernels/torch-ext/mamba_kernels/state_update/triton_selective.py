"""`selective_state_update` in Triton: Algorithm 2 of Mamba (arXiv 2312.00752) for one or a few tokens in one launch.

For each channel, with delta = softplus(dt + dt_bias)::

    h = exp(delta A) h + delta B x
    y = (C . h + D x) silu(z)

A program keeps the states of BD channels of one batch entry in registers, (BD, BN), from the first token to the last. The
operands of a token are loaded while the token before it is computed.

Symbols: B batch, T tokens, S rows of the state, D channels, N state size, G groups of B and C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import left_to_eager
from ..launch import launch
from ..selective_scan.triton_common import LOG2_E, softplus
from .eager import selective_state_update_eager

__all__ = ["dense", "lead_strides", "selective_state_update_triton"]

# elements of a program and of a warp: 16 for each thread, four loads of 16 bytes of a state in fp32
TILE, WARP_TILE = 512, 512


@triton.jit
def _load_token(
    x,
    dt,
    B,
    C,
    z,
    d,
    projection,
    is_channel,
    is_state,
    HAS_Z: tl.constexpr,
):
    """x, dt (BD,), B, C (1 or BD, BN) and z (BD,) of one token, as they lie in memory."""
    b_x = tl.load(x + d, mask=is_channel, other=0.0)
    b_dt = tl.load(dt + d, mask=is_channel, other=0.0)
    b_B = tl.load(B + projection, mask=is_state, other=0.0)
    b_C = tl.load(C + projection, mask=is_state, other=0.0)
    b_z = b_x
    if HAS_Z:
        b_z = tl.load(z + d, mask=is_channel, other=0.0)
    return b_x, b_dt, b_B, b_C, b_z


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _selective_state_update_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    indices,
    y,
    step_states,
    tokens,
    stride_state,
    stride_x_b,
    stride_x_t,
    stride_dt_b,
    stride_dt_t,
    stride_B_b,
    stride_B_t,
    stride_C_b,
    stride_C_t,
    stride_z_b,
    stride_z_t,
    stride_indices,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    STEP_STATES: tl.constexpr,
):
    """y (B, T, D), the state in place and, with STEP_STATES, the state after each token (B, T, D, N)."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (CHANNELS + BD - 1) // BD
    entry = (pid // blocks).to(tl.int64)
    d = (pid % blocks) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)[None, :]
    is_channel = d < CHANNELS
    mask = is_channel[:, None] & (n < N)
    row = entry
    if HAS_INDICES:
        row = tl.load(indices + entry * stride_indices).to(tl.int64)
    is_real = row >= 0
    # compared with 0, as the interpreter has integers here
    live = (mask & is_real) != 0
    cells = d[:, None] * N + n
    held = state + row * stride_state + cells
    h = tl.load(held, mask=live, other=0.0).to(tl.float32)
    rate = tl.load(A + cells, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=is_channel, other=0.0).to(tl.float32)
    skip = tl.zeros((BD,), tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=is_channel, other=0.0).to(tl.float32)
    if GROUPS == 1:
        projection = n
        is_state = n < N
    else:
        projection = (d // (CHANNELS // GROUPS))[:, None] * N + n
        is_state = mask

    x += entry * stride_x_b
    dt += entry * stride_dt_b
    B += entry * stride_B_b
    C += entry * stride_C_b
    z += entry * stride_z_b
    y += entry * tokens * CHANNELS
    step_states += entry * tokens * CHANNELS * N
    b_x, b_dt, b_B, b_C, b_z = _load_token(x, dt, B, C, z, d, projection, is_channel, is_state, HAS_Z)
    for t in range(tokens):
        x += stride_x_t
        dt += stride_dt_t
        B += stride_B_t
        C += stride_C_t
        z += stride_z_t
        more = t + 1 < tokens
        next_x, next_dt, next_B, next_C, next_z = _load_token(
            x, dt, B, C, z, d, projection, (is_channel & more) != 0, (is_state & more) != 0, HAS_Z
        )
        delta = b_dt.to(tl.float32) + bias
        if SOFTPLUS:
            delta = softplus(delta)
        inputs = b_x.to(tl.float32)
        h = tl.exp2(delta[:, None] * rate) * h + (delta * inputs)[:, None] * b_B.to(tl.float32)
        out = tl.sum(h * b_C.to(tl.float32), 1) + skip * inputs
        if HAS_Z:
            gate = b_z.to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + d, tl.where(is_real, out, 0.0).to(y.dtype.element_ty), mask=is_channel)
        y += CHANNELS
        if STEP_STATES:
            tl.store(step_states + cells, tl.where(is_real, h, 0.0).to(step_states.dtype.element_ty), mask=mask)
            step_states += CHANNELS * N
        b_x = next_x
        b_dt = next_dt
        b_B = next_B
        b_C = next_C
        b_z = next_z
    tl.store(held, h.to(state.dtype.element_ty), mask=live)


def dense(value: Tensor, inner: int) -> Tensor:
    """`value` with its last `inner` dimensions contiguous; a copy only where they are not."""
    if value.is_contiguous():
        return value
    expected = 1
    for axis in range(1, inner + 1):
        size = value.shape[-axis]
        if size != 1 and value.stride(-axis) != expected:
            return value.contiguous()
        expected *= size
    return value


def lead_strides(value: Tensor, single: bool) -> tuple[int, int]:
    """Strides of batch entries and tokens; 0 for tokens where there is only one."""
    return value.stride(0), 0 if single else value.stride(1)


def selective_state_update_triton(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    state_indices: Tensor | None = None,
    return_step_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_state_update` in Triton; arguments as there, assumed to be checked. fp64, N > 256 and empty inputs run in eager."""
    size = A.shape[1]
    if left_to_eager(x, state, dt, A, B, C, D, z, dt_bias, state_size=size):
        return selective_state_update_eager(
            state,
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            state_indices=state_indices,
            return_step_states=return_step_states,
        )
    single = x.dim() == 2
    grouped = B.dim() > x.dim()
    tokens, channels = 1 if single else x.shape[1], x.shape[-1]
    held = dense(state, 2)
    x, dt, B, C = dense(x, 1), dense(dt, 1), dense(B, 1 + grouped), dense(C, 1 + grouped)
    has_z = z is not None
    z = x if z is None else dense(z, 1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    step_states = y
    if return_step_states:
        step_states = torch.empty((*x.shape, size), dtype=state.dtype, device=x.device)
    block_n = 1 << (size - 1).bit_length()
    block_d = TILE // block_n
    launch(
        _selective_state_update_kernel,
        (x.shape[0] * -(-channels // block_d),),
        held,
        x,
        dt,
        A.contiguous(),
        B,
        C,
        x if D is None else D.contiguous(),
        z,
        x if dt_bias is None else dt_bias.contiguous(),
        x if state_indices is None else state_indices,
        y,
        step_states,
        tokens,
        held.stride(0),
        *lead_strides(x, single),
        *lead_strides(dt, single),
        *lead_strides(B, single),
        *lead_strides(C, single),
        *lead_strides(z, single),
        0 if state_indices is None else state_indices.stride(0),
        CHANNELS=channels,
        N=size,
        GROUPS=B.shape[-2] if grouped else 1,
        BD=block_d,
        BN=block_n,
        HAS_D=D is not None,
        HAS_Z=has_z,
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus,
        HAS_INDICES=state_indices is not None,
        STEP_STATES=return_step_states,
        num_warps=max(1, block_d * block_n // WARP_TILE),
    )
    if held is not state:
        state.copy_(held)
    return (y, step_states) if return_step_states else y
