"""`selective_scan` in vectorised torch: the implementation for CPUs, and the fallback elsewhere.

The sequence is cut in tiles of T tokens. A tile of states (T, B, G, N, M) is made by a few large operations, small enough to
stay in the cache, and only the recurrence itself goes token by token: one or two calls over a contiguous (B, G, N, M) block
per token. All work on (B, L, D) tensors happens tile by tile as well, in buffers that are allocated once. On a CPU they stay
with the thread for its next scan of the same tile, 64 MB at most (`recurrence.take_scratch`). Memory and time are linear in L,
forward and backward: forward keeps the state before each tile and, on a CPU, the time steps after softplus, in the dtype of the
computation; backward recomputes the tiles from these, last tile first.

Symbols: B batch, L length, D channels, N state size, G groups of B and C, M = D / G channels of a group, S states kept,
T tokens of a tile.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..autograd import first_order_only
from ..packing import cu_seqlens_to_seq_idx, resets_and_valid
from .recurrence import (
    Marks,
    OuterBuffer,
    StateBuffer,
    empty_sequences,
    give_back,
    marks_of,
    recurrence_,
    take_scratch,
    walk_,
    walks,
)

__all__ = ["selective_scan_eager"]

# elements of one tile buffer, 8 MB in fp32; with fewer, calls outweigh what stays in a cache (docs/performance.md)
TILE_ELEMENTS = 1 << 21
MIN_TILE, MAX_TILE = 4, 256


class _Operands(NamedTuple):
    """The inputs time first and split into groups: views of the long ones, copies in the dtype of the computation else."""

    x: Tensor  # (L, B, G, M)
    dt: Tensor  # (L, B, G, M)
    z: Tensor | None  # (L, B, G, M)
    A: Tensor  # (G, N, M)
    A_log2: Tensor  # (G, N, M), A / ln 2
    B: Tensor  # (L, B, G, N)
    C: Tensor  # (L, B, G, N)
    D: Tensor | None  # (G, M)
    dt_bias: Tensor | None  # (G, M)
    padding: Tensor | None  # (L, B, 1, 1) bool
    dt_softplus: bool


class _Tile(NamedTuple):
    """What forward and backward need of a tile."""

    x: Tensor  # (T, B, G, M)
    dt: Tensor  # (T, B, G, M), bias added
    delta: Tensor  # (T, B, G, M), softplus applied, 0 in the padding
    scaled_x: Tensor  # (T, B, G, M), delta * x
    decay: Tensor  # (T, B, G, N, M), exp(delta A)
    h: Tensor  # (T, B, G, N, M), the states


def _tile_length(ops: _Operands, saves: bool) -> int:
    length, batch, groups, size = ops.B.shape
    if not walks(ops.x.device):
        return min(length, MAX_TILE)
    width = max(1, batch * groups * size * ops.x.shape[3])
    # one state saved for every N tokens takes as much memory as x in fp32
    least = max(MIN_TILE, size) if saves else MIN_TILE
    return min(length, MAX_TILE, max(least, TILE_ELEMENTS // width))


def _time_first(value: Tensor, groups: int) -> Tensor:
    """(B, L, D) → (L, B, G, M), a view."""
    return value.transpose(0, 1).unflatten(2, (groups, -1))


def _grouped_states(states: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(S, D, N) → (S, G, N, M), contiguous."""
    return states.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3).contiguous()


