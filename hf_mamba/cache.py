"""RecurrentCache: the constant-size state of a Mamba model between two calls.

A recurrent state cannot be cut short like a key/value cache, but it can be copied and recomputed. The cache therefore
counts the tokens it has *seen*; while recording, it keeps a snapshot of the states before each forward, and after one of a
few tokens the states after each of them (`Drafts`). `crop` takes the states it wants out of those. Where there are none, it goes
back to the newest snapshot that is early enough, and the tokens between the snapshot and the target become *pending*: they
count as seen and are fed again at the front of the next forward. This makes chunked prefill, multi-turn reuse, prompt-lookup
and assisted decoding exact.

Symbols: B batch, L length, T drafted tokens, D convolution channels, W convolution width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from .cache_files import load_states, save_states
from .cache_layer import Drafts, RecurrentLayer, held_states, write_states

__all__ = ["MAX_REPLAY", "ONE_NAME", "RecurrentCache", "name_of_cache"]

# since 5.24, transformers has one name for a cache, and finds outputs' caches by the old two
ONE_NAME = hasattr(ModelOutput, "cache_params")

# replaying more tokens than this costs more than one extra forward that moves the states up to them
MAX_REPLAY = 16

# forwards that were taken back in part by the states after their tokens, beyond which nothing older is remembered
KEPT_CUTS = 2


@dataclass
class _Step:
    """One forward while recording: the states before it, its inputs (pending ones included) and where they start."""

    snapshots: list
    inputs_embeds: Tensor
    padding: Tensor | None
    start: int
    # whether some of its tokens were taken back since
    cut: bool = False


class RecurrentCache(DynamicCache):
    """States of all layers, with an exact token count, rollback and batch operations.

    The size does not depend on the number of tokens seen: `nbytes` says how many bytes the states take.

    Args:
        config: the model's configuration; only `num_hidden_layers` is read.
        max_snapshots: while recording, how many forwards can be undone.
        ssm_dtype: what SSM states are kept in between two forwards, torch.float32 by default. torch.bfloat16 halves their memory
            and, in large batches, the time to read and write them; docs/performance.md says what it costs in accuracy.

    Example:
        >>> import torch
        >>> from hf_mamba import MambaConfig, MambaForCausalLM, RecurrentCache
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2)).eval()
        >>> cache, ids = RecurrentCache(model.config), torch.arange(6)[None]
        >>> first, second = (model(part, cache=cache).logits for part in (ids[:, :4], ids[:, 4:]))
        >>> torch.allclose(torch.cat([first, second], dim=1), model(ids).logits, atol=1e-5), cache.get_seq_length()
        (True, 6)
    """

    # generate() must hand over the 2-D mask, not build attention masks for a compiled static cache
    is_compileable = False
    is_croppable = True

    def __init__(self, config: PreTrainedConfig, max_snapshots: int = 64, ssm_dtype: torch.dtype | None = None):
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"`config` must be a model configuration, got {type(config).__name__}; pass model.config.")
        if max_snapshots < 1:
            raise ValueError(f"`max_snapshots` must be at least 1, got {max_snapshots}.")
        if ssm_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"`ssm_dtype` must be torch.float32, torch.bfloat16, torch.float16 or None, got {ssm_dtype!r}."
            )
        self._set_up(config.num_hidden_layers, max_snapshots, ssm_dtype)

    def _set_up(self, num_layers: int, max_snapshots: int, ssm_dtype: torch.dtype | None) -> None:
        Cache.__init__(self, layers=[RecurrentLayer(ssm_dtype) for _ in range(num_layers)])
        self.max_snapshots, self.ssm_dtype = max_snapshots, ssm_dtype
        self.recording = False
        # whether the states are in the layers' `drafts` and forwards of a fixed number of tokens update those
        self.verifying = False
        self._seen = 0
        self._pending: tuple[Tensor, Tensor | None] | None = None
        self._history: list[_Step] = []

    # what the model calls around its layers

    def begin(self, inputs_embeds: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Put pending tokens in front of the new ones and, while recording, take a snapshot.

        Args:
            inputs_embeds: (B, L, d) of the new tokens.
            padding: (B, L) bool, False at padding; None = no padding.

        Returns:
            The same two for pending and new tokens, and the number of pending tokens.
        """
        self._leave_inference_mode()
        batch = self.batch_size
        if batch not in (-1, inputs_embeds.shape[0]):
            raise ValueError(
                f"The cache holds states for a batch of {batch}, but the inputs have a batch of {inputs_embeds.shape[0]}; "
                "pass a new cache, or select or repeat its rows first."
            )
        count = self.pending_length
        start = self._seen - count
        if self._pending is not None:
            embeds, mask = self._pending
            padding = _concatenated_padding(embeds, mask, inputs_embeds, padding)
            inputs_embeds = torch.cat([embeds.to(inputs_embeds), inputs_embeds], dim=1)
        if not self.verifying:
            self._drop_drafts()
        if self.recording:
            # a loop that takes back a part of every draft only ever goes back within the last one
            cuts = [index for index, step in enumerate(self._history) if step.cut]
            del self._history[: cuts[-KEPT_CUTS] if len(cuts) > KEPT_CUTS else 0]
            snapshots = [layer.snapshot() for layer in self.layers]
            self._history.append(_Step(snapshots, inputs_embeds.detach(), padding, start))
            del self._history[: -self.max_snapshots]
        return inputs_embeds, padding, count

    def end(self, length: int) -> None:
        """Count `length` new tokens (without pending ones) as seen; the pending ones are in the states now."""
        self._seen += length
        self._pending = None

    @property
    def pending_length(self) -> int:
        """Tokens that count as seen but are not in the states yet."""
        return 0 if self._pending is None else self._pending[0].shape[1]

    def take_pending(self) -> tuple[Tensor, Tensor | None]:
        """Hand over the pending tokens to a forward that moves the states past them; they are no longer counted."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._seen -= pending[0].shape[1]
        return pending

    # what transformers and users call

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, the same for all layers."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows of the states; -1 before the first forward."""
        for layer in self.layers:
            if layer.has_previous_state[0]:
                return layer.conv_states[0].shape[0]
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes that the states of all layers take; constant in the number of tokens."""
        states = (s for layer in self.layers for s in (layer.conv_states[0], layer.recurrent_states[0]))
        return sum(state.numel() * state.element_size() for state in states if state is not None)

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs to go back: a snapshot before each forward, and the states after each of a few tokens."""
        self.recording = True

    def stop_past_recording(self) -> None:
        """Take no more snapshots and drop those there are."""
        self.recording = False
        self._history.clear()
        self._drop_drafts()

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.recording

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by `-tokens_to_remove` tokens.

        Args:
            tokens_to_remove: 0 or negative, as transformers' caches take it. 0 keeps all tokens and drops the snapshots.

        Raises:
            ValueError: positive, more tokens than were seen, or further back than the snapshots reach.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes the number of tokens to remove as a negative number, got {tokens_to_remove}; "
                f"to keep the first n tokens call cache.crop(n - cache.get_seq_length())."
            )
        count = -tokens_to_remove
        if count == 0:
            self._history.clear()
            self._drop_drafts()
            return
        target = self._seen - count
        if target < 0:
            raise ValueError(f"`crop` cannot remove {count} tokens from a cache that has seen {self._seen}.")
        if self._pending is not None and count <= self.pending_length:
            embeds, mask = self._pending
            keep = embeds.shape[1] - count
            self._pending = (embeds[:, :keep], None if mask is None else mask[:, :keep]) if keep else None
            self._seen = target
            return
        if self._go_back_within_drafts(target):
            return
        self._drop_drafts()
        index = next((i for i in reversed(range(len(self._history))) if self._history[i].start <= target), None)
        if index is None:
            raise ValueError(
                f"`crop` cannot go back to token {target}: there is no snapshot that early. Call "
                "cache.activate_past_recording() before the forward to undo, or raise `max_snapshots`."
            )
        self._leave_inference_mode()
        step = self._history[index]
        del self._history[index:]
        for layer, snapshot in zip(self.layers, step.snapshots, strict=True):
            layer.restore(snapshot)
        keep = target - step.start
        padding = None if step.padding is None else step.padding[:, :keep]
        self._pending = (step.inputs_embeds[:, :keep], padding) if keep else None
        self._seen = target

    def _go_back_within_drafts(self, target: int) -> bool:
        """Take the states after `target` tokens out of those of the last forward, if they are there."""
        if not self._history:
            return False
        step = self._history[-1]
        keep, fed = target - step.start, step.inputs_embeds.shape[1]
        layers = [layer for layer in self.layers if layer.has_previous_state[0]]
        if keep < 1 or any(layer.drafts is None or layer.drafts.tokens != fed for layer in layers):
            return False
        self._leave_inference_mode()
        for layer in layers:
            layer.go_back(keep - 1)
        step.cut = True
        self._pending, self._seen = None, target
        return True

    def _drop_drafts(self) -> None:
        for layer in self.layers:
            layer.drafts = None

    def for_verifying(self, tokens: int) -> "RecurrentCache":
        """A new cache for the same model and batch, in which forwards of `tokens` tokens leave the states after each.

        It holds no states before `take_for_verifying`. Every forward goes on from the token that `accepted` names, of the ones
        of the forward before.
        """
        new = self.empty()
        accepted = torch.zeros(self.batch_size, dtype=torch.int64, device=self.states()[0][0].device)
        for layer, own in zip(self.layers, new.layers, strict=True):
            pair = held_states(layer)
            if pair is not None:
                own.drafts = Drafts.for_states(*pair, tokens, accepted)
                own.adopt(*own.drafts.after(0))
        new.verifying = True
        return new

    def take_for_verifying(self, other: "RecurrentCache") -> None:
        """Go on from the states of `other`; only in a cache made by `for_verifying`."""
        drafts = self.drafts()
        last = drafts[0].tokens - 1
        self._copy_pairs([each.after(last) for each in drafts], other.states())
        drafts[0].accepted.fill_(last)

    def give_verified(self, other: "RecurrentCache", token: int) -> None:
        """Copy the states after a token of the last forward, counted from 0, to `other`; the token count is left alone."""
        self._copy_pairs(other.states(), [each.after(token) for each in self.drafts()])

    def drafts(self) -> list[Drafts]:
        """The buffers of every layer that has some."""
        return [layer.drafts for layer in self.layers if layer.drafts is not None]

    @staticmethod
    def _copy_pairs(targets: list[tuple[Tensor, Tensor]], sources: list[tuple[Tensor, Tensor]]) -> None:
        torch._foreach_copy_(
            [state for pair in targets for state in pair], [state for pair in sources for state in pair]
        )

    def reset(self) -> None:
        """Forget all tokens and keep the storage."""
        self._leave_inference_mode()
        super().reset()
        self._drop_drafts()
        self._seen, self._pending = 0, None
        self._history.clear()

    def _leave_inference_mode(self) -> None:
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            for layer in self.layers:
                layer.leave_inference_mode()

    def _map_rows(self, select) -> None:
        self._drop_drafts()
        if self._pending is not None:
            embeds, mask = self._pending
            self._pending = select(embeds), None if mask is None else select(mask)
        for step in self._history:
            step.inputs_embeds = select(step.inputs_embeds)
            step.padding = None if step.padding is None else select(step.padding)
            step.snapshots = [
                None if s is None else tuple(None if t is None else select(t) for t in s) for s in step.snapshots
            ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (B,), for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a bool mask)."""
        super().batch_select_indices(indices)
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    # for callers that keep their own batch: continuous batching, prefix reuse, saved conversations

    def states(self) -> list[tuple[Tensor, Tensor]]:
        """The convolution state (B, D, ≥ W - 1) and the SSM state of every layer that has them, not copied."""
        return [pair for pair in map(held_states, self.layers) if pair is not None]

    def copy_from(self, other: "RecurrentCache") -> None:
        """Take over states and token count of `other`, in place where this cache has states of the same shapes already.

        Raises:
            ValueError: `other` has another number of layers, or tokens to replay after `crop`.
        """
        self._check_partner(other)
        self._drop_drafts()
        if [tuple(s.shape for s in pair) for pair in self.states()] == [
            tuple(s.shape for s in pair) for pair in other.states()
        ]:
            targets, sources = ([state for pair in cache.states() for state in pair] for cache in (self, other))
            if targets:
                torch._foreach_copy_(targets, sources)
        else:
            for index, pair in enumerate(map(held_states, other.layers)):
                if pair is not None:
                    write_states(self, index, *(state.clone() for state in pair))
        self._seen = other._seen

    def empty(self) -> "RecurrentCache":
        """A new cache for the same model, without states."""
        new = RecurrentCache.__new__(RecurrentCache)
        new._set_up(len(self.layers), self.max_snapshots, self.ssm_dtype)
        return new

    def select(self, rows: Tensor | Sequence[int]) -> "RecurrentCache":
        """A new cache with copies of some rows, in the order given; a row may be taken several times.

        Args:
            rows: (R,) integers from 0 to B - 1.

        Raises:
            ValueError: no state yet, a row that does not exist, or tokens to replay after `crop`.
        """
        index = self._row_index(rows)
        self._check_partner(self)
        new = self.empty()
        for number, pair in enumerate(map(held_states, self.layers)):
            if pair is not None:
                write_states(new, number, *(state.index_select(0, index) for state in pair))
        new._seen = self._seen
        return new

    def insert(self, rows: Tensor | Sequence[int], other: "RecurrentCache") -> None:
        """Put the rows of `other` in the place of some rows of this cache, in place.

        The rows of a cache may have seen different numbers of tokens; its own count is then that of the longest.

        Args:
            rows: (R,) integers from 0 to B - 1, no two the same.
            other: a cache of R rows for the same model.

        Raises:
            ValueError: no state yet, rows that do not exist or stand twice, another number of rows, another model's states,
                or tokens to replay after `crop`.
        """
        index = self._row_index(rows)
        self._check_partner(other)
        if other.batch_size != len(index) or len(index.unique()) != len(index):
            raise ValueError(
                f"`rows` must name one row of this cache, each once, for each of the {other.batch_size} rows of `other`, got "
                f"{index.tolist()}."
            )
        self._drop_drafts()
        pairs = list(zip(self.states(), other.states(), strict=True))
        for own, given in pairs:
            if [s.shape[1:] for s in own] != [s.shape[1:] for s in given]:
                raise ValueError(
                    f"`other` holds states of shapes {[tuple(s.shape[1:]) for s in given]} a row, this cache of "
                    f"{[tuple(s.shape[1:]) for s in own]}: they belong to different models."
                )
        for own, given in pairs:
            for state, new in zip(own, given, strict=True):
                state.index_copy_(0, index.to(state.device), new.to(state))
        self._seen = max(self._seen, other._seen)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write states and token count to a safetensors file, of `nbytes` and a small header whatever the length.

        The file is written under a temporary name and renamed.

        Raises:
            ValueError: no state yet, or tokens to replay after `crop`.
        """
        if self.batch_size == -1:
            raise ValueError("The cache has no states yet; run a forward with it first.")
        self._check_partner(self)
        save_states(path, [held_states(layer) for layer in self.layers], self._seen)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PreTrainedConfig, device: str | torch.device = "cpu"
    ) -> "RecurrentCache":
        """Read a file of `save`.

        Args:
            path: the file.
            config: the configuration of the model that will continue.
            device: where the states go.

        Raises:
            ValueError: not such a file, or one of a model with another number of layers.
        """
        cache = cls(config)
        states, seen = load_states(path, len(cache.layers), device)
        for index, pair in enumerate(states):
            if pair is not None:
                write_states(cache, index, *pair)
        cache._seen = seen
        return cache

    def _row_index(self, rows: Tensor | Sequence[int]) -> Tensor:
        batch = self.batch_size
        if batch == -1:
            raise ValueError("The cache has no states yet; run a forward with it first.")
        index = torch.as_tensor(rows)
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool or index.numel() == 0:
            raise ValueError(f"`rows` must be a list of row numbers, got {rows!r}.")
        if int(index.min()) < 0 or int(index.max()) >= batch:
            raise ValueError(f"`rows` must lie between 0 and {batch - 1}, got {index.tolist()}.")
        return index.to(device=self.states()[0][0].device, dtype=torch.int64)

    def _check_partner(self, other: "RecurrentCache") -> None:
        if not isinstance(other, RecurrentCache) or len(other.layers) != len(self.layers):
            raise ValueError(f"The other cache must be a RecurrentCache of {len(self.layers)} layers, got {other!r}.")
        if self._pending is not None or other._pending is not None:
            raise ValueError(
                "The cache has tokens to replay after crop(), which are not in its states yet; run a forward with it first."
            )
        self._leave_inference_mode()


def name_of_cache(cache: Cache) -> str:
    """The name under which this version of transformers passes `cache` from one step of `generate()` to the next."""
    if ONE_NAME:
        return "cache"
    # under `past_key_values`, generate() would build attention masks for a stock cache
    return "past_key_values" if isinstance(cache, RecurrentCache) else "cache_params"


def _concatenated_padding(
    first_embeds: Tensor, first: Tensor | None, second_embeds: Tensor, second: Tensor | None
) -> Tensor | None:
    if first is None and second is None:
        return None
    parts = [
        mask if mask is not None else torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for embeds, mask in ((first_embeds, first), (second_embeds, second))
    ]
    return torch.cat(parts, dim=1)
