# mypy: disable-error-code="assignment, misc"
"""Forward of the selective scan in one pass, with the time of a channel shared out among warps.

A program walks through a sequence in tiles of W groups of K tokens, one group a warp. The states of a channel do not depend on
each other, so that the groups work at the same time on different ones: a tile takes W phases, and in phase p warp w works on the
NS = N / W states of block (p - w) mod W. It hands the NS states that it arrives at to warp w + 1, which needs them in the next
phase; the last warp hands its to the first, which is at the next tile then. So warp w begins a tile in phase w, and every
exponential is computed once::

    phase           0      1      2      3    |  4      5      6      7
    warp 0   tile 0: b0     b1     b2     b3  |  tile 1: b0 ...
    warp 1           -      tile 0: b0     b1 |  b2     b3     tile 1: b0 ...

Symbols as in `triton_common`, and: W warps, NS states of a phase; BD channels are one a thread of a warp. A tile is (W, K, BD): with
the layout that Triton gives such a tensor every thread holds the K tokens of its channel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .triton_common import (
    LOG2_E,
    Plan,
    ScanInputs,
    ceil_div,
    combine,
    load_words,
    scalars_of,
    scan_kernel,
    silu_parts,
    softplus,
    strides_or_zeros,
    wide,
)

__all__ = ["WAVEFRONT", "Wavefront", "scan_wavefront", "selective_scan_wavefront_kernel", "takes_wavefront"]

LANES = 32
# that a thread holds A of
MOST_STATES = 16


class Wavefront(NamedTuple):
    """How a whole sequence is walked through."""

    warps: int = 2  # W, of a program
    tile: int = 8  # K, tokens of a warp


# of thirteen, measured on an H100; see docs/performance.md
WAVEFRONT = Wavefront()


@triton.jit
def _load_group(columns, first, k, stride, real):
    return tl.load((columns + wide(first) * stride) + k.to(tl.int64) * stride, mask=real, other=0.0)


@triton.jit
def _last_of(tile, k, K: tl.constexpr):
    bits = tl.where(k == K - 1, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def _real(first, k, length, WHOLE: tl.constexpr):
    """Which tokens first + k are in the sequence; with WHOLE a group is there or not."""
    if WHOLE:
        real = first < length
    else:
        real = first + k < length
    return real


@scan_kernel
def selective_scan_wavefront_kernel(
    x,
    dt,
    A_t,
    B,
    C,
    D,
    z,
    dt_bias,
    initial,
    handed,
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
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    NS: tl.constexpr = N // W
    TILE: tl.constexpr = W * K
    group_size = channels // GROUPS
    blocks = tl.cdiv(group_size, BD)
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % (blocks * GROUPS)).to(tl.int32)
    row = pid // (blocks * GROUPS)
    n_tiles = tl.cdiv(length, TILE)

    group = block // blocks
    lane = tl.arange(0, BD)[None, :]
    within = (block % blocks) * BD + lane
    d2 = (group * group_size + within).to(tl.int64)
    mask2 = within < group_size
    if EVEN:
        mask2 = tl.full((1, BD), True, tl.int1)
    d = d2[:, None]
    mask = mask2[:, None]
    warp2 = tl.arange(0, W)[:, None]
    warp = warp2[:, None]
    k = tl.arange(0, K)[None, :, None]

    bias = tl.zeros((1, 1, BD), tl.float32)
    skip = tl.zeros((1, 1, BD), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + d, mask=mask, other=0.0).to(tl.float32)
    x += row * stride_x_b + d * stride_x_d
    dt += row * stride_dt_b + d * stride_dt_d
    z += row * stride_z_b + d * stride_z_d
    B += row * stride_B_b + group.to(tl.int64) * stride_B_g
    C += row * stride_C_b + group.to(tl.int64) * stride_C_g
    y += row * length * channels + d
    before = (warp2 + (W - 1)) % W
    mailbox = handed + pid * (2 * N * BD) + warp2 * BD + lane
    neighbour = handed + pid * (2 * N * BD) + before * BD + lane

    # A of the states that a warp works on in phase p is A_n[p * NS] and what follows; h is of those of the next phase
    A_n = ()
    h = ()
    for p in tl.static_range(W):
        for j in tl.static_range(NS):
            m = ((warp * 0 + (p + W)) - warp) % W * NS + j
            A_n = A_n + (
                tl.load(A_t + wide(m) * stride_A_n + d * stride_A_d, mask=mask, other=0.0).to(tl.float32) * LOG2_E,
            )
    for j in tl.static_range(NS):
        state = (W - warp2) % W * NS + j
        if HAS_INITIAL:
            h_n = tl.load(initial + (row * channels + d2) * N + state, mask=mask2, other=0.0).to(tl.float32)
        else:
            h_n = tl.zeros((W, BD), tl.float32)
        h = h + (h_n,)

    # what a warp works on; warps that have not begun yet hand states on as they are
    delta = tl.zeros((W, K, BD), tl.float32)
    u = tl.zeros((W, K, BD), tl.float32)
    out = tl.zeros((W, K, BD), tl.float32)
    done = tl.zeros((W, K, BD), tl.float32)
    own = warp * K
    real = _real(own, k, length, WHOLE) & mask
    next_dt = _load_group(dt, own, k, stride_dt_t, real)
    next_x = _load_group(x, own, k, stride_x_t, real)
    first = tl.maximum(own - tl.where(warp > 0, TILE, 0), 0)
    there = _real(first, k, length, WHOLE)
    if WHOLE:
        first = tl.minimum(first, length - K)
        there = tl.full((W, 1, 1), True, tl.int1)
    n = (W - warp) % W * NS
    next_B = load_words(B, first, k, stride_B_t, stride_B_n, n, there, NS, PACKED)
    next_C = load_words(C, first, k, stride_C_t, stride_C_n, n, there, NS, PACKED)

    for i in range(0, n_tiles + 1):
        own = i * TILE + warp * K
        new_delta = next_dt.to(tl.float32) + bias
        if SOFTPLUS:
            new_delta = softplus(new_delta)
        new_delta = tl.where(_real(own, k, length, WHOLE), new_delta, 0.0)
        new_x = next_x.to(tl.float32)
        new_u = new_delta * new_x
        # of the tile that is finished in this round
        previous = own - TILE
        finished = _real(previous, k, length, WHOLE) & (previous >= 0) & mask
        if HAS_Z:
            z_tile = _load_group(z, previous, k, stride_z_t, finished)
        for p in tl.static_range(W):
            begins = warp == p
            delta = tl.where(begins, new_delta, delta)
            u = tl.where(begins, new_u, u)
            done = tl.where(begins, out, done)
            out = tl.where(begins, skip * new_x, out)
            words_B, words_C = next_B, next_C
            # of the next phase
            if p < W - 1:
                first = own - tl.where(warp > p + 1, TILE, 0)
            else:
                first = own + tl.where(warp > 0, 0, TILE)
            n = ((warp * 0 + (p + 1 + W)) - warp) % W * NS
            first = tl.maximum(first, 0)
            there = _real(first, k, length, WHOLE)
            if WHOLE:
                # steps of 0 do not ask what B is
                first = tl.minimum(first, length - K)
                there = tl.full((W, 1, 1), True, tl.int1)
            next_B = load_words(B, first, k, stride_B_t, stride_B_n, n, there, NS, PACKED)
            next_C = load_words(C, first, k, stride_C_t, stride_C_n, n, there, NS, PACKED)
            if p == W - 1:
                following = own + TILE
                real = _real(following, k, length, WHOLE) & mask
                next_dt = _load_group(dt, following, k, stride_dt_t, real)
                next_x = _load_group(x, following, k, stride_x_t, real)
            B_n = scalars_of(words_B, NS, PACKED, B.dtype.element_ty)
            C_n = scalars_of(words_C, NS, PACKED, C.dtype.element_ty)
            ends = ()
            for j in tl.static_range(NS):
                decay = tl.exp2(delta * A_n[p * NS + j])
                b = u * B_n[j]
                b = tl.where(k == 0, decay * h[j][:, None] + b, b)
                _product, states = tl.associative_scan((decay, b), 1, combine)
                out += states * C_n[j]
                ends = ends + (_last_of(states, k, K),)
            sink, source = mailbox + p % 2 * (N * BD), neighbour + p % 2 * (N * BD)
            for j in tl.static_range(NS):
                tl.store(sink + j * W * BD, ends[j])
            # one barrier is enough: what is written in the next phase lies elsewhere
            tl.debug_barrier()
            h = ()
            for j in tl.static_range(NS):
                h = h + (tl.load(source + j * W * BD),)
        if HAS_Z:
            silu, _sigmoid = silu_parts(z_tile.to(tl.float32))
            done *= silu
        rows = (y + wide(previous) * channels) + k.to(tl.int64) * channels
        tl.store(rows, done.to(y.dtype.element_ty), mask=finished)

    if FINAL:
        for j in tl.static_range(NS):
            state = (W - warp2) % W * NS + j
            tl.store(final + (row * channels + d2) * N + state, h[j], mask=mask2)


def takes_wavefront(inputs: ScanInputs, tuning: Wavefront) -> bool:
    """Whether these inputs can be scanned so: no packed sequences, N a multiple of W, states in registers.

    What a warp writes to global memory is read by another one after a barrier, which CUDA guarantees within a program.
    """
    size = inputs.A_t.shape[0]
    return (
        inputs.cu_seqlens is None
        and inputs.flags is None
        and size % tuning.warps == 0
        and size <= MOST_STATES
        and torch.version.hip is None
        and inputs.x.device.type != "xpu"
    )


def scan_wavefront(
    inputs: ScanInputs,
    plan: Plan,
    tuning: Wavefront,
    final: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y (B, L, D) and, if it is given, final (B, D, N)."""
    states = plan.size // tuning.warps
    programs = plan.batch * plan.groups * ceil_div(plan.channels // plan.groups, LANES)
    placeholder = inputs.A_t
    handed = y.new_empty((programs, 2, plan.size, LANES), dtype=torch.float32)
    launch(
        selective_scan_wavefront_kernel,
        (programs,),
        inputs.x,
        inputs.dt,
        inputs.A_t,
        inputs.B,
        inputs.C,
        placeholder if inputs.D is None else inputs.D,
        inputs.x if inputs.z is None else inputs.z,
        placeholder if inputs.dt_bias is None else inputs.dt_bias,
        placeholder if inputs.initial_states is None else inputs.initial_states,
        handed,
        placeholder if final is None else final,
        y,
        *inputs.x.stride(),
        *inputs.dt.stride(),
        *inputs.A_t.stride(),
        *strides_or_zeros(inputs.z, 3),
        *strides_or_zeros(inputs.B, 4),
        *strides_or_zeros(inputs.C, 4),
        plan.length,
        plan.channels,
        N=plan.size,
        GROUPS=plan.groups,
        W=tuning.warps,
        K=tuning.tile,
        BD=LANES,
        EVEN=plan.channels // plan.groups % LANES == 0,
        WHOLE=plan.length % tuning.tile == 0,
        HAS_D=inputs.D is not None,
        HAS_Z=inputs.z is not None,
        HAS_BIAS=inputs.dt_bias is not None,
        SOFTPLUS=inputs.dt_softplus,
        HAS_INITIAL=inputs.initial_states is not None,
        FINAL=final is not None,
        PACKED=plan.packed and (states == 2 or states % 4 == 0),
        num_warps=tuning.warps,
        num_stages=1,
    )
