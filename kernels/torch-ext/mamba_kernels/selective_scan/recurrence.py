"""The linear recurrence h[t] = decay[t] * h[t - 1] + b[t] over a tile, the buffers it works in, and the tokens where sequences
start and end.
"""

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Marked",
    "Marks",
    "OuterBuffer",
    "Scratch",
    "StateBuffer",
    "empty_sequences",
    "give_back",
    "marks_of",
    "recurrence_",
    "take_scratch",
    "walk_",
    "walks",
]


def walks(device: torch.device) -> bool:
    """Whether to walk through time one token after the other: not in a traced graph, and not where launches are dear."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


# elements of an operation that torch gives to one thread (at::internal::GRAIN_SIZE)
GRAIN = 1 << 15


def _padded_channels(shape: tuple[int, ...], device: torch.device) -> int:
    """Channels for which to make room in a buffer (T, B, G, N, M).

    A token is one operation when it is walked over. Where its states just fill what torch gives to one thread, as sizes that are
    powers of two do, a few more let another one take half.
    """
    rows, channels = math.prod(shape[1:4]), shape[4]
    if not walks(device) or torch.get_num_threads() == 1 or not GRAIN - GRAIN // 16 <= rows * channels <= GRAIN:
        return channels
    # in steps of a cache line
    return (GRAIN // rows // 16 + 1) * 16


class StateBuffer:
    """Room for the states or the decays of a tile, used again for every tile; the views of single tokens are made once.

    Attributes:
        tile: (T, B, G, N, M).
        tokens: T times (B, G, N, ≥ M), what there is of a token in memory; 0 beyond the channels.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels: int | None = None
    ) -> None:
        """`shape` is (T, B, G, N, M), `channels` the size of the last dimension in memory."""
        channels = _padded_channels(shape, device) if channels is None else channels
        whole = torch.empty((*shape[:4], channels), dtype=dtype, device=device)
        whole[..., shape[4] :].zero_()
        self.tile = whole[..., : shape[4]]
        self.tokens = whole.unbind(0) if walks(device) else ()


class OuterBuffer:
    """Room for the two factors of what a tile adds to its states, rows[t] ⊗ values[t], used again for every tile."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """`shape` is (T, B, G, N, M)."""
        rows = StateBuffer((*shape[:4], 1), dtype, device, channels=1)
        channels = _padded_channels(shape, device)
        values = StateBuffer((*shape[:3], 1, shape[4]), dtype, device, channels=channels)
        self.rows, self.values = rows.tile[..., 0], values.tile[:, :, :, 0]  # (T, B, G, N), (T, B, G, M)
        # views that multiply to a token's (B, G, N, ≥ M)
        self.tokens = list(zip(rows.tokens, values.tokens, strict=True))


class Scratch:
    """What a scan works in, made when it is first asked for. Nothing of it may be part of an output or be saved.

    Attributes:
        added: an `OuterBuffer`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """`shape` is (T, B, G, N, M)."""
        self.shape, self.dtype, self.device = shape, dtype, device
        self.added = OuterBuffer(shape, dtype, device)
        self._narrow: list[Tensor] = []
        self._states: list[StateBuffer] = []

    def narrow(self, count: int) -> list[Tensor]:
        """`count` tensors (T, B, G, M)."""
        while len(self._narrow) < count:
            shape = (*self.shape[:3], self.shape[4])
            self._narrow.append(torch.empty(shape, dtype=self.dtype, device=self.device))
        return self._narrow[:count]

    def states(self, count: int) -> list[StateBuffer]:
        """`count` buffers (T, B, G, N, M)."""
        while len(self._states) < count:
            self._states.append(StateBuffer(self.shape, self.dtype, self.device))
        return self._states[:count]

    def nbytes(self) -> int:
        views = [self.added.rows, self.added.values, *self._narrow, *(buffer.tile for buffer in self._states)]
        return sum(view.untyped_storage().nbytes() for view in views)


# bytes that the scratch of one thread may have to be kept, so that a scan need not touch new pages, 4 KB by 4 KB: 4 % of a
# training step (docs/performance.md). The three tiles of backward usually come to 25 MB, to 64 only if a batch is wide
KEPT_BYTES = 64 << 20


class _Kept(threading.local):
    """The scratch that the last scan of this thread has left, and what it was made for; it goes with the thread."""

    key: tuple[object, ...] | None = None
    scratch: Scratch | None = None


_kept = _Kept()


def _keeps(device: torch.device) -> bool:
    """Whether buffers may outlive a call: they have to be plain memory, in a plain call.

    Not in a traced graph, under a transform or a mode, which may have other tensors made or ride on them, as tangents do, in
    inference mode, whose tensors may not be written to outside, or where torch fills new memory with NaN to show what is read
    unwritten.
    """
    return (
        walks(device)
        and not torch.is_inference_mode_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and not torch.jit.is_tracing()
        and not (
            torch.are_deterministic_algorithms_enabled() and torch._C._get_deterministic_fill_uninitialized_memory()
        )
    )


