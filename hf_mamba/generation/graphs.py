"""CUDA graphs: capturing and keeping them, and when they may be replayed.

A graph replays the kernels that were launched while it was captured, on the same addresses. So it is right as long as every
tensor of the model is where it was and nothing else that steers the Python code has changed. A fingerprint collects both;
weights that are changed in place, by an optimiser or by merging an adapter, are read anew by every replay.

Symbols: B batch, V vocabulary.
"""

import contextlib
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging

from mamba_kernels.early import early_launches

from ..cache import RecurrentCache
from .fingerprint import Watch, fingerprint
from .prompt_graphs import PromptGraph, PromptShape

__all__ = [
    "PROMPTS",
    "DecodeStep",
    "Graphs",
    "allows_graphs",
    "attempt",
    "capture",
    "graphs_of",
    "kept",
    "last_graphs_of",
    "runs_graphs",
]

logger = logging.get_logger(__name__)

# what is refused when no prompt of a model can be captured
PROMPTS = "prompts"
# model steps (one for each batch size) that are kept for a model; samplers (one for each set of options) and prompts (one for
# each length) for a step
MAX_STEPS, MAX_SAMPLERS, MAX_PROMPTS = 4, 8, 24
# shapes of prompts that are remembered as having been read once
MAX_SEEN = 512
# of the device's memory, the most that the states of kept steps may take together
MEMORY_SHARE = 0.1
# launches before capturing: kernels are compiled and libraries initialised outside the graph
WARM_UPS = 2


class CudaGraph:
    """`function`, which has no arguments and no result, as a graph."""

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.graph = torch.cuda.CUDAGraph()
        self.pool = memory_pool(device)
        # other threads may go on using the device
        captured = torch.cuda.graph(self.graph, pool=self.pool.handle, capture_error_mode="thread_local")
        with torch.cuda.device(device), captured:
            function()

    def replay(self) -> None:
        self.graph.replay()


def warm_up(function: Callable[[], None], device: torch.device, times: int) -> None:
    """Run `function` as it is going to be captured; what compiles kernels or initialises libraries happens here.

    On the current stream: memory that a stream of its own used for a long prompt would stay with that stream.
    """
    with torch.cuda.device(device):
        for _ in range(times - 1):
            function()
        # a look at a tensor's values is an error here, where it does no harm yet
        with _no_synchronisation():
            function()


# held while graphs are looked up and captured; the prompt of an assistant is read in the middle of that
CAPTURING = threading.RLock()


class MemoryPool:
    """Memory that the graphs on a device share: they never run at the same time, so what is not kept can be.

    It ends with the last of its graphs, all of which hold it; torch does not take up again what has ended.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


_pools: "weakref.WeakValueDictionary[torch.device, MemoryPool]" = weakref.WeakValueDictionary()


def memory_pool(device: torch.device) -> MemoryPool:
    """The pool of the graphs that there are on a device, or a new one."""
    pool = _pools.get(device)
    if pool is None:
        pool = _pools[device] = MemoryPool()
    return pool


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Raise RuntimeError where torch would wait for the device."""
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # that it does not find everything, which capturing then does
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def capture(function: Callable[[], None], device: torch.device, warm_ups: int = WARM_UPS) -> Any:
    """Capture `function`; it runs a few times on the way, and the random state is as before.

    Launches that start early are tried first. What else is launched decides whether a graph takes them.

    Raises:
        torch.cuda.OutOfMemoryError: no memory for the graph.
        RuntimeError: something in `function` cannot be captured, such as a look at a tensor's values.
    """
    with early_launches() as early:
        try:
            return _capture(function, device, warm_ups)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            if not early.used:
                raise
    return _capture(function, device, warm_ups)


def _capture(function: Callable[[], None], device: torch.device, warm_ups: int) -> Any:
    state = torch.cuda.get_rng_state(device)
    begun = False
    try:
        warm_up(function, device, warm_ups)
        begun = True
        return CudaGraph(function, device)
    except BaseException:
        if begun:
            _forget_broken_capture(device)
        raise
    finally:
        torch.cuda.synchronize(device)
        torch.cuda.set_rng_state(state, device)


