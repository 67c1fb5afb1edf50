"""`selective_scan` in vectorised torch: the implementation for CPUs, and the fallback elsewhere.

The sequence is cut in tiles of T tokens. A tile of states (T, B, G, N, D/G) is made by a few large operations, small enough
to stay in the cache, and only the recurrence itself goes token by token: one `addcmul_` over a contiguous (B, G, N, D/G)
block per token. Memory and time are linear in L, forward and backward: forward keeps the state before each tile, and backward
recomputes the tiles from these, last tile first.

Symbols: B batch, L length, D channels, N state size, G groups of B and C, S states kept, T tokens of a tile.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..packing import cu_seqlens_to_seq_idx, resets_and_valid

__all__ = ["selective_scan_eager"]

# elements of one tile buffer: three of them in fp32 should stay in the last-level cache
TILE_ELEMENTS = 1 << 19
# a tile has at least N tokens, so that the saved states take no more memory than x in fp32, and at most this many
MAX_TILE = 256
LOG2_E = math.log2(math.e)


class _Operands(NamedTuple):
    """The inputs in the dtype of the computation, time first and split into groups."""

    x: Tensor  # (L, B, G, D/G)
    dt: Tensor  # (L, B, G, D/G), bias added
    delta: Tensor  # (L, B, G, D/G), softplus applied
    A: Tensor  # (G, N, D/G)
    B: Tensor  # (L, B, G, N)
    C: Tensor  # (L, B, G, N)
    z: Tensor | None  # (L, B, G, D/G)


def _walks(device: torch.device) -> bool:
    """Whether to walk through time one token after the other: not in a traced graph, and not where launches are dear."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _tile_length(tokens: int, width: int, state_size: int, device: torch.device) -> int:
    if not _walks(device):
        return min(tokens, MAX_TILE)
    return min(tokens, MAX_TILE, max(state_size, TILE_ELEMENTS // max(width, 1)))


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    padding: Tensor | None,
    dt_softplus: bool,
) -> _Operands:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = 1 if B.dim() == 3 else B.shape[2]

    def time_first(value: Tensor) -> Tensor:
        return value.transpose(0, 1).to(dtype).contiguous()

    v = time_first(dt)
    if dt_bias is not None:
        v = v + dt_bias.to(dtype)
    delta = torch.nn.functional.softplus(v) if dt_softplus else v
    if padding is not None:
        # a step of length zero keeps the state: its decay is exactly 1
        delta = delta.masked_fill(padding.transpose(0, 1)[..., None], 0)
    split = (groups, x.shape[2] // groups)
    return _Operands(
        x=time_first(x).unflatten(2, split),
        dt=v.unflatten(2, split),
        delta=delta.unflatten(2, split),
        A=A.to(dtype).unflatten(0, split).transpose(1, 2).contiguous(),
        B=time_first(B if B.dim() == 4 else B[:, :, None]),
        C=time_first(C if C.dim() == 4 else C[:, :, None]),
        z=None if z is None else time_first(z).unflatten(2, split),
    )


class _Marks:
    """Tokens of a row where something happens to the state: a sequence starts or ends."""

    def __init__(self, mask: Tensor, sequence: Tensor | None) -> None:
        self.mask = mask  # (L, B) bool
        self.sequence = sequence  # (L,) the row of the states that belongs to each token, with cu_seqlens
        self.exact = _walks(mask.device)

    def within(self, start: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """The marked (token, row) pairs of a tile, flattened; their weights, None for 1; their state rows.

        Reading which tokens are marked costs nothing on a CPU. Elsewhere it would wait for the device, and in a traced
        graph shapes would depend on data, so there every token is listed and weighted 1 or 0.
        """
        mask = self.mask[start:end].flatten()
        sequence = None if self.sequence is None else self.sequence[start:end]
        if not self.exact:
            return torch.arange(mask.shape[0], device=mask.device), mask.to(dtype)[:, None, None, None], sequence
        rows = mask.nonzero().squeeze(1)
        if rows.shape[0] == 0:
            return None
        return rows, None, None if sequence is None else sequence[rows]


def _weighted(value: Tensor, weights: Tensor | None) -> Tensor:
    return value if weights is None else value * weights


def _recurrence_(h: Tensor, decay: Tensor, reverse: bool = False) -> None:
    """In place, h[t] += decay[t] * h[t - 1] from the second token on; reverse: h[t] += decay[t + 1] * h[t + 1]."""
    if not _walks(h.device):
        if reverse:
            h.copy_(_log_depth_recurrence(h.flip(0), decay.roll(-1, 0).flip(0)).flip(0))
        else:
            h.copy_(_log_depth_recurrence(h, decay))
        return
    states, decays = h.unbind(0), decay.unbind(0)
    if reverse:
        for t in range(len(states) - 2, -1, -1):
            states[t].addcmul_(decays[t + 1], states[t + 1])
    else:
        for t in range(1, len(states)):
            states[t].addcmul_(decays[t], states[t - 1])


def _log_depth_recurrence(h: Tensor, decay: Tensor) -> Tensor:
    """The forward recurrence by odd-even reduction (Blelloch 1990): O(T) work in O(log T) operations."""
    length = h.shape[0]
    if length == 1:
        return h
    pairs = length // 2
    left, right = slice(0, 2 * pairs, 2), slice(1, None, 2)
    odd = _log_depth_recurrence(torch.addcmul(h[right], decay[right], h[left]), decay[right] * decay[left])
    even = torch.addcmul(h[2::2], decay[2::2], odd[: (length - 1) // 2])
    even = torch.cat([h[:1], even])
    both = torch.stack([even[:pairs], odd], dim=1).flatten(0, 1)
    return both if length % 2 == 0 else torch.cat([both, even[-1:]])


def _fill_tile(
    decay: Tensor,
    h: Tensor,
    inputs: _Operands,
    start: int,
    end: int,
    carry: Tensor,
    starts: _Marks | None,
    initial: Tensor | None,
) -> None:
    """Write exp(delta A) of the tokens start to end into `decay` and their states into `h`, both (T, B, G, N, D/G).

    `carry` (B, G, N, D/G) is the state before the tile. Where a sequence starts the decay becomes 0, and its initial state,
    if there is one, is brought in.
    """
    delta = inputs.delta[start:end, :, :, None]
    torch.mul(delta, inputs.A * LOG2_E, out=decay)
    # exp2 is about twice as fast as exp
    decay.exp2_()
    torch.mul(inputs.B[start:end, ..., None], delta * inputs.x[start:end, :, :, None], out=h)
    marks = None if starts is None else starts.within(start, end, h.dtype)
    if marks is not None:
        rows, weights, sequence = marks
        flat = decay.flatten(0, 1)
        marked = flat[rows]
        if initial is not None and sequence is not None:
            h.flatten(0, 1).index_add_(0, rows, _weighted(marked * initial[sequence], weights))
        flat.index_copy_(0, rows, torch.zeros_like(marked) if weights is None else marked * (1 - weights))
    h[0].addcmul_(decay[0], carry)
    _recurrence_(h, decay)


def _state_layout(states: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(S, D, N) → (S, G, N, D/G), contiguous."""
    return states.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3).contiguous()


def _public_layout(states: Tensor) -> Tensor:
    """(S, G, N, D/G) → (S, D, N)."""
    return states.transpose(2, 3).flatten(1, 2)


def _marks_of(starts: Tensor | None, sequence: Tensor | None) -> tuple[_Marks | None, _Marks | None]:
    """Marks of the first and, with one state per sequence, of the last token of every sequence; `starts` (B, L) bool."""
    if starts is None:
        return None, None
    begins = starts.transpose(0, 1)
    if sequence is None:
        return _Marks(begins, None), None
    ends = torch.cat([begins[1:], torch.ones_like(begins[:1])])
    return _Marks(begins, sequence), _Marks(ends, sequence)


def _forward(
    inputs: _Operands,
    initial_states: Tensor | None,
    n_states: int,
    starts: Tensor | None,
    sequence: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns C·h (L, B, G, D/G), final states (S, G, N, D/G), and the state before each tile if `save`."""
    length, batch, groups, size = inputs.B.shape
    width = (batch, groups, size, inputs.x.shape[3])
    dtype, device = inputs.x.dtype, inputs.x.device
    tile = _tile_length(length, math.prod(width), size, device)
    first, last = _marks_of(starts, sequence)

    initial = None if initial_states is None else _state_layout(initial_states, groups, dtype)
    final = torch.zeros((n_states, *width[1:]), dtype=dtype, device=device)
    if sequence is None:
        carry = final if initial is None else initial
    else:
        carry = torch.zeros(width, dtype=dtype, device=device)
    y = torch.empty((length, batch, groups, width[3]), dtype=dtype, device=device)
    n_tiles = -(-length // tile) if length else 0
    saved = torch.empty((n_tiles, *width), dtype=dtype, device=device) if save else None
    buffers = torch.empty((2, tile, *width), dtype=dtype, device=device)
    for k in range(n_tiles):
        start, end = k * tile, min((k + 1) * tile, length)
        if saved is not None:
            saved[k].copy_(carry)
        decay, h = buffers[0, : end - start], buffers[1, : end - start]
        _fill_tile(decay, h, inputs, start, end, carry, first, initial)
        carry = h[-1].clone()
        y[start:end] = (inputs.C[start:end].flatten(0, 2)[:, None] @ h.flatten(0, 2)).view_as(y[start:end])
        marks = None if last is None else last.within(start, end, dtype)
        if marks is not None and sequence is not None:
            rows, weights, states = marks
            final.index_add_(0, states, _weighted(h.flatten(0, 1)[rows], weights))
    return y, carry if sequence is None else final, saved


class SelectiveScanFunction(torch.autograd.Function):
    """The scan with its gate, differentiable once; `final_states` counts as a second output."""

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
        y, final, saved = _scan(
            x, dt, A, B, C, D, z, dt_bias, initial_states, starts, sequence, padding, n_states, dt_softplus, True
        )
        ctx.save_for_backward(
            x, dt, A, B, C, D, z, dt_bias, initial_states, starts, sequence, padding, saved
        )
        ctx.dt_softplus = dt_softplus
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, z, dt_bias, initial_states, starts, sequence, padding, saved = ctx.saved_tensors
        inputs = _prepare(x, dt, A, B, C, z, dt_bias, padding, ctx.dt_softplus)
        length, batch, groups, size = inputs.B.shape
        channels = inputs.x.shape[3]
        dtype, device = inputs.x.dtype, inputs.x.device
        first, last = _marks_of(starts, sequence)
        initial = None if initial_states is None else _state_layout(initial_states, groups, dtype)
        width = saved.shape[1:]
        tile = _tile_length(length, math.prod(width), size, device)

        # the gradient of C·h + D x, the scan's output before its gate
        if grad_y is None:
            grad_out = torch.zeros_like(inputs.x)
        else:
            grad_out = grad_y.transpose(0, 1).to(dtype).contiguous().unflatten(2, (groups, channels))
        gated = inputs.z is not None
        grad_scan = grad_out * torch.nn.functional.silu(inputs.z) if gated else grad_out
        scanned = torch.empty_like(grad_out) if gated else None

        grad_A = torch.zeros_like(inputs.A)
        grad_B, grad_C = torch.empty_like(inputs.B), torch.empty_like(inputs.C)
        # gradients of delta through the decay, and of delta * x
        grad_delta, grad_input = torch.empty_like(grad_out), torch.empty_like(grad_out)
        if grad_final is not None:
            grad_final = _state_layout(grad_final, groups, dtype)
        grad_initial = None
        if sequence is not None and initial is not None:
            grad_initial = torch.zeros_like(initial)

        # gradient that the tokens after the tile send to its last state
        carry = torch.zeros(width, dtype=dtype, device=device)
        if grad_final is not None and sequence is None:
            carry = grad_final
        buffers = torch.empty((3, tile, *width), dtype=dtype, device=device)
        for k in range(saved.shape[0] - 1, -1, -1):
            start, end = k * tile, min((k + 1) * tile, length)
            decay, h, grad_h = (buffers[i, : end - start] for i in range(3))
            _fill_tile(decay, h, inputs, start, end, saved[k], first, initial)
            flat_h, flat_grad = h.flatten(0, 2), grad_h.flatten(0, 2)
            delta, x_tile, grad_tile = inputs.delta[start:end], inputs.x[start:end], grad_scan[start:end]
            C_rows, B_rows = inputs.C[start:end].flatten(0, 2)[:, None], inputs.B[start:end].flatten(0, 2)[:, None]
            if scanned is not None:
                scanned[start:end] = (C_rows @ flat_h).view_as(grad_tile)
            grad_C[start:end] = (flat_h @ grad_tile.flatten(0, 2)[..., None]).view_as(grad_C[start:end])

            torch.mul(inputs.C[start:end, ..., None], grad_tile[:, :, :, None], out=grad_h)
            marks = None if last is None else last.within(start, end, dtype)
            if marks is not None and grad_final is not None:
                rows, weights, states = marks
                grad_h.flatten(0, 1).index_add_(0, rows, _weighted(grad_final[states], weights))
            grad_h[-1].add_(carry)
            _recurrence_(grad_h, decay, reverse=True)
            carry = decay[0] * grad_h[0]

            grad_B[start:end] = (flat_grad @ (delta * x_tile).flatten(0, 2)[..., None]).view_as(grad_B[start:end])
            grad_input[start:end] = (B_rows @ flat_grad).view_as(grad_tile)

            # gradient of delta * A: grad_h * decay * (state before), kept in `decay`
            decay[1:].mul_(h[:-1])
            decay[0].mul_(saved[k])
            decay.mul_(grad_h)
            marks = None if first is None else first.within(start, end, dtype)
            if marks is not None and initial is not None and grad_initial is not None:
                # the recurrence saw a decay of 0 here; the initial state came in with the true one
                rows, weights, states = marks
                true_decay = torch.exp(delta.flatten(0, 1)[rows][:, :, None] * inputs.A)
                through = _weighted(true_decay * grad_h.flatten(0, 1)[rows], weights)
                grad_initial.index_add_(0, states, through)
                decay.flatten(0, 1).index_add_(0, rows, through * initial[states])
            torch.mul(decay, inputs.A, out=h)
            torch.sum(h, dim=3, out=grad_delta[start:end])
            torch.mul(decay, delta[:, :, :, None], out=h)
            grad_A += h.sum((0, 1))

        grad_delta.addcmul_(grad_input, inputs.x)
        grad_x = grad_input.mul_(inputs.delta)
        if padding is not None:
            grad_delta.masked_fill_(padding.transpose(0, 1)[..., None, None], 0)
        grad_dt = grad_delta
        if ctx.dt_softplus:
            grad_dt = torch.ops.aten.softplus_backward(grad_delta, inputs.dt, 1, 20)
        grad_D = grad_z = grad_dt_bias = None
        if D is not None:
            skip = D.to(dtype).unflatten(0, (groups, channels))
            grad_D = (grad_scan * inputs.x).sum((0, 1)).flatten().to(D.dtype)
            grad_x = grad_x.addcmul_(grad_scan, skip)
            if scanned is not None:
                scanned.addcmul_(inputs.x, skip)
        if scanned is not None:
            grad_z = torch.ops.aten.silu_backward(grad_out * scanned, inputs.z)
        if dt_bias is not None:
            grad_dt_bias = grad_dt.sum((0, 1)).flatten().to(dt_bias.dtype)
        if initial_states is not None:
            if sequence is None:
                grad_initial = carry
            elif grad_final is not None:
                # an empty sequence hands its initial state on
                empty = torch.ones(initial.shape[0], dtype=torch.bool, device=device)
                empty = empty.index_fill(0, sequence, False)
                grad_initial += grad_final * empty[:, None, None, None]
            grad_initial = _public_layout(grad_initial).to(initial_states.dtype)

        def batch_first(value: Tensor | None, like: Tensor | None) -> Tensor | None:
            if value is None or like is None:
                return None
            return value.transpose(0, 1).reshape(like.shape).to(like.dtype)

        return (
            batch_first(grad_x, x),
            batch_first(grad_dt, dt),
            grad_A.transpose(1, 2).flatten(0, 1).to(A.dtype),
            batch_first(grad_B, B),
            batch_first(grad_C, C),
            grad_D,
            batch_first(grad_z, z),
            grad_dt_bias,
            grad_initial,
            *(None,) * 5,
        )


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y (B, L, D) in x's dtype, final states (S, D, N) in the dtype of the computation, the state before each tile."""
    inputs = _prepare(x, dt, A, B, C, z, dt_bias, padding, dt_softplus)
    y, final, saved = _forward(inputs, initial_states, n_states, starts, sequence, save)
    if D is not None:
        y.addcmul_(inputs.x, D.to(y.dtype).unflatten(0, y.shape[2:]))
    if inputs.z is not None:
        y.mul_(torch.nn.functional.silu(inputs.z))
    final = _public_layout(final)
    if sequence is not None and initial_states is not None:
        empty = torch.ones(n_states, dtype=torch.bool, device=x.device).index_fill(0, sequence, False)
        final = torch.where(empty[:, None, None], initial_states.to(final.dtype), final)
    y = y.flatten(2).transpose(0, 1).to(x.dtype).contiguous()
    # an output must not be a view of an input
    return y, final.clone(memory_format=torch.contiguous_format), saved


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
        if not (_walks(x.device) and bool(valid.all())):
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
        y, final, _ = _scan(*arguments)
    return (y, final) if return_final_states else y
