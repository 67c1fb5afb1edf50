"""CUDA graphs of one decoding step, and when they may be replayed.

A graph replays the kernels that were launched while it was captured, on the same addresses. So it is right as long as every
tensor of the model is where it was and nothing else that steers the Python code has changed. `fingerprint` collects both;
weights that are changed in place, by an optimiser or by merging an adapter, are read anew by every replay.

Symbols: B batch, V vocabulary.
"""

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import RecurrentCache

__all__ = ["DecodeStep", "Graphs", "capture", "fingerprint", "graphs_of"]

# model steps (one for each batch size) that are kept for a model, and samplers (one for each set of options) for a step
MAX_STEPS, MAX_SAMPLERS = 4, 8
# of the device's memory, the most that the states of kept steps may take together
MEMORY_SHARE = 0.1
# launches before capturing: kernels are compiled and libraries initialised outside the graph
WARM_UPS = 2

MODULE_FIELDS = frozenset(vars(nn.Module()))
SIMPLE = frozenset((bool, int, float, str, type(None)))


class CudaGraph:
    """`function`, which has no arguments and no result, as a graph."""

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.graph = torch.cuda.CUDAGraph()
        self.pool = memory_pool(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(WARM_UPS - 1):
                function()
            # a look at a tensor's values is an error here, where it does no harm yet
            with _no_synchronisation():
                function()
        torch.cuda.current_stream(device).wait_stream(stream)
        # other threads may go on using the device
        captured = torch.cuda.graph(self.graph, pool=self.pool.handle, capture_error_mode="thread_local")
        with torch.cuda.device(device), captured:
            function()

    def replay(self) -> None:
        self.graph.replay()


# held while graphs are looked up and captured
CAPTURING = threading.Lock()


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


def capture(function: Callable[[], None], device: torch.device) -> Any:
    """Capture `function`; it runs a few times on the way, and the random state is as before.

    Raises:
        torch.cuda.OutOfMemoryError: no memory for the graph.
        RuntimeError: something in `function` cannot be captured, such as a look at a tensor's values.
    """
    state = torch.cuda.get_rng_state(device)
    try:
        return CudaGraph(function, device)
    except BaseException:
        # a capture that breaks off leaves the generator waiting for its end, and every later random number an error
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        # graphs that draw from the one before would no longer follow the seed
        for found in list(_graphs.values()):
            found.steps.clear()
        raise
    finally:
        torch.cuda.synchronize(device)
        torch.cuda.set_rng_state(state, device)


def fingerprint(model: nn.Module) -> Hashable | None:
    """Everything a graph of `model` depends on, to be compared; None if a graph of it would not be right.

    That is so in training mode, with hooks (they would run once, while capturing), with modules whose `forward` was replaced
    (offloading), with tensors of special types (quantised or distributed) or on several devices.
    """
    if model.training:
        return None
    entries: list[Any] = []
    devices = set()
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module.training:
            return None
        kind = type(module)
        entries.append(kind)
        if not kind.__module__.startswith("torch.nn."):
            # adapters that are active, scalings, flags
            for name, value in vars(module).items():
                if type(value) in SIMPLE:
                    entries.append((name, value))
                elif name not in MODULE_FIELDS and is_simple(value):
                    entries.append((name, repr(value)))
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter):
                    return None
                devices.add(tensor.device)
                entries.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
    return tuple(entries) if len(devices) == 1 else None


def is_simple(value: Any) -> bool:
    """Whether a module's attribute is a plain value or a container of those, and so has a `repr` that says all."""
    if isinstance(value, dict):
        return all(is_simple(key) and is_simple(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_simple, value))
    return type(value) in SIMPLE


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
        # as in transformers' own loop: of experts, only the chosen ones are read
        with model._optimize_model_for_decode():
            self.graph = capture(self._forward, device)

    def _forward(self) -> None:
        model = self.model()
        assert model is not None
        self.logits.copy_(model(input_ids=self.ids, cache=self.cache, return_dict=True).logits[:, -1])

    @property
    def nbytes(self) -> int:
        """Bytes of the states, logits and samplers."""
        return self.cache.nbytes + self.logits.nbytes * (1 + len(self.samplers))

    def sampler(self, key: Hashable, make: Callable[[], Any]) -> tuple[Any, Any]:
        """The sampler for a set of options and its graph; captured the first time."""
        found = self.samplers.pop(key, None)
        if found is None:
            sampler = make()
            found = sampler, capture(sampler, self.ids.device)
            while len(self.samplers) >= MAX_SAMPLERS:
                self.samplers.popitem(last=False)
        self.samplers[key] = found
        return found


class Graphs:
    """The captured steps of a model as it was at one fingerprint, the least recently used first."""

    def __init__(self, mark: Hashable) -> None:
        self.mark = mark
        self.steps: OrderedDict[Hashable, DecodeStep] = OrderedDict()
        # what could not be captured is not tried again before the model changes
        self.refused: set[Hashable] = set()

    def has_step(self, cache: RecurrentCache) -> bool:
        """Whether the step for the batch of `cache` is captured already."""
        return step_key(cache) in self.steps

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


def graphs_of(model: nn.Module, mark: Hashable) -> Graphs:
    """The graphs of `model`, which are dropped together with it, or when its fingerprint `mark` has changed."""
    found = _graphs.get(model)
    if found is None or found.mark != mark:
        found = _graphs[model] = Graphs(mark)
    return found
