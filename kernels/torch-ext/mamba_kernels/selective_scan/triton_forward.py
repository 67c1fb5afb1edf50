"""Forward of the selective scan in Triton (Mamba, arXiv 2312.00752, Algorithm 2).

For each channel, with delta = softplus(dt + dt_bias)::

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        (N states)
    y_t = (C_t . h_t + D x_t) silu(z_t)

A program scans BD channels of one chunk of time, one token after the other, with its states in registers. Where batch and
channels alone do not fill the device, chunks are made independent first: see `triton_common`, which also has the symbols.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_chain import chunk_table, launch_chain
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
    load_words,
    row_of,
    scalars_of,
    scan_kernel,
    silu_parts,
    state_parts,
    steps_of_tile,
    strides_or_zeros,
    tokens_of_tile,
    wide,
)
from .triton_wavefront import WAVEFRONT, scan_wavefront, takes_wavefront

__all__ = ["plan_of", "scan_forward"]


# measured on an H100; see docs/performance.md
FORWARD = Tuning(channels=32, tile=4)
# states up to this many live in registers through a whole chunk, more of them are parked in memory between tiles
FORWARD_REGISTER_STATES = 16
FORWARD_PARTS = 4
# chunks are of these lengths: doubled as long as there are so many programs, and beyond MIDDLE_CHUNK so many
SHORTEST_CHUNK, MIDDLE_CHUNK, LONGEST_CHUNK = 16, 128, 1024
FEW_PROGRAMS, MANY_PROGRAMS = 1536, 4096
# whether B and C of a tile are on their way while the tile before is computed
AHEAD = True
# with at least this many programs the forward walks through whole sequences instead of cutting them; through short ones with fewer
UNSPLIT_PROGRAMS = 2048
UNSPLIT_SHORT, SHORT = 448, 128
# with so many, and not SHORT, several warps a sequence do (`triton_wavefront`), unless the states before chunks are to be saved
FEWEST_WAVEFRONTS, MOST_WAVEFRONTS = 320, 528
# tiles of all kernels divide this
LARGEST_TILE = 8


@triton.jit
def _first_state(
    starts,
    initial,
    slot,
    state,
    n,
    d,
    mask,
    channels,
    N: tl.constexpr,
    FROM_STARTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BD: tl.constexpr,
):
    if FROM_STARTS:
        h = tl.load(starts + (slot * N + n) * channels + d, mask=mask, other=0.0)
    elif HAS_INITIAL:
        h = tl.load(initial + (state * channels + d) * N + n, mask=mask, other=0.0).to(tl.float32)
    else:
        h = tl.zeros((BD,), tl.float32)
    return h


@scan_kernel
def _selective_scan_fwd_kernel(
    x,
    dt,
    A_t,
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
    save_every,
    n_saved,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BD: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
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
    AHEAD: tl.constexpr,
):
    blocks = tl.cdiv(channels // GROUPS, BD)
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % (blocks * GROUPS)).to(tl.int32)
    slot = pid // (blocks * GROUPS)
    row, state, start, end, _is_first, is_last = chunk_bounds(table, slot, length, chunk, n_chunks, VARLEN)
    if state < 0:
        return

    group, d, mask = channels_of(block, channels, GROUPS, BD, EVEN)
    k = tl.arange(0, K)[:, None]
    bias = tl.zeros((BD,), tl.float32)
    skip = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask, other=0.0).to(tl.float32)
    x += row * stride_x_b + d * stride_x_d
    dt += row * stride_dt_b + d * stride_dt_d
    z += row * stride_z_b + d * stride_z_d
    B += row * stride_B_b + group.to(tl.int64) * stride_B_g
    C += row * stride_C_b + group.to(tl.int64) * stride_C_g
    flags += row * length
    y += row * length * channels + d
    parked += slot * N * channels
    n_tiles = tl.cdiv(end - start, K)

    # up to NP states stay in registers; more of them wait in `parked` while the others are computed
    A_n = ()
    h = ()
    if NP == N:
        for m in tl.static_range(N):
            A_n = A_n + (tl.load(A_t + m * stride_A_n + d * stride_A_d, mask=mask, other=0.0).to(tl.float32) * LOG2_E,)
            h = h + (
                _first_state(starts, initial, slot, state, m, d, mask, channels, N, FROM_STARTS, HAS_INITIAL, BD),
            )
    else:
        for m in range(0, N):
            h_n = _first_state(starts, initial, slot, state, m, d, mask, channels, N, FROM_STARTS, HAS_INITIAL, BD)
            tl.store(parked + m * channels + d, h_n, mask=mask)

    t = start + k
    _within, real, reset = tokens_of_tile(flags, t, end, FLAGS, WHOLE)
    next_dt = load_tile(dt, start, k, stride_dt_t, real & mask[None, :])
    next_x = load_tile(x, start, k, stride_x_t, real & mask[None, :])
    next_z = next_x
    if HAS_Z:
        next_z = load_tile(z, start, k, stride_z_t, real & mask[None, :])
    if AHEAD:
        next_B = load_words(B, start, k, stride_B_t, stride_B_n, 0, real, NP, PACKED)
        next_C = load_words(C, start, k, stride_C_t, stride_C_n, 0, real, NP, PACKED)
    for i in range(0, n_tiles):
        begin = start + i * K
        t = begin + k
        dt_tile, x_tile, z_tile = next_dt, next_x, next_z
        within, real, reset = tokens_of_tile(flags, t, end, FLAGS, WHOLE)
        # the next tile is on its way while this one is computed
        following = tl.minimum(begin + K, end - K) if WHOLE else begin + K
        _later, soon, _later_reset = tokens_of_tile(flags, following + k, end, FLAGS, WHOLE)
        later = soon & mask[None, :]
        next_dt = load_tile(dt, following, k, stride_dt_t, later)
        next_x = load_tile(x, following, k, stride_x_t, later)
        next_z = next_x
        if HAS_Z:
            next_z = load_tile(z, following, k, stride_z_t, later)

        if AHEAD:
            words_B, words_C = next_B, next_C
            next_B = load_words(B, following, k, stride_B_t, stride_B_n, 0, soon, NP, PACKED)
            next_C = load_words(C, following, k, stride_C_t, stride_C_n, 0, soon, NP, PACKED)

        delta = steps_of_tile(dt_tile, bias, real, SOFTPLUS)
        u = delta * x_tile.to(tl.float32)
        out = skip * x_tile.to(tl.float32)
        if SAVE:
            if i % save_every == 0:
                entry = starts + (row * n_saved + i // save_every) * N * channels + d
                if NP == N:
                    for m in tl.static_range(N):
                        tl.store(entry + m * channels, h[m], mask=mask)
                else:
                    for m in range(0, N):
                        tl.store(
                            entry + m * channels, tl.load(parked + m * channels + d, mask=mask, other=0.0), mask=mask
                        )
        for n in range(0, N, NP):
            if AHEAD:
                B_n = scalars_of(words_B, NP, PACKED, B.dtype.element_ty)
                C_n = scalars_of(words_C, NP, PACKED, C.dtype.element_ty)
            else:
                B_n = load_projection(B, begin, k, stride_B_t, stride_B_n, n, real, NP, PACKED)
                C_n = load_projection(C, begin, k, stride_C_t, stride_C_n, n, real, NP, PACKED)
            ends = ()
            for j in tl.static_range(NP):
                if NP == N:
                    a_n = A_n[j]
                    h_n = h[j]
                else:
                    a_n = (
                        tl.load(A_t + wide(n + j) * stride_A_n + d * stride_A_d, mask=mask, other=0.0).to(tl.float32)
                        * LOG2_E
                    )
                    h_n = tl.load(parked + (n + j) * channels + d, mask=mask, other=0.0)
                decay = decay_of(delta, a_n, reset, FLAGS)
                b = u * B_n[j]
                b = tl.where(k == 0, decay * h_n + b, b)
                _product, states = tl.associative_scan((decay, b), 0, combine)
                out += states * C_n[j]
                h_n = row_of(states, k, K - 1)
                ends = ends + (h_n,)
                if NP < N:
                    tl.store(parked + (n + j) * channels + d, h_n, mask=mask)
            if NP == N:
                h = ends
        if HAS_Z:
            silu, _sigmoid = silu_parts(z_tile.to(tl.float32))
            out *= silu
        if FLAGS:
            out = tl.where(real, out, 0.0)
        rows = (y + wide(begin) * channels)[None, :] + k.to(tl.int64) * channels
        tl.store(rows, out.to(y.dtype.element_ty), mask=mask[None, :] & within)

    if FINAL:
        if is_last:
            sink = final + (state * channels + d) * N
            if NP == N:
                for m in tl.static_range(N):
                    tl.store(sink + m, h[m], mask=mask)
            else:
                for m in range(0, N):
                    tl.store(sink + m, tl.load(parked + m * channels + d, mask=mask, other=0.0), mask=mask)


def plan_of(inputs: ScanInputs) -> Plan:
    """Cut time so that there are enough programs, if the sequence is long enough, in chunks that are not too many to be chained."""
    batch, length, channels = inputs.x.shape
    groups = 1 if inputs.B.dim() == 3 else inputs.B.shape[2]
    programs = batch * groups * ceil_div(channels // groups, FORWARD.channels)
    chunk = SHORTEST_CHUNK
    while chunk < LONGEST_CHUNK:
        wanted = FEW_PROGRAMS if chunk < MIDDLE_CHUNK else MANY_PROGRAMS
        if programs * ceil_div(length, 2 * chunk) < wanted:
            break
        chunk *= 2
    fill = FEWEST_WAVEFRONTS <= programs <= MOST_WAVEFRONTS
    wavefront = fill and length > SHORT and takes_wavefront(inputs, WAVEFRONT)
    if inputs.cu_seqlens is None:
        n_chunks = ceil_div(length, chunk)
        n_slots = batch * n_chunks
        whole = programs >= (UNSPLIT_SHORT if length <= SHORT else UNSPLIT_PROGRAMS)
        split = n_chunks > 1 and not whole
    else:
        n_chunks = n_slots = length // chunk + inputs.cu_seqlens.shape[0] - 1
        split = True
    return Plan(
        batch=batch,
        length=length,
        channels=channels,
        size=inputs.A_t.shape[0],
        groups=groups,
        chunk=chunk,
        n_chunks=n_chunks,
        n_slots=n_slots,
        split=split,
        wavefront=wavefront,
        whole=inputs.cu_seqlens is None and inputs.flags is None and length % LARGEST_TILE == 0,
        packed=_can_be_packed(inputs.B) and _can_be_packed(inputs.C),
    )


def _can_be_packed(value: Tensor) -> bool:
    """Whether four numbers at a time can be read as an aligned 64-bit word, state index fastest."""
    # a traced tensor has no storage to ask
    if torch.compiler.is_compiling():
        return False
    *outer, last = value.stride()
    return (
        value.element_size() == 2
        and last == 1
        and value.shape[-1] % 4 == 0
        and all(stride % 4 == 0 for stride in outer)
        and value.storage_offset() % 4 == 0
    )


def scan_forward(
    inputs: ScanInputs,
    plan: Plan,
    save: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Returns y (B, L, D); the final states (sequences, D, N); the chunk table; the states before each chunk if `save`."""
    x = inputs.x
    y = torch.empty((plan.batch, plan.length, plan.channels), dtype=x.dtype, device=x.device)
    final = None
    if return_final_states:
        n_states = plan.batch if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        final = x.new_empty((n_states, plan.channels, plan.size), dtype=torch.float32)
    if plan.wavefront and not save:
        scan_wavefront(inputs, plan, WAVEFRONT, final, y)
        return y, final, None, None
    table = None if inputs.cu_seqlens is None else chunk_table(inputs.cu_seqlens, plan.length, plan.chunk)
    starts = None
    if plan.split:
        starts = launch_chain(inputs, plan, table, inputs.initial_states)
    elif save:
        starts = x.new_empty((plan.n_slots, plan.size, plan.channels), dtype=torch.float32)
    in_registers = plan.size <= FORWARD_REGISTER_STATES
    parts = plan.size if in_registers else state_parts(plan.size, FORWARD_PARTS)
    programs = plan.n_slots if plan.split else plan.batch
    tuning = FORWARD
    placeholder = inputs.A_t
    parked = placeholder
    if not in_registers:
        parked = x.new_empty((programs, plan.size, plan.channels), dtype=torch.float32)
    blocks = plan.groups * ceil_div(plan.channels // plan.groups, tuning.channels)
    launch(
        _selective_scan_fwd_kernel,
        (programs * blocks,),
        x,
        inputs.dt,
        inputs.A_t,
        inputs.B,
        inputs.C,
        placeholder if inputs.D is None else inputs.D,
        x if inputs.z is None else inputs.z,
        placeholder if inputs.dt_bias is None else inputs.dt_bias,
        placeholder if inputs.flags is None else inputs.flags,
        placeholder if table is None else table,
        placeholder if inputs.initial_states is None else inputs.initial_states,
        placeholder if starts is None else starts,
        parked,
        placeholder if final is None else final,
        y,
        *x.stride(),
        *inputs.dt.stride(),
        *inputs.A_t.stride(),
        *strides_or_zeros(inputs.z, 3),
        *strides_or_zeros(inputs.B, 4),
        *strides_or_zeros(inputs.C, 4),
        plan.length,
        plan.channels,
        plan.chunk if plan.split else plan.length,
        plan.n_chunks if plan.split else 1,
        plan.chunk // tuning.tile,
        plan.n_chunks,
        N=plan.size,
        GROUPS=plan.groups,
        BD=tuning.channels,
        K=tuning.tile,
        WHOLE=plan.whole,
        EVEN=plan.channels // plan.groups % tuning.channels == 0,
        NP=parts,
        HAS_D=inputs.D is not None,
        HAS_Z=inputs.z is not None,
        HAS_BIAS=inputs.dt_bias is not None,
        SOFTPLUS=inputs.dt_softplus,
        HAS_INITIAL=inputs.initial_states is not None,
        FROM_STARTS=plan.split,
        SAVE=save and not plan.split,
        FINAL=return_final_states,
        FLAGS=inputs.flags is not None,
        VARLEN=table is not None,
        PACKED=plan.packed and parts % 4 == 0,
        AHEAD=AHEAD and in_registers and plan.packed and parts % 4 == 0,
        **tuning.options(),
    )
    return y, final, table, starts
