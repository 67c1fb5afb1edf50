"""`ssd_state_update` in Triton: the recurrence of Mamba-2 (arXiv 2405.21060, section 3) for one or a few tokens in one launch.

For each head, with delta = clamp(softplus(dt + dt_bias), *dt_limit)::

    h = exp(delta A) h + delta x B^T
    y = (h C + D x) silu(z)

A program keeps BP rows of one head's state in registers, (BP, BN), from the first token to the last. The operands of a token
are loaded while the token before it is computed.

Symbols: B batch, T tokens, S rows of the state, H heads, P head dim, N state size, G groups of B and C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import left_to_eager
from ..launch import launch
from ..selective_scan.triton_common import LOG2_E, softplus
from .eager import ssd_state_update_eager
from .triton_selective import dense, lead_strides

__all__ = ["ssd_state_update_triton"]

# elements of a program and of a warp: 16 for each thread, four loads of 16 bytes of a state in fp32
TILE, WARP_TILE = 2048, 512


@triton.jit
def _load_token(
    x,
    dt,
    B,
    C,
    z,
    rows,
    n,
    is_row,
    is_state,
    is_token,
    HAS_Z: tl.constexpr,
):
    """x (BP,), dt (), B, C (1, BN) and z (BP,) of one token, as they lie in memory."""
    b_x = tl.load(x + rows, mask=is_row, other=0.0)
    b_dt = tl.load(dt, mask=is_token, other=0.0)
    b_B = tl.load(B + n, mask=is_state, other=0.0)
    b_C = tl.load(C + n, mask=is_state, other=0.0)
    b_z = b_x
    if HAS_Z:
        b_z = tl.load(z + rows, mask=is_row, other=0.0)
    return b_x, b_dt, b_B, b_C, b_z


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def _ssd_state_update_kernel(
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
    smallest,
    largest,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    HAS_D: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    STEP_STATES: tl.constexpr,
):
    """y (B, T, H, P), the state in place and, with STEP_STATES, the state after each token (B, T, H, P, N)."""
    # inductor passes a float of Python as fp64, which everything after it would become too
    smallest = tl.cast(smallest, tl.float32)
    largest = tl.cast(largest, tl.float32)
    pid = tl.program_id(0)
    blocks: tl.constexpr = (P + BP - 1) // BP
    head = (pid // blocks) % HEADS
    entry = (pid // (blocks * HEADS)).to(tl.int64)
    p = (pid % blocks) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)[None, :]
    is_row = p < P
    is_state = n < N
    mask = is_row[:, None] & is_state
    row = entry
    if HAS_INDICES:
        row = tl.load(indices + entry * stride_indices).to(tl.int64)
    is_real = row >= 0
    # compared with 0, as the interpreter has integers here
    live = (mask & is_real) != 0
    rows = head * P + p
    cells = rows[:, None] * N + n
    held = state + row * stride_state + cells
    h = tl.load(held, mask=live, other=0.0).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32) * LOG2_E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.zeros((BP,), tl.float32)
    if HAS_D:
        if D_PER_CHANNEL:
            skip = tl.load(D + rows, mask=is_row, other=0.0).to(tl.float32)
        else:
            skip += tl.load(D + head).to(tl.float32)

    group = head // (HEADS // GROUPS)
    x += entry * stride_x_b
    dt += entry * stride_dt_b + head
    B += entry * stride_B_b + group * N
    C += entry * stride_C_b + group * N
    z += entry * stride_z_b
    y += entry * tokens * (HEADS * P)
    step_states += entry * tokens * (HEADS * P * N)
    b_x, b_dt, b_B, b_C, b_z = _load_token(x, dt, B, C, z, rows, n, is_row, is_state, tokens > 0, HAS_Z)
    for t in range(tokens):
        x += stride_x_t
        dt += stride_dt_t
        B += stride_B_t
        C += stride_C_t
        z += stride_z_t
        more = t + 1 < tokens
        next_x, next_dt, next_B, next_C, next_z = _load_token(
            x, dt, B, C, z, rows, n, (is_row & more) != 0, (is_state & more) != 0, more, HAS_Z
        )
        delta = b_dt.to(tl.float32) + bias
        if SOFTPLUS:
            delta = softplus(delta)
        # comparisons instead of minimum and maximum, which would hide a NaN
        delta = tl.where(delta < smallest, smallest, delta)
        delta = tl.where(delta > largest, largest, delta)
        inputs = b_x.to(tl.float32)
        h = tl.exp2(delta * rate) * h + (delta * inputs)[:, None] * b_B.to(tl.float32)
        out = tl.sum(h * b_C.to(tl.float32), 1) + skip * inputs
        if HAS_Z:
            gate = b_z.to(tl.float32)
            out *= gate * tl.sigmoid(gate)
        tl.store(y + rows, tl.where(is_real, out, 0.0).to(y.dtype.element_ty), mask=is_row)
        y += HEADS * P
        if STEP_STATES:
            tl.store(step_states + cells, tl.where(is_real, h, 0.0).to(step_states.dtype.element_ty), mask=mask)
            step_states += HEADS * P * N
        b_x = next_x
        b_dt = next_dt
        b_B = next_B
        b_C = next_C
        b_z = next_z
    tl.store(held, h.to(state.dtype.element_ty), mask=live)


def ssd_state_update_triton(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state_indices: Tensor | None = None,
    return_step_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_state_update` in Triton; arguments as there, assumed to be checked. fp64, N > 256 and empty inputs run in eager."""
    size = state.shape[3]
    if left_to_eager(x, state, dt, A, B, C, D, z, dt_bias, state_size=size):
        return ssd_state_update_eager(
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
            dt_limit=dt_limit,
            state_indices=state_indices,
            return_step_states=return_step_states,
        )
    single = x.dim() == 3
    tokens, heads, head_dim = 1 if single else x.shape[1], x.shape[-2], x.shape[-1]
    held = dense(state, 3)
    x, dt, B, C = dense(x, 2), dense(dt, 1), dense(B, 2), dense(C, 2)
    has_z = z is not None
    z = x if z is None else dense(z, 2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    step_states = y
    if return_step_states:
        step_states = torch.empty((*x.shape, size), dtype=state.dtype, device=x.device)
    block_n = 1 << (size - 1).bit_length()
    block_p = min(TILE // block_n, 1 << (head_dim - 1).bit_length())
    launch(
        _ssd_state_update_kernel,
        (x.shape[0] * heads * -(-head_dim // block_p),),
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
        dt_limit[0],
        dt_limit[1],
        HEADS=heads,
        P=head_dim,
        N=size,
        GROUPS=B.shape[-2],
        BP=block_p,
        BN=block_n,
        HAS_D=D is not None,
        D_PER_CHANNEL=D is not None and D.dim() == 2,
        HAS_Z=has_z,
        HAS_BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus,
        HAS_INDICES=state_indices is not None,
        STEP_STATES=return_step_states,
        num_warps=max(1, block_p * block_n // WARP_TILE),
    )
    if held is not state:
        state.copy_(held)
    return (y, step_states) if return_step_states else y
