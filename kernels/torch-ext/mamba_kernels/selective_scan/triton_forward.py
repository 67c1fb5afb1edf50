"""Forward of the selective scan in Triton (Mamba, arXiv 2312.00752, Algorithm 2).

For each channel, with delta = softplus(dt + dt_bias)::

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        (N states)
    y_t = (C_t . h_t + D x_t) silu(z_t)

A program scans BD channels of one chunk of time, one token after the other, with its states in registers. Where batch and
channels alone do not fill the device, chunks are made independent first: see `triton_common`, which also has the symbols.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    LENGTH_ARGUMENTS,
    chunk_bounds,
    chunk_states_kernel,
    chunk_table,
    decay_of,
    load_projection,
    load_rows,
    pass_states_kernel,
    rows_of_tile,
    silu_parts,
    softplus,
    state_parts,
    strides_or_zeros,
)

__all__ = ["Plan", "ScanInputs", "launch_chain", "plan_of", "scan_forward"]


class Tuning(NamedTuple):
    """How a pass over the sequence is laid out."""

    channels: int  # BD, channels of a program
    tile: int  # K, tokens loaded at a time
    warps: int


# measured on an H100; see docs/performance.md
FORWARD = Tuning(channels=64, tile=8, warps=1)
CHUNK_STATES = Tuning(channels=64, tile=8, warps=1)
# states up to this many live in registers through a whole chunk, more of them are parked in memory between tiles
REGISTER_STATES = 16
# programs that fill the device, as far as the sequence can be cut; chunks are of these lengths
TARGET_PROGRAMS = 2048
SHORTEST_CHUNK, LONGEST_CHUNK = 64, 1024


class ScanInputs(NamedTuple):
    """The operands of a scan, and what was derived from its packing."""

    x: Tensor  # (B, L, D)
    dt: Tensor  # (B, L, D)
    A2: Tensor  # (N, D) fp32, A / ln 2
    B: Tensor  # (B, L, N) or (B, L, G, N)
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None  # (S, D, N), contiguous
    flags: Tensor | None  # (B, L) int8, with seq_idx: bits RESET and REAL
    cu_seqlens: Tensor | None
    dt_softplus: bool


class Plan(NamedTuple):
    """Sizes of a scan and how its time is cut."""

    batch: int
    length: int
    channels: int
    size: int  # N
    groups: int
    chunk: int
    n_chunks: int  # of a row
    n_slots: int
    split: bool  # whether the forward scans chunks by themselves, too
    packed: bool  # whether B and C can be read four numbers at a time


@triton.jit(do_not_specialize=LENGTH_ARGUMENTS)
def _selective_scan_fwd_kernel(
    x,
    dt,
    A2,
    B,
    C,
    D,
    z,
    dt_bias,
    flags,
    table,
    initial,
    starts,
    parked,
    final,
    y,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_dt_b,
    stride_dt_t,
    stride_dt_d,
    stride_z_b,
    stride_z_t,
    stride_z_d,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    stride_C_n,
    length,
    channels,
    chunk,
    n_chunks,
    save_every,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    NP: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    FROM_STARTS: tl.constexpr,
    SAVE: tl.constexpr,
    FINAL: tl.constexpr,
    FLAGS: tl.constexpr,
    VARLEN: tl.constexpr,
    PACKED: tl.constexpr,
):
    group_size = channels // GROUPS
    blocks = tl.cdiv(group_size, BD)
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % (blocks * GROUPS)).to(tl.int32)
    slot = pid // (blocks * GROUPS)
    row, state, start, end, is_first, is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)
    if state < 0:
        return

    group = block // blocks
    within = (block % blocks) * BD + tl.arange(0, BD)
    mask = within < group_size
    d = (group * group_size + within).to(tl.int64)
    bias = tl.zeros((BD,), tl.float32)
    skip = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask, other=0.0).to(tl.float32)
    x += row * stride_x_b
    dt += row * stride_dt_b
    z += row * stride_z_b
    B += row * stride_B_b + group.to(tl.int64) * stride_B_g
    C += row * stride_C_b + group.to(tl.int64) * stride_C_g
    flags += row * length
    y += row * length * channels
    parked += slot * N * channels
    n_tiles = tl.cdiv(end - start, K)

    # the states of the first tile, and for N > NP the memory where states wait while the others are computed
    h = ()
    for n in range(0, N, NP):
        h = ()
        for j in tl.static_range(NP):
            if FROM_STARTS:
                h_n = tl.load(starts + (slot * N + n + j) * channels + d, mask=mask, other=0.0)
            elif HAS_INITIAL:
                h_n = tl.load(initial + (state * channels + d) * N + n + j, mask=mask, other=0.0).to(tl.float32)
            else:
                h_n = tl.zeros((BD,), tl.float32)
            h = h + (h_n,)
            if NP < N:
                tl.store(parked + (n + j) * channels + d, h_n, mask=mask)
    A_n = ()
    if NP == N:
        for j in tl.static_range(N):
            A_n = A_n + (tl.load(A2 + j * channels + d, mask=mask, other=0.0),)

    real, cut = rows_of_tile(flags, start, end, K, FLAGS)
    next_dt = load_rows(dt, start, stride_dt_t, d * stride_dt_d, mask, real, K)
    next_x = load_rows(x, start, stride_x_t, d * stride_x_d, mask, real, K)
    next_z = next_x
    if HAS_Z:
        next_z = load_rows(z, start, stride_z_t, d * stride_z_d, mask, real, K)
    for i in range(0, n_tiles):
        t = start + i * K
        dt_rows, x_rows, z_rows = next_dt, next_x, next_z
        real, cut = rows_of_tile(flags, t, end, K, FLAGS)
        # the next tile is on its way while this one is computed
        later, _ = rows_of_tile(flags, t + K, end, K, FLAGS)
        next_dt = load_rows(dt, t + K, stride_dt_t, d * stride_dt_d, mask, later, K)
        next_x = load_rows(x, t + K, stride_x_t, d * stride_x_d, mask, later, K)
        if HAS_Z:
            next_z = load_rows(z, t + K, stride_z_t, d * stride_z_d, mask, later, K)
        else:
            next_z = next_x

        delta = ()
        u = ()
        out = ()
        for k in tl.static_range(K):
            x_k = x_rows[k].to(tl.float32)
            delta_k = dt_rows[k].to(tl.float32) + bias
            if SOFTPLUS:
                delta_k = softplus(delta_k)
            # a token that is not real keeps the state: its decay is 1
            delta_k = tl.where(real[k], delta_k, 0.0)
            delta = delta + (delta_k,)
            u = u + (delta_k * x_k,)
            out = out + (skip * x_k,)

        for n in range(0, N, NP):
            B_t = load_projection(B, t, stride_B_t, stride_B_n, n, real, K, NP, PACKED)
            C_t = load_projection(C, t, stride_C_t, stride_C_n, n, real, K, NP, PACKED)
            ends = ()
            for j in tl.static_range(NP):
                if NP == N:
                    a_n = A_n[j]
                    h_n = h[j]
                else:
                    a_n = tl.load(A2 + (n + j) * channels + d, mask=mask, other=0.0)
                    h_n = tl.load(parked + (n + j) * channels + d, mask=mask, other=0.0)
                if SAVE:
                    if i % save_every == 0:
                        entry = (slot + i // save_every) * N + n + j
                        if not FROM_STARTS:
                            entry = (row * (n_chunks * tl.cdiv(n_tiles, save_every)) + i // save_every) * N + n + j
                        tl.store(starts + entry * channels + d, h_n, mask=mask)
                sums = ()
                for k in tl.static_range(K):
                    h_n = decay_of(delta[k], a_n, cut[k], FLAGS) * h_n + u[k] * B_t[k][j]
                    sums = sums + (out[k] + h_n * C_t[k][j],)
                out = sums
                ends = ends + (h_n,)
                if NP < N:
                    tl.store(parked + (n + j) * channels + d, h_n, mask=mask)
            if NP == N:
                h = ends
        for k in tl.static_range(K):
            y_k = out[k]
            if HAS_Z:
                silu, _ = silu_parts(z_rows[k].to(tl.float32))
                y_k *= silu
            if FLAGS:
                y_k = tl.where(real[k], y_k, 0.0)
            tl.store(y + (t + k).to(tl.int64) * channels + d, y_k.to(y.dtype.element_ty), mask=mask & (t + k < end))

    if FINAL:
        if is_last:
            for n in range(0, N, NP):
                for j in tl.static_range(NP):
                    if NP == N:
                        h_n = h[j]
                    else:
                        h_n = tl.load(parked + (n + j) * channels + d, mask=mask, other=0.0)
                    tl.store(final + (state * channels + d) * N + n + j, h_n, mask=mask)