def _forget_broken_capture(device: torch.device) -> None:
    # a capture that breaks off leaves the generator waiting for its end, and every later random number an error
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
    # graphs that draw from the one before would no longer follow the seed
    for found in list(_graphs.values()):
        found.steps.clear()
    # its memory pool still waits for the end as well
    _pools.pop(device, None)


Kept = TypeVar("Kept")


def kept(known: "OrderedDict[Any, Kept]", key: Hashable, make: Callable[[], Kept], most: int) -> Kept:
    """`known[key]`, made the first time; no more than `most` stay, those that were asked for last."""
    found = known.pop(key, None)
    if found is None:
        found = make()
        while len(known) >= most:
            known.popitem(last=False)
    known[key] = found
    return found


class DecodeStep:
    """One step of a model on a batch of a fixed size: ids in, logits out, states updated in place.

    Args:
        model: the language model.
        cache: states of the right shapes, which are copied.

    Attributes:
        ids: (B, 1) int64, the tokens to read.
        logits: (B, V) fp32, for the tokens after them.
        cache: the states.
    """

    def __init__(self, model: Any, cache: RecurrentCache):
        self.model = weakref.ref(model)
        self.cache = cache.empty()
        self.cache.copy_from(cache)
        device = model.device
        self.ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(cache.batch_size, model.config.vocab_size, dtype=torch.float32, device=device)
        self.lock = threading.Lock()
        self.samplers: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()
        self.prompts: OrderedDict[Hashable, PromptGraph] = OrderedDict()
        # as in transformers' own loop: of experts, only the chosen ones are read
        with model._optimize_model_for_decode():
            self.graph = capture(self._forward, device)

    def _forward(self) -> None:
        model = self.model()
        assert model is not None
        self.logits.copy_(model(input_ids=self.ids, cache=self.cache, return_dict=True).logits[:, -1])

    @property
    def nbytes(self) -> int:
        """Bytes of the states, logits, samplers and prompts; what is computed on the way is in the graphs' pool."""
        prompts = sum(prompt.nbytes for prompt in self.prompts.values())
        return self.cache.nbytes + self.logits.nbytes * (1 + len(self.samplers)) + prompts

    def sampler(self, key: Hashable, make: Callable[[], Any]) -> tuple[Any, Any]:
        """The sampler for a set of options and its graph; captured the first time."""

        def captured() -> tuple[Any, Any]:
            sampler = make()
            return sampler, capture(sampler, self.ids.device)

        return kept(self.samplers, key, captured, MAX_SAMPLERS)

    def prompt(self, shape: PromptShape) -> PromptGraph:
        """The graph that reads prompts of a shape into the states of this step; captured the first time."""
        return kept(
            self.prompts,
            shape,
            lambda: PromptGraph(self.model(), self.cache, self.logits, shape, capture),
            MAX_PROMPTS,
        )


