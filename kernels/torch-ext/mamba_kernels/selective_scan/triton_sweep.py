# mypy: disable-error-code="assignment, misc"
"""The walk before the backward of the selective scan: the state before every tile of a chunk.

What a chunk adds to the gradient of the state before it, sum_t exp(A sum_{r=s..t} delta_r) C_t g_t, needs the products of the same
decays, so that it comes with the states for three instructions a step in place of a pass of its own.
"""

import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import (
    LOG2_E,
    Plan,
    ScanInputs,
    Tuning,
    ceil_div,
    channels_of,
    chunk_bounds,
    combine,
    decay_of,
    load_projection,
    load_tile,
    row_of,
    scan_kernel,
    silu_parts,
    steps_of_tile,
    strides_or_zeros,
    tokens_of_tile,
    wide,
)

__all__ = ["launch_tile_states"]


@scan_kernel
def _tile_states_kernel(
    x,
    dt,
    A_t,
    B,
    C,
    z,
    grad_y,
    dt_bias,
    flags,
    table,
    starts,
    tile_states,
    local,
    passed,
    stride_x_b,
    stride_x_t: tl.constexpr,
    stride_x_d,
    stride_dt_b,
    stride_dt_t: tl.constexpr,
    stride_dt_d,
    stride_A_n,
    stride_A_d,
    stride_z_b,
    stride_z_t: tl.constexpr,
    stride_z_d,
    stride_y_b,
    stride_y_t: tl.constexpr,
    stride_y_d,
    stride_B_b,
    stride_B_t: tl.constexpr,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_t: tl.constexpr,
    stride_C_g,
    stride_C_n,
    length,
    channels,
    chunk,
    n_chunks,
    first_slot,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    NS: tl.constexpr,
    EVERY: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FLAGS: tl.constexpr,
    VARLEN: tl.constexpr,
    PACKED: tl.constexpr,
    GRADIENTS: tl.constexpr,
):
    """Write the state before every `EVERY` tiles of K tokens to `tile_states` (slots, tiles, N, D), NS states at a time.

    With GRADIENTS also what `chunk_states_kernel` makes for the backward, from the same exponentials: `local` and `passed`.
    """
    blocks = tl.cdiv(channels // GROUPS, BD)
    pid = tl.program_id(0).to(tl.int64)
    n = (pid % (N // NS)).to(tl.int32) * NS
    pid = pid // (N // NS)
    block = (pid % (blocks * GROUPS)).to(tl.int32)
    local_slot = pid // (blocks * GROUPS)
    slot = local_slot + first_slot
    row, state, start, end, _is_first, _is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)
    if state < 0:
        return
    group, d, mask = channels_of(block, channels, GROUPS, BD, EVEN)
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    x += row * stride_x_b + d * stride_x_d
    dt += row * stride_dt_b + d * stride_dt_d
    z += row * stride_z_b + d * stride_z_d
    grad_y += row * stride_y_b + d * stride_y_d
    C += row * stride_C_b + group.to(tl.int64) * stride_C_g
    B += row * stride_B_b + group.to(tl.int64) * stride_B_g
    flags += row * length
    starts += slot * N * channels
    tile_states += local_slot * tl.cdiv(chunk, K * EVERY) * N * channels
    k = tl.arange(0, K)[:, None]
    A_n = ()
    h = ()
    sent = ()
    for j in tl.static_range(NS):
        A_n = A_n + (
            tl.load(A_t + wide(n + j) * stride_A_n + d * stride_A_d, mask=mask, other=0.0).to(tl.float32) * LOG2_E,
        )
        h = h + (tl.load(starts + (n + j) * channels + d, mask=mask, other=0.0),)
        sent = sent + (tl.zeros((BD,), tl.float32),)
    # the steps so far, and whether no sequence started yet
    taken = tl.zeros((BD,), tl.float32)
    joined = start >= 0
    for i in range(0, tl.cdiv(end - start, K)):
        if i % EVERY == 0:
            for j in tl.static_range(NS):
                tl.store(
                    tile_states + (wide(i // EVERY) * N + n + j) * channels + d,
                    h[j].to(tile_states.dtype.element_ty),
                    mask=mask,
                )
        begin = start + i * K
        t = begin + k
        _within, real, reset = tokens_of_tile(flags, t, end, FLAGS, WHOLE)
        inside = real & mask[None, :]
        delta = steps_of_tile(load_tile(dt, begin, k, stride_dt_t, inside), bias, real, SOFTPLUS)
        u = delta * load_tile(x, begin, k, stride_x_t, inside).to(tl.float32)
        B_n = load_projection(B, begin, k, stride_B_t, stride_B_n, n, real, NS, PACKED)
        g = u
        C_n = B_n
        if GRADIENTS:
            g = load_tile(grad_y, begin, k, stride_y_t, inside).to(tl.float32)
            if HAS_Z:
                silu, _sigmoid = silu_parts(load_tile(z, begin, k, stride_z_t, inside).to(tl.float32))
                g *= silu
            C_n = load_projection(C, begin, k, stride_C_t, stride_C_n, n, real, NS, PACKED)
        ends = ()
        sums = ()
        for j in tl.static_range(NS):
            decay = decay_of(delta, A_n[j], reset, FLAGS)
            b = u * B_n[j]
            b = tl.where(k == 0, decay * h[j] + b, b)
            through, states = tl.associative_scan((decay, b), 0, combine)
            ends = ends + (row_of(states, k, K - 1),)
            if GRADIENTS:
                # an exponential of its own, as rounding would add up in a product of many decays
                weight = tl.exp2(taken * A_n[j])
                if FLAGS:
                    weight = tl.where(joined, weight, 0.0)
                sums = sums + (sent[j] + weight * tl.sum(through * (g * C_n[j]), 0),)
        h = ends
        if GRADIENTS:
            sent = sums
            taken += tl.sum(delta, 0)
            if FLAGS:
                joined = joined & (tl.sum(reset.to(tl.int32)) == 0)
    if GRADIENTS:
        kept = tl.where(joined, 1.0, 0.0)
        for j in tl.static_range(NS):
            offsets = (slot * N + n + j) * channels + d
            tl.store(local + offsets, sent[j], mask=mask)
            tl.store(passed + offsets, tl.exp2(taken * A_n[j]) * kept, mask=mask)


def launch_tile_states(
    inputs: ScanInputs,
    plan: Plan,
    table: Tensor | None,
    starts: Tensor,
    tile_states: Tensor,
    first_slot: int,
    every: int,
    tuning: Tuning,
    parts: int,
    grad_y: Tensor | None = None,
    local: Tensor | None = None,
    passed: Tensor | None = None,
) -> None:
    """Fill `tile_states` (slots, tiles, N, D), the states before every `every` tokens, for the chunks from `first_slot` on.

    With `grad_y` (B, L, D) also `local` and `passed` (slots, N, D), for `pass_states`. A program has `parts` states.
    """
    blocks = plan.groups * ceil_div(plan.channels // plan.groups, tuning.channels)
    tile = min(tuning.tile, every)
    slots = min(tile_states.shape[0], plan.n_slots - first_slot)
    placeholder = inputs.A_t
    launch(
        _tile_states_kernel,
        (slots * blocks * (plan.size // parts),),
        inputs.x,
        inputs.dt,
        inputs.A_t,
        inputs.B,
        inputs.C,
        inputs.x if inputs.z is None else inputs.z,
        inputs.x if grad_y is None else grad_y,
        placeholder if inputs.dt_bias is None else inputs.dt_bias,
        placeholder if inputs.flags is None else inputs.flags,
        placeholder if table is None else table,
        starts,
        tile_states,
        placeholder if local is None else local,
        placeholder if passed is None else passed,
        *inputs.x.stride(),
        *inputs.dt.stride(),
        *inputs.A_t.stride(),
        *strides_or_zeros(inputs.z, 3),
        *strides_or_zeros(grad_y, 3),
        *strides_or_zeros(inputs.B, 4),
        *strides_or_zeros(inputs.C, 4),
        plan.length,
        plan.channels,
        plan.chunk,
        plan.n_chunks,
        first_slot,
        N=plan.size,
        GROUPS=plan.groups,
        BD=tuning.channels,
        K=tile,
        WHOLE=plan.whole,
        EVEN=plan.channels // plan.groups % tuning.channels == 0,
        NS=parts,
        EVERY=every // tile,
        HAS_Z=inputs.z is not None,
        HAS_BIAS=inputs.dt_bias is not None,
        SOFTPLUS=inputs.dt_softplus,
        FLAGS=inputs.flags is not None,
        VARLEN=table is not None,
        PACKED=plan.packed and parts % 4 == 0,
        GRADIENTS=grad_y is not None,
        **tuning.options(),
    )