def _public_states(states: Tensor) -> Tensor:
    """(S, G, N, M) → (S, D, N)."""
    return states.transpose(2, 3).flatten(1, 2)


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    padding: Tensor | None,
    dt_softplus: bool,
) -> _Operands:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = 1 if B.dim() == 3 else B.shape[2]
    grouped_A = A.to(dtype).unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
    return _Operands(
        x=_time_first(x, groups),
        dt=_time_first(dt, groups),
        z=None if z is None else _time_first(z, groups),
        A=grouped_A,
        A_log2=grouped_A * math.log2(math.e),
        B=_time_first(B.flatten(2), groups).to(dtype).contiguous(),
        C=_time_first(C.flatten(2), groups).to(dtype).contiguous(),
        D=None if D is None else D.to(dtype).unflatten(0, (groups, -1)),
        dt_bias=None if dt_bias is None else dt_bias.to(dtype).unflatten(0, (groups, -1)),
        padding=None if padding is None else padding.transpose(0, 1)[..., None, None],
        dt_softplus=dt_softplus,
    )


def _open_tile(
    ops: _Operands,
    start: int,
    end: int,
    dt_buffer: Tensor,
    delta: Tensor,
    added: OuterBuffer,
    decay_buffer: StateBuffer,
    h_buffer: StateBuffer | None,
    carry: Tensor,
    starts: Marks | None,
    initial: Tensor | None,
    delta_is_known: bool = False,
) -> _Tile:
    """Compute the decays and states of the tokens start to end, from the state `carry` (B, G, N, M) before them.

    Works in the given buffers; `dt_buffer` and `delta` are (T, B, G, M), and the latter holds what forward left in it if
    `delta_is_known`. Where a sequence starts, the decay becomes 0 and its initial state, if there is one, is brought in.
    Without an `h_buffer` the states take the place of the decays; that is possible where `walks` holds and no initial states
    are brought in.
    """
    tokens = end - start
    dt, scaled_x = dt_buffer[:tokens], added.values[:tokens]
    delta = delta[:tokens] if ops.dt_softplus else dt
    decay = decay_buffer.tile[:tokens]
    if ops.dt_bias is None:
        dt.copy_(ops.dt[start:end])
    else:
        torch.add(ops.dt[start:end], ops.dt_bias, out=dt)
    if not delta_is_known:
        if ops.dt_softplus:
            torch.ops.aten.softplus.out(dt, 1, 20, out=delta)
        if ops.padding is not None:
            # a step of length zero keeps the state: its decay is exactly 1
            delta.masked_fill_(ops.padding[start:end], 0)
    x = ops.x[start:end].to(dt.dtype)
    torch.mul(delta, x, out=scaled_x)
    # exp2 is about twice as fast as exp
    torch.mul(delta[:, :, :, None], ops.A_log2, out=decay)
    decay.exp2_()
    marked = None if starts is None else starts.within(start, end)
    if h_buffer is None:
        if marked is not None:
            marked.clear_(decay)
        added.rows[:tokens].copy_(ops.B[start:end])
        walk_(decay_buffer, carry, added, tokens)
        return _Tile(x, dt, delta, scaled_x, decay, decay)
    h = h_buffer.tile[:tokens]
    torch.mul(ops.B[start:end, ..., None], scaled_x[:, :, :, None], out=h)
    if marked is not None:
        if initial is not None and marked.states is not None:
            brought = decay.flatten(0, 1)[marked.rows] * initial[marked.states]
            h.flatten(0, 1).index_add_(0, marked.rows, marked.keep(brought))
        marked.clear_(decay)
    h[0].addcmul_(decay[0], carry)
    recurrence_(h_buffer, decay_buffer, tokens)
    return _Tile(x, dt, delta, scaled_x, decay, h)


def _contract_state(rows: Tensor, states: Tensor, out: Tensor) -> None:
    """Sum over N: rows (T, B, G, N) · states (T, B, G, N, M) → `out` (T, B, G, M)."""
    # `out=` variants, here and below, are left alone by autocast
    torch.bmm(rows.flatten(0, 2)[:, None], states.flatten(0, 2), out=out.flatten(0, 2)[:, None])