def _key(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[object, ...]:
    return shape, _padded_channels(shape, device), dtype, device


def take_scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Scratch:
    """The scratch that the last scan of this thread gave back, if it has this shape (T, B, G, N, M), or a new one.

    It is the caller's alone until it is given back: a scan inside a scan, or in another thread, gets another one.
    """
    if not _keeps(device) or _kept.scratch is None or _kept.key != _key(shape, dtype, device):
        return Scratch(shape, dtype, device)
    scratch, _kept.scratch = _kept.scratch, None
    return scratch


def give_back(scratch: Scratch) -> None:
    """Keep `scratch` for this thread's next scan, in the place of what was kept before, unless it has over 64 MB.

    To be called where nothing went wrong: what an exception leaves behind is not used again.
    """
    if not _keeps(scratch.device) or scratch.nbytes() > KEPT_BYTES:
        return
    _kept.key, _kept.scratch = _key(scratch.shape, scratch.dtype, scratch.device), scratch


def walk_(decay: StateBuffer, before: Tensor, added: OuterBuffer, tokens: int) -> None:
    """h[t] = decay[t] * h[t - 1] + rows[t] ⊗ values[t] in the place of the decays. Only where `walks` holds.

    No second tile is written: half the memory traffic of `recurrence_`. `before` (B, G, N, M) is the state before the first
    token, and no view of `decay`.
    """
    decay.tile[0].mul_(before)
    state = decay.tokens[0].addcmul_(*added.tokens[0])
    for t in range(1, tokens):
        state = decay.tokens[t].mul_(state).addcmul_(*added.tokens[t])


def recurrence_(h: StateBuffer, decay: StateBuffer, tokens: int, reverse: bool = False) -> None:
    """In place, h[t] += decay[t] * h[t - 1] from the second token on; reverse: h[t] += decay[t + 1] * h[t + 1].

    Only the first `tokens` tokens of the buffers count. No division and no product of decays grows, so any decays up to 1
    are safe.
    """
    if not h.tokens:
        h_tile, decay_tile = h.tile[:tokens], decay.tile[:tokens]
        if reverse:
            result = _log_depth_recurrence(h_tile.flip(0), decay_tile.roll(-1, 0).flip(0)).flip(0)
        else:
            result = _log_depth_recurrence(h_tile, decay_tile)
        h_tile.copy_(result)
        return
    states, decays = h.tokens, decay.tokens
    if reverse:
        for t in range(tokens - 2, -1, -1):
            states[t].addcmul_(decays[t + 1], states[t + 1])
    else:
        for t in range(1, tokens):
            states[t].addcmul_(decays[t], states[t - 1])


def _log_depth_recurrence(h: Tensor, decay: Tensor) -> Tensor:
    """The forward recurrence by odd-even reduction (Blelloch 1990, section 1.4): O(T) work in O(log T) operations."""
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


class Marked(NamedTuple):
    """The marked tokens of a tile."""

    rows: Tensor  # (k,) int64, positions in the tile flattened over token and batch
    states: Tensor | None  # (k,) int64, the row of the states that belongs to each
    really: Tensor | None  # (k, 1, 1, 1) bool, which of them are marked indeed; None for all

    def keep(self, value: Tensor) -> Tensor:
        """`value` (k, G, N, M), 0 at tokens that are not really marked."""
        return value if self.really is None else torch.where(self.really, value, 0)

    def clear_(self, tile: Tensor) -> None:
        """Set the marked tokens of `tile` (T, B, G, N, M) to 0."""
        if self.really is None:
            tile.flatten(0, 1).index_fill_(0, self.rows, 0)
        else:
            tile.flatten(0, 1).masked_fill_(self.really, 0)


class Marks:
    """The tokens at which something happens to the state: a sequence starts or ends."""

    def __init__(self, mask: Tensor, sequence: Tensor | None) -> None:
        """`mask` (L, B) bool; `sequence` (L,) int64, the row of the states of each token, if there is one per sequence."""
        self.mask = mask
        self.sequence = sequence

    def within(self, start: int, end: int) -> Marked | None:
        """The marked tokens from start to end, None if there are none.

        Reading which tokens are marked costs nothing on a CPU. Elsewhere it would wait for the device, and in a traced
        graph shapes would depend on data, so there every token is listed, with a mask.
        """
        mask = self.mask[start:end].flatten()
        sequence = None if self.sequence is None else self.sequence[start:end]
        if not walks(mask.device):
            return Marked(torch.arange(mask.shape[0], device=mask.device), sequence, mask[:, None, None, None])
        rows = mask.nonzero().squeeze(1)
        if rows.shape[0] == 0:
            return None
        return Marked(rows, None if sequence is None else sequence[rows], None)


def marks_of(starts: Tensor | None, sequence: Tensor | None) -> tuple[Marks | None, Marks | None]:
    """Marks of the first token of every sequence and, if there is a state per sequence, of the last; `starts` (B, L) bool."""
    if starts is None:
        return None, None
    begins = starts.transpose(0, 1)
    if sequence is None:
        return Marks(begins, None), None
    ends = torch.cat([begins[1:], torch.ones_like(begins[:1])])
    return Marks(begins, sequence), Marks(ends, sequence)


def empty_sequences(sequence: Tensor, n_states: int) -> Tensor:
    """(S,) bool, which sequences have no token; `sequence` (L,) int64."""
    return torch.ones(n_states, dtype=torch.bool, device=sequence.device).index_fill(0, sequence, False)
