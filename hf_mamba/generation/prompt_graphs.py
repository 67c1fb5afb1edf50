"""CUDA graphs of reading a prompt into the states of a decoding step.

Launched one by one, the kernels for a short prompt take the host many times as long as the GPU. There is a graph for each of
a few lengths, and a prompt is padded up to the next of them. Padding comes after the real tokens of each row, where it reaches
neither a convolution window nor a state, as in `hf_mamba.sequences`.

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

__all__ = ["MAX_TOKENS", "PromptGraph", "PromptShape", "RowPrompt", "bucket"]

# tokens of a batch, padding included; beyond them a GPU is kept busy by single launches, and what is computed on the way would
# take more memory (0.4 GB for 2.8 B parameters in half precision, once for all graphs of a device)
MAX_TOKENS = 2**12
# shorter prompts are padded to this
SHORTEST = 16


def bucket(length: int) -> int:
    """The length of the graph for prompts of `length` tokens: 16, 20, 24, 28, 32, 40, 48, …, with four steps to a doubling.

    At most a fifth of the result is padding, but for very short prompts.
    """
    if length <= SHORTEST:
        return SHORTEST
    step = 1 << ((length - 1).bit_length() - 3)
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
    """A prompt with the real tokens of each row first.

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
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)
        return cls(ids.gather(1, order), lengths, max(counts), min(counts) == max(counts))

    def shape(self, fresh: bool) -> PromptShape:
        """The shape of a graph that suits this prompt best."""
        length = bucket(self.longest)
        return PromptShape(length, self.equal and self.longest == length, fresh)


@dataclass(frozen=True)
class LastTokens(SequenceLayout):
    """Rows of which only the last real token is wanted.

    Attributes:
        last: (B,) int64, where that is; None = in the last column.
    """

    last: Tensor | None = None

    def restore(self, values: Tensor) -> Tensor:
        """(B, 1, …) of `values` (B, L, …)."""
        if self.last is None:
            return values[:, -1:]
        return values.take_along_dim(self.last.view(-1, *(1,) * (values.dim() - 1)), dim=1)


class PromptGraph:
    """Reads prompts of one shape: ids in, logits out, states updated in place.

    Args:
        model: the language model.
        cache: the states of a decoding step, which are overwritten.
        logits: (B, V) fp32, where the logits for the next token go.
        shape: of the prompts.
        capture: `graphs.capture`.

    Attributes:
        ids: (B, L) int64, the real tokens of each row first; the rest is any token.
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
        # one run before capturing: the model has read prompts before
        self.graph = capture(self._forward, logits.device, warm_ups=1)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids."""
        return self.ids.nbytes

    def read(self, prompt: RowPrompt) -> None:
        """Leave the states and the logits after `prompt` in the decoding step."""
        count = min(prompt.input_ids.shape[1], self.shape.length)
        self.ids[:, :count].copy_(prompt.input_ids[:, :count])
        if not self.shape.full:
            if prompt.lengths is None:
                self.lengths.fill_(prompt.longest)
            else:
                self.lengths.copy_(prompt.lengths)
        self.graph.replay()

    def _forward(self) -> None:
        model = self.model()
        assert model is not None
        if self.shape.full:
            layout = LastTokens()
        else:
            positions = torch.arange(self.shape.length, device=self.ids.device)
            seq_idx = torch.where(positions < self.lengths[:, None], 0, -1).to(torch.int32)
            # made by every replay, so what the layers share of what they derive from it is as well
            remember_while_captured(seq_idx)
            layout = LastTokens(seq_idx=seq_idx, last=self.lengths - 1)
        with _without_states(self.cache) if self.shape.fresh else nullcontext():
            outputs = model(input_ids=self.ids, cache=self.cache, layout=layout, return_dict=True)
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