def _contract_channels(values: Tensor, states: Tensor, out: Tensor) -> None:
    """Sum over the channels of a group: values (T, B, G, M) · states (T, B, G, N, M) → `out` (T, B, G, N)."""
    # as row times transposed matrix: the product with a column is ten times slower in MKL
    torch.bmm(values.flatten(0, 2)[:, None], states.flatten(0, 2).mT, out=out.flatten(0, 2)[:, None])


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    starts: Tensor | None,
    sequence: Tensor | None,
    padding: Tensor | None,
    n_states: int,
    dt_softplus: bool,
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y (B, L, D) in x's dtype, final states (S, D, N), and if `save` the state before each tile and, on a CPU, the time steps
    (L, B, G, M) where they come out of a softplus.

    `starts` (B, L) bool marks where the state starts anew; `sequence` (L,) is the row of the states of each token, if
    there is one state per sequence; `padding` (B, L) bool.
    """
    ops = _prepare(x, dt, A, B, C, D, z, dt_bias, padding, dt_softplus)
    length, batch, groups, size = ops.B.shape
    channels = ops.x.shape[3]
    dtype, device = ops.A.dtype, x.device
    state_shape = (batch, groups, size, channels)
    tile_length = _tile_length(ops, saves=save)
    n_tiles = -(-length // tile_length) if length else 0
    first, last = marks_of(starts, sequence)

    initial = None if initial_states is None else _grouped_states(initial_states, groups, dtype)
    final = torch.zeros((n_states, *state_shape[1:]), dtype=dtype, device=device)
    carry = torch.zeros(state_shape, dtype=dtype, device=device)
    if sequence is None and initial is not None:
        carry = initial
    y = torch.empty((batch, length, groups * channels), dtype=x.dtype, device=device)
    y_view = _time_first(y, groups)
    saved = torch.empty((n_tiles, *state_shape), dtype=dtype, device=device) if save else None
    deltas = torch.empty(ops.x.shape, dtype=dtype, device=device) if save and dt_softplus and walks(device) else None
    scratch = take_scratch((tile_length, *state_shape), dtype, device)
    dt_buffer, delta_buffer, out_buffer = scratch.narrow(3)
    in_place = walks(device) and sequence is None
    decay_buffer, *h_buffers = scratch.states(1 if in_place else 2)
    h_buffer = None if in_place else h_buffers[0]
    for k in range(n_tiles):
        start, end = k * tile_length, min((k + 1) * tile_length, length)
        if saved is not None:
            saved[k].copy_(carry)
        delta = delta_buffer if deltas is None else deltas[start:end]
        tile = _open_tile(
            ops, start, end, dt_buffer, delta, scratch.added, decay_buffer, h_buffer, carry, first, initial
        )
        carry = tile.h[-1].clone()
        out = out_buffer[: end - start]
        _contract_state(ops.C[start:end], tile.h, out=out)
        if ops.D is not None:
            out.addcmul_(tile.x, ops.D)
        if ops.z is not None:
            out.mul_(silu(ops.z[start:end].to(dtype)))
        y_view[start:end].copy_(out)
        marked = None if last is None else last.within(start, end)
        if marked is not None and marked.states is not None:
            final.index_add_(0, marked.states, marked.keep(tile.h.flatten(0, 1)[marked.rows]))
    give_back(scratch)
    final = _public_states(carry if sequence is None else final)
    if sequence is not None and initial_states is not None:
        empty = empty_sequences(sequence, n_states)
        final = torch.where(empty[:, None, None], initial_states.to(dtype), final)
    return y, final.clone(memory_format=torch.contiguous_format), saved, deltas


class SelectiveScanFunction(torch.autograd.Function):
    """The scan with its gate, differentiable once; the final states are its second output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_states: Tensor | None,
        starts: Tensor | None,
        sequence: Tensor | None,
        padding: Tensor | None,
        n_states: int,
        dt_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        y, final, saved, deltas = _scan(
            x, dt, A, B, C, D, z, dt_bias, initial_states, starts, sequence, padding, n_states, dt_softplus, save=True
        )
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_states, starts, sequence, padding, saved, deltas)
        ctx.dt_softplus = dt_softplus
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @first_order_only("selective_scan")
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_states, starts, sequence, padding, saved, deltas = ctx.saved_tensors
        ops = _prepare(x, dt, A, B, C, D, z, dt_bias, padding, ctx.dt_softplus)
        length, _, groups, _ = ops.B.shape
        dtype, device = ops.A.dtype, x.device
        state_shape = saved.shape[1:]
        tile_length = _tile_length(ops, saves=True)
        first, last = marks_of(starts, sequence)
        initial = None if initial_states is None else _grouped_states(initial_states, groups, dtype)
        if grad_final is not None:
            grad_final = _grouped_states(grad_final, groups, dtype)

        def like(value: Tensor) -> tuple[Tensor, Tensor]:
            grad = torch.empty(value.shape, dtype=value.dtype, device=device)
            return grad, _time_first(grad, groups)

        (grad_x, grad_x_view), (grad_dt, grad_dt_view) = like(x), like(dt)
        grad_z, grad_z_view = (None, None) if z is None else like(z)
        grad_B, grad_C = torch.empty_like(ops.B), torch.empty_like(ops.C)
        grad_A = torch.zeros_like(ops.A)
        grad_D, grad_dt_bias = torch.zeros_like(ops.A[:, 0]), torch.zeros_like(ops.A[:, 0])
        grad_initial = torch.zeros_like(initial) if sequence is not None and initial is not None else None

        # what the tokens after a tile send to its last state
        carry = torch.zeros(state_shape, dtype=dtype, device=device)
        if grad_final is not None and sequence is None:
            carry = grad_final
        scratch = take_scratch((tile_length, *state_shape), dtype, device)
        dt_buffer, delta_buffer, *narrow = scratch.narrow(6)
        decay_buffer, h_buffer, grad_h_buffer = scratch.states(3)
        for k in range(saved.shape[0] - 1, -1, -1):
            start, end = k * tile_length, min((k + 1) * tile_length, length)
            tile = _open_tile(
                ops,
                start,
                end,
                dt_buffer,
                delta_buffer if deltas is None else deltas[start:end],
                scratch.added,
                decay_buffer,
                h_buffer,
                saved[k],
                first,
                initial,
                delta_is_known=deltas is not None,
            )
            decay, h, grad_h = tile.decay, tile.h, grad_h_buffer.tile[: end - start]
            # the output before its gate, C·h + D x, and its gradient
            out, grad_out, grad_scaled_x, grad_delta = (buffer[: end - start] for buffer in narrow)
            if grad_y is None:
                grad_out.zero_()
            else:
                grad_out.copy_(_time_first(grad_y, groups)[start:end])
            if ops.z is not None and grad_z_view is not None:
                gate = ops.z[start:end].to(dtype)
                _contract_state(ops.C[start:end], h, out=out)
                if ops.D is not None:
                    out.addcmul_(tile.x, ops.D)
                grad_z_view[start:end].copy_(torch.ops.aten.silu_backward(out.mul_(grad_out), gate))
                grad_out.mul_(silu(gate))
            _contract_channels(grad_out, h, out=grad_C[start:end])

            torch.mul(ops.C[start:end, ..., None], grad_out[:, :, :, None], out=grad_h)
            marked = None if last is None else last.within(start, end)
            if marked is not None and marked.states is not None and grad_final is not None:
                grad_h.flatten(0, 1).index_add_(0, marked.rows, marked.keep(grad_final[marked.states]))
            grad_h[-1].add_(carry)
            recurrence_(grad_h_buffer, decay_buffer, end - start, reverse=True)
            carry = decay[0] * grad_h[0]

            _contract_channels(tile.scaled_x, grad_h, out=grad_B[start:end])
            _contract_state(ops.B[start:end], grad_h, out=grad_scaled_x)

            # gradient of delta * A: grad_h * decay * (state before), made in `decay`
            decay[1:].mul_(h[:-1])
            decay[0].mul_(saved[k])
            decay.mul_(grad_h)
            marked = None if first is None else first.within(start, end)
            if marked is not None and marked.states is not None and initial is not None and grad_initial is not None:
                # the decay was set to 0 here; the initial state came in with the true one
                true_decay = torch.exp2(tile.delta.flatten(0, 1)[marked.rows][:, :, None] * ops.A_log2)
                through = marked.keep(true_decay * grad_h.flatten(0, 1)[marked.rows])
                grad_initial.index_add_(0, marked.states, through)
                decay.flatten(0, 1).index_add_(0, marked.rows, through * initial[marked.states])
            torch.mul(decay, ops.A, out=h)
            torch.sum(h, dim=3, out=grad_delta)
            if ctx.needs_input_grad[2]:
                grad_A += decay.mul_(tile.delta[:, :, :, None]).sum((0, 1))

            grad_delta.addcmul_(grad_scaled_x, tile.x)
            if ops.padding is not None:
                grad_delta.masked_fill_(ops.padding[start:end], 0)
            if ops.dt_softplus:
                grad_delta = torch.ops.aten.softplus_backward(grad_delta, tile.dt, 1, 20)
            grad_dt_view[start:end].copy_(grad_delta)
            grad_dt_bias += grad_delta.sum((0, 1))
            grad_scaled_x.mul_(tile.delta)
            if ops.D is not None:
                grad_scaled_x.addcmul_(grad_out, ops.D)
                grad_D += grad_out.mul_(tile.x).sum((0, 1))
            grad_x_view[start:end].copy_(grad_scaled_x)
        give_back(scratch)

        if initial_states is not None:
            if grad_initial is None:
                grad_initial = carry
            elif grad_final is not None and sequence is not None:
                # an empty sequence hands its initial state on
                grad_initial += grad_final * empty_sequences(sequence, grad_final.shape[0])[:, None, None, None]
            grad_initial = _public_states(grad_initial).to(initial_states.dtype)
        return (
            grad_x,
            grad_dt,
            _public_states(grad_A[None])[0].to(A.dtype),
            grad_B.transpose(0, 1).reshape(B.shape).to(B.dtype),
            grad_C.transpose(0, 1).reshape(C.shape).to(C.dtype),
            None if D is None else grad_D.flatten().to(D.dtype),
            grad_z,
            None if dt_bias is None else grad_dt_bias.flatten().to(dt_bias.dtype),
            grad_initial,
            *(None,) * 5,
        )


