"""Reading a prompt into a cache by a CUDA graph, for decoding that goes on from a cache: prompt lookup and assisted decoding.

As where a decoding step follows (`GraphLoop.read`): padded to one of a few lengths, launch by launch the first time, by a graph from
the second time on. The graph reads into states of its own, from which they are copied.

Symbols: B batch, V vocabulary.
"""

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from ..cache import RecurrentCache
from . import graphs
from .prompt import Prompt
from .prompt_graphs import PromptGraph, PromptShape, read_launched, rows_to_read

__all__ = ["read_by_graph"]

# states that prompts of a model are read into, one for each batch size, and graphs for each
MAX_READERS, MAX_PROMPTS = 2, 24


class Reader:
    """Reads prompts of one batch size into states of its own.

    Args:
        model: the language model.
        cache: of the kind of states that are wanted; not changed.
    """

    def __init__(self, model: Any, cache: RecurrentCache, batch: int):
        device = model.device
        self.model = weakref.ref(model)
        self.cache = cache.empty()
        # any token makes states of the right shapes
        model(input_ids=torch.zeros(batch, 1, dtype=torch.int64, device=device), cache=self.cache)
        self.logits = torch.zeros(batch, model.config.vocab_size, dtype=torch.float32, device=device)
        self.prompts: OrderedDict[PromptShape, PromptGraph] = OrderedDict()

    def prompt(self, shape: PromptShape) -> PromptGraph:
        """The graph for prompts of a shape; captured the first time."""
        return graphs.kept(
            self.prompts,
            shape,
            lambda: PromptGraph(self.model(), self.cache, self.logits, shape, graphs.capture),
            MAX_PROMPTS,
        )


# they are dropped together with the other graphs of a model, when something in it changes
_readers: "weakref.WeakKeyDictionary[graphs.Graphs, OrderedDict[Hashable, Reader]]" = weakref.WeakKeyDictionary()


def read_by_graph(model: Any, prompt: Prompt, cache: RecurrentCache, generation_config: Any) -> bool:
    """Read a prompt, padded to one of a few lengths; by a graph if one of that length was read before.

    Args:
        model: the language model.
        prompt: what `cache` has not seen, anywhere padded.
        cache: states to go on from, or none yet; moved on.
        generation_config: of the call.

    Returns:
        Whether the prompt was read; if not, nothing has changed.
    """
    if not graphs.allows_graphs(model, generation_config):
        return False
    rows = rows_to_read(model, prompt, cache, generation_config.prefill_chunk_size)
    if rows is None:
        return False
    batch, shape = prompt.input_ids.shape[0], rows.shape(fresh=cache.batch_size == -1)
    seen = cache.get_seq_length() + prompt.length
    with torch.inference_mode(False), torch.no_grad():
        with graphs.CAPTURING:
            store = graphs.graphs_of(model)
            if store is None or graphs.PROMPTS in store.refused:
                return False
            graph = None
            if store.seen_before(("reader", batch, cache.ssm_dtype, shape)):
                graph = graphs.attempt(
                    store,
                    graphs.PROMPTS,
                    lambda: _graph(store, model, cache, batch, shape),
                    "the prompt",
                    again=False,
                )
            if graph is not None:
                if not shape.fresh:
                    graph.cache.copy_from(cache)
                graph.read(rows)
                cache.copy_from(graph.cache)
        if graph is None:
            read_launched(model, cache, shape, rows)
    cache._seen = seen
    return True


def _graph(store: graphs.Graphs, model: Any, cache: RecurrentCache, batch: int, shape: PromptShape) -> PromptGraph:
    device = model.device
    # what another stream reads out of a reader's states, this one must not overwrite
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    readers = _readers.setdefault(store, OrderedDict())
    key = batch, cache.ssm_dtype, stream
    return graphs.kept(readers, key, lambda: Reader(model, cache, batch), MAX_READERS).prompt(shape)