class Graphs:
    """The captured steps of a model as it was at one fingerprint, the least recently used first."""

    def __init__(self, mark: Hashable) -> None:
        self.mark = mark
        self.watch: Watch | None = None
        self.steps: OrderedDict[Hashable, DecodeStep] = OrderedDict()
        # what could not be captured is not tried again before the model changes
        self.refused: set[Hashable] = set()
        # shapes of prompts that were read once, which does not pay for a graph yet
        self.seen: OrderedDict[Hashable, None] = OrderedDict()

    def has_step(self, cache: RecurrentCache) -> bool:
        """Whether the step for the batch of `cache` is captured already."""
        return step_key(cache) in self.steps

    def step_for(self, cache: RecurrentCache, batch: int) -> DecodeStep | None:
        """A step that is captured already and could go on from `cache`, which may have no states yet."""
        if cache.batch_size != -1:
            step = self.steps.get(step_key(cache))
        else:
            fitting = (step for step in self.steps.values() if step.cache.batch_size == batch)
            step = next((step for step in fitting if step.cache.ssm_dtype == cache.ssm_dtype), None)
        if step is not None:
            self.steps.move_to_end(step_key(step.cache))
        return step

    def seen_before(self, shape: Hashable) -> bool:
        """Whether a prompt of this shape was read before; the next time the answer is yes."""
        known = shape in self.seen
        self.seen[shape] = None
        self.seen.move_to_end(shape)
        while len(self.seen) > MAX_SEEN:
            self.seen.popitem(last=False)
        return known

    def step(self, model: Any, cache: RecurrentCache) -> DecodeStep:
        """The step for the batch of `cache`; captured the first time."""
        key = step_key(cache)
        step = self.steps.pop(key, None)
        if step is None:
            self._make_room(cache)
            step = DecodeStep(model, cache)
        self.steps[key] = step
        return step

    def _make_room(self, cache: RecurrentCache) -> None:
        device = cache.states()[0][0].device
        budget = MEMORY_SHARE * device_memory(device) - cache.nbytes
        while self.steps and (len(self.steps) >= MAX_STEPS or sum(s.nbytes for s in self.steps.values()) > budget):
            self.steps.popitem(last=False)


def step_key(cache: RecurrentCache) -> Hashable:
    """What makes two caches of one model need two graphs: batch size and types of the states."""
    conv_state, ssm_state = cache.states()[0]
    return tuple(conv_state.shape), conv_state.dtype, ssm_state.dtype


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    return torch.cuda.get_device_properties(device).total_memory


_graphs: "weakref.WeakKeyDictionary[nn.Module, Graphs]" = weakref.WeakKeyDictionary()


def last_graphs_of(model: nn.Module) -> Graphs | None:
    """The graphs that there are of `model`, if replaying them does no harm; whether they are right, `watch` says."""
    found = _graphs.get(model)
    return found if found is not None and found.watch is not None and found.watch.readable() else None


def graphs_of(model: nn.Module) -> Graphs | None:
    """The graphs of `model`, which are dropped together with it or when its fingerprint has changed; None if it has none."""
    found = _graphs.get(model)
    if found is not None and found.watch is not None and found.watch.unchanged():
        return found
    mark = fingerprint(model)
    if mark is None:
        return None
    if found is None or found.mark != mark:
        found = _graphs[model] = Graphs(mark)
    found.watch = Watch(model)
    return found


def attempt(store: Graphs, key: Any, make: Callable[[], Any], name: str, again: bool = True) -> Any:
    """`make()`, or None if it cannot be captured; what cannot be is remembered.

    Args:
        store: the graphs of the model.
        key: what is refused then.
        name: what it is.
        again: whether to try again after there was no memory, which may be free the next time.
    """
    if key in store.refused:
        return None
    try:
        return make()
    except torch.cuda.OutOfMemoryError:
        logger.warning_once(
            f"hf_mamba: not enough GPU memory to capture a CUDA graph of {name}, so generate() takes a slower "
            "way. A smaller batch, or HF_MAMBA_CUDA_GRAPH=0 to stop trying, helps."
        )
        if not again:
            store.refused.add(key)
    except (RuntimeError, TypeError, ValueError) as error:
        # what is wrong with the call itself, the other way says
        logger.info(f"hf_mamba: no CUDA graph of {name}: {error}")
        store.refused.add(key)
    return None


def allows_graphs(model: Any, generation_config: Any) -> bool:
    """Whether a call may run graphs at all: nobody has switched them off, and nothing outside of the model steers it."""
    if os.environ.get("HF_MAMBA_CUDA_GRAPH", "1") == "0" or generation_config.disable_compile:
        return False
    return runs_graphs(model.device) and not torch.is_autocast_enabled(model.device.type)


def runs_graphs(device: torch.device) -> bool:
    """Whether CUDA graphs can be captured on `device`."""
    return device.type == "cuda"