def selective_scan_eager(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in vectorised torch, on any device; arguments as there, assumed to be checked."""
    starts = sequence = padding = None
    n_states = x.shape[0]
    if seq_idx is not None:
        starts, valid = resets_and_valid(seq_idx)
        # what is not there costs nothing, where one can look without waiting
        looks = walks(x.device)
        if looks and not starts.any():
            starts = None
        if not (looks and valid.all()):
            padding = ~valid
            mask = padding[..., None]
            # whatever lies in the padding, even NaN, must reach neither the states nor a gradient
            x, dt = x.masked_fill(mask, 0), dt.masked_fill(mask, 0)
            B, C = (value.masked_fill(mask if value.dim() == 3 else mask[..., None], 0) for value in (B, C))
            z = None if z is None else z.masked_fill(mask, 0)
    elif cu_seqlens is not None:
        n_states = cu_seqlens.shape[0] - 1
        sequence = cu_seqlens_to_seq_idx(cu_seqlens, x.shape[1])[0].long()
        starts = torch.cat([torch.ones_like(sequence[:1]), sequence.diff()])[None] > 0
    operands = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    arguments = (*operands, starts, sequence, padding, n_states, dt_softplus)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in operands):
        y, final = SelectiveScanFunction.apply(*arguments)
    else:
        y, final, *_ = _scan(*arguments)
    return (y, final) if return_final_states else y
