"""Reading a prompt that is padded to one of a few lengths, by a CUDA graph into the states of a decoding step.

Launched one by one, the kernels for a short prompt take the host many times as long as the GPU. There is a graph for each of
a few lengths. The first prompt of a length is read without a graph, but padded in the same way: it runs, and compiles, the
kernels that will be captured when the next one comes.

Padding stands in front of the real tokens. Without a state to go on from, it is enough that its embedding and its B are 0:
then nothing of it reaches a convolution window or a state. Otherwise, and where projections have biases, the tokens are
moved to the front and the padding behind them is told by `seq_idx`, as in `hf_mamba.sequences`.

Symbols: B batch, L length of a graph, V vocabulary, d model width.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_kernels.packing import remember_while_captured

from ..cache import RecurrentCache
from ..sequences import SequenceLayout
from .prompt import Prompt

__all__ = [
    "MAX_TOKENS",
    "PromptGraph",
    "PromptShape",
    "RowPrompt",
    "bucket",
    "read_launched",
    "rows_to_read",
    "takes_layouts",
]

# tokens of a batch, padding included; beyond them a GPU is kept busy by single launches, and what is computed on the way would
# take more memory (0.4 GB for 2.8 B parameters in half precision, once for all graphs of a device)
MAX_TOKENS = 2**12
# bytes of states up to which a graph holds those of all layers until its end
COPIED_AT_ONCE = 2**26
# every length is a multiple of this
STEP = 16


def bucket(length: int) -> int:
    """The padded length of prompts of `length` tokens: 16, 32, 48, 64, …, 128, 160, 192, 224, 256, 320, 384, …

    From 64 on there are four to a doubling, so that at most a fifth is padding.
    """
    step = max(STEP, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


class PromptShape(NamedTuple):
    """What prompts of one graph have in common.

    Attributes:
        length: L.
        full: whether every row has exactly that many tokens, so that nothing is padding.
        fresh: whether nothing was read before.
    """

    length: int
    full: bool
    fresh: bool


@dataclass(frozen=True)
class RowPrompt:
    """A prompt with the real tokens of each row last.

    Attributes:
        input_ids: (B, n), or more columns than that.
        lengths: (B,) int64, real tokens of each row; None = n.
        longest: n, the most tokens of a row.
        equal: whether all rows have that many.
    """

    input_ids: Tensor
    lengths: Tensor | None
    longest: int
    equal: bool

    @classmethod
    def of(cls, prompt: Prompt) -> "RowPrompt | None":
        """None if a row has no token."""
        ids, mask = prompt.input_ids, prompt.attention_mask
        if mask is None:
            return cls(ids, None, ids.shape[1], True)
        real = mask != 0
        lengths = real.sum(dim=1)
        # the one look at the device's values
        counts = lengths.tolist()
        if min(counts) == 0:
            return None
        if min(counts) == ids.shape[1]:
            return cls(ids, None, ids.shape[1], True)
        order = real.to(torch.int8).argsort(dim=1, stable=True)
        return cls(ids.gather(1, order), lengths, max(counts), min(counts) == max(counts))

    def shape(self, fresh: bool) -> PromptShape:
        """The shape to read it in."""
        length = bucket(self.longest)
        return PromptShape(length, self.equal and self.longest == length, fresh)

    def write(self, ids: Tensor, lengths: Tensor) -> None:
        """Put the tokens at the end of the rows of `ids` (B, L), and their numbers into `lengths` (B,)."""
        ids[:, ids.shape[1] - self.longest :].copy_(self.input_ids[:, self.input_ids.shape[1] - self.longest :])
        if self.lengths is None:
            lengths.fill_(self.longest)
        else:
            lengths.copy_(self.lengths)


def takes_layouts(model: Any) -> bool:
    """Whether the forwards of model and backbone are those of this package; others may need masks as generate() makes them."""
    return all(type(part).forward.__module__.startswith("hf_mamba.") for part in (model, model.base_model))


def rows_to_read(model: Any, prompt: Prompt, cache: RecurrentCache, chunk: int | None) -> RowPrompt | None:
    """The rows of a prompt, if it can be read padded to one of a few lengths; else the model has to read it as it is.

    Args:
        model: the language model.
        prompt: what `cache` has not seen; anywhere padded.
        cache: states to go on from, or none yet.
        chunk: `prefill_chunk_size` of the call.
    """
    batch, columns = prompt.input_ids.shape
    if prompt.inputs_embeds is not None or prompt.position_ids is not None:
        return None
    if cache.recording or cache.pending_length or cache.batch_size not in (-1, batch):
        return None
    if batch * bucket(columns) > MAX_TOKENS or (chunk is not None and chunk < columns):
        return None
    # looks at the mask's values, so it comes last
    return RowPrompt.of(prompt) if takes_layouts(model) else None


@dataclass(frozen=True)
class LastTokens(SequenceLayout):
    """Rows of which only the last real token is wanted.

    Attributes:
        last: (B,) int64, where that is; None = in the last column.
        real: (B, L) bool, False at padding in front of the rows; None = no padding there.
    """

    last: Tensor | None = None
    real: Tensor | None = None

    def align(self, values: Tensor) -> Tensor:
        """`values` (B, L, d), 0 at padding in front."""
        return values if self.real is None else values * self.real[..., None]

    def restore(self, values: Tensor) -> Tensor:
        """(B, 1, …) of `values` (B, L, …)."""
        if self.last is None:
            return values[:, -1:]
        return values.take_along_dim(self.last.view(-1, *(1,) * (values.dim() - 1)), dim=1)


def read_padded(model: Any, cache: RecurrentCache, shape: PromptShape, ids: Tensor, lengths: Tensor) -> Any:
    """The output of `model`, with logits (B, 1, V), for a prompt that `RowPrompt.write` has written."""
    length = shape.length
    if shape.full:
        layout = LastTokens()
    else:
        positions = torch.arange(length, device=ids.device)
        padding = length - lengths[:, None]
        if shape.fresh and model.base_model.pads_in_front():
            layout = LastTokens(real=positions >= padding)
        else:
            ids = ids.gather(1, (positions + padding) % length)
            seq_idx = torch.where(positions < lengths[:, None], 0, -1).to(torch.int32)
            # made by every replay, so what the layers share of what they derive from it is as well
            remember_while_captured(seq_idx)
            layout = LastTokens(seq_idx=seq_idx, last=lengths - 1)
    return model(input_ids=ids, cache=cache, layout=layout, return_dict=True)


def read_launched(model: Any, cache: RecurrentCache, shape: PromptShape, rows: RowPrompt) -> Any:
    """`read_padded` of `rows`, launch by launch, into `cache`."""
    device, batch = model.device, rows.input_ids.shape[0]
    with torch.no_grad():
        ids = torch.zeros(batch, shape.length, dtype=torch.int64, device=device)
        lengths = torch.empty(batch, dtype=torch.int64, device=device)
        rows.write(ids, lengths)
        return read_padded(model, cache, shape, ids, lengths)


class PromptGraph:
    """Reads prompts of one shape: ids in, logits out, states updated in place.

    Args:
        model: the language model.
        cache: the states of a decoding step, which are overwritten.
        logits: (B, V) fp32, where the logits for the next token go.
        shape: of the prompts.
        capture: `graphs.capture`.

    Attributes:
        ids: (B, L) int64, the real tokens of each row last; the rest is any token.
        lengths: (B,) int64, real tokens of each row.
    """

    def __init__(
        self, model: Any, cache: RecurrentCache, logits: Tensor, shape: PromptShape, capture: Callable[..., Any]
    ):
        self.model = weakref.ref(model)
        self.cache, self.logits, self.shape = cache, logits, shape
        batch = logits.shape[0]
        self.ids = torch.zeros(batch, shape.length, dtype=torch.int64, device=logits.device)
        self.lengths = torch.full((batch,), shape.length, dtype=torch.int64, device=logits.device)
        # one run before capturing: prompts of this shape were read before
        self.graph = capture(self._forward, logits.device, warm_ups=1)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids."""
        return self.ids.nbytes

    def read(self, prompt: RowPrompt) -> None:
        """Leave the states and the logits after `prompt` in the decoding step."""
        prompt.write(self.ids, self.lengths)
        self.graph.replay()

    def _forward(self) -> None:
        model = self.model()
        assert model is not None
        if self.shape.fresh and self.cache.nbytes <= COPIED_AT_ONCE:
            # two copies at the end in place of two in every layer
            new = self.cache.empty()
            outputs = read_padded(model, new, self.shape, self.ids, self.lengths)
            for index in range(2):
                sources = [pair[index] for pair in new.states()]
                # a native class's convolution state has a column more
                targets = [
                    pair[index][..., -source.shape[-1] :]
                    for pair, source in zip(self.cache.states(), sources, strict=True)
                ]
                torch._foreach_copy_(targets, sources)
        else:
            with _without_states(self.cache) if self.shape.fresh else nullcontext():
                outputs = read_padded(model, self.cache, self.shape, self.ids, self.lengths)
        self.logits.copy_(outputs.logits[:, -1])


@contextmanager
def _without_states(cache: RecurrentCache) -> Iterator[None]:
    """Let the layers start anew, and write into the buffers that there are."""
    held = [layer for layer in cache.layers if layer.has_previous_state[0]]
    for layer in held:
        layer.has_previous_state[0] = False
    try:
        yield
    finally:
        for layer in held:
            layer.has_previous_state[0] = True
