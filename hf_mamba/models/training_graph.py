"""A training step's forward, loss and backward as one CUDA graph.

A step of a small model is hundreds of launches for which the host needs longer than the GPU for the work. A graph replays them
with one. Forward, loss and backward are captured together, with the gradients in memory of their own; autograd sees a function
that returns the loss and, in backward, those gradients times whatever the loss was multiplied by. So accumulation, DDP and any
optimiser work as without.

Symbols: B batch, L length.
"""

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.stateless import _reparametrize_module
from transformers.utils import logging

from ..generation.fingerprint import Watch
from ..generation.graphs import CAPTURING, capture

__all__ = ["graphed_output"]

logger = logging.get_logger(__name__)

# graphs of a model; one for each shape of a batch, and each has gradients of its own
MAX_GRAPHS = 2
# shapes that are remembered as having been seen once
MAX_SEEN = 64
# captures that are tried: the first of a process can fail on what libraries do at their first use
MAX_ATTEMPTS = 2
WARM_UPS = 3

_graphs: "weakref.WeakKeyDictionary[nn.Module, _ModelGraphs]" = weakref.WeakKeyDictionary()


def graphed_output(
    model: Any, input_ids: Tensor, labels: Tensor, num_items: Tensor | int | None
) -> dict[str, Tensor] | None:
    """The loss, differentiable in the parameters, and what else the output holds, from a graph; None where there is none.

    The first batch of a shape takes the usual way, the second is captured.

    Args:
        model: a language model of ours in training mode, on a GPU.
        input_ids, labels: (B, L) int64 on that GPU, without padding and packing.
        num_items: what the loss is divided by, or None.
    """
    device = input_ids.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    if autocast == torch.float16:
        return None
    key = (tuple(input_ids.shape), labels.dtype, input_ids.dtype, num_items is None, autocast, device)
    with CAPTURING:
        known = _graphs.get(model)
        if known is None or not known.unchanged(model):
            known = _graphs[model] = _ModelGraphs(model)
        graph = known.find(model, key)
    if graph is None:
        return None
    graph.ids.copy_(input_ids)
    graph.labels.copy_(labels)
    if graph.num_items is not None:
        graph.num_items.copy_(torch.as_tensor(num_items))
    loss = _Replay.apply(graph, *graph.parameters)
    return {name: value.clone() for name, value in graph.others.items()} | {"loss": loss}


class _ModelGraphs:
    """The graphs of a model as it was when the first batch came."""

    def __init__(self, model: nn.Module) -> None:
        # not of the model itself: its hooks and its autocast run outside of the graph
        self.watches = [Watch(child) for child in model.children()]
        self.trained = [p.requires_grad for p in model.parameters()]
        self.fits = _fits(model)
        self.seen: dict[Hashable, int] = {}
        self.graphs: dict[Hashable, _TrainingGraph | None] = {}

    def unchanged(self, model: nn.Module) -> bool:
        """Whether the model is as it was; weights that are changed in place are."""
        return all(watch.unchanged() for watch in self.watches) and self.trained == [
            p.requires_grad for p in model.parameters()
        ]

    def find(self, model: Any, key: Any) -> "_TrainingGraph | None":
        """The graph for a key; captured the second time that it is asked for."""
        if not self.fits:
            return None
        if key in self.graphs:
            return self.graphs[key]
        if len(self.graphs) >= MAX_GRAPHS:
            return None
        if key not in self.seen:
            if len(self.seen) < MAX_SEEN:
                self.seen[key] = 0
            return None
        try:
            self.graphs[key] = _TrainingGraph(model, key)
        except RuntimeError as error:
            self.seen[key] += 1
            if self.seen[key] < MAX_ATTEMPTS and not isinstance(error, torch.OutOfMemoryError):
                return None
            self.graphs[key] = None
            logger.warning_once(
                f"No CUDA graph of the training step, which runs as without `graph_training`: {str(error)[:200]}"
            )
        return self.graphs[key]


def _fits(model: nn.Module) -> bool:
    """Whether everything is on one device, of plain types, and no hook would be left out by a replay.

    In fp16 the gradients of a loss that is not scaled would underflow, and a graph makes them before anybody scales it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    inner = (module for module in model.modules() if module is not model)
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and len({tensor.device for tensor in tensors}) == 1
        and not any(tensor.dtype == torch.float16 for tensor in tensors)
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in inner)
    )


class _TrainingGraph:
    """Forward, loss and gradients of a batch of one shape.

    Attributes:
        ids, labels, num_items: what is read.
        loss, gradients, others: what is written; others are fields of the model's output.
        turn: how many batches it has seen.
    """

    def __init__(self, model: Any, key: Any) -> None:
        shape, labels_dtype, ids_dtype, without_items, autocast, device = key
        self.autocast = autocast
        self.ids = torch.zeros(shape, dtype=ids_dtype, device=device)
        self.labels = torch.zeros(shape, dtype=labels_dtype, device=device)
        self.num_items = None if without_items else torch.ones((), dtype=torch.float32, device=device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.turn = 0
        self.model = weakref.ref(model)
        self.loss: Any = None
        self.gradients: tuple[Tensor | None, ...] = ()
        self.others: dict[str, Tensor] = {}
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        try:
            self.graph = capture(self._run, device, WARM_UPS)
        except BaseException:
            # a capture that breaks off leaves its own stream as the current one
            if stream is not None:
                torch.cuda.set_stream(stream)
            raise

    def _run(self) -> None:
        model: Any = self.model()
        # those of the run before would be held through this one
        self.gradients = ()
        options = {} if self.num_items is None else {"num_items_in_batch": self.num_items}
        autocast = torch.autocast(
            self.ids.device.type,
            dtype=self.autocast or torch.bfloat16,
            enabled=bool(self.autocast),
            # a cast that is kept would be one of weights that have changed since
            cache_enabled=False,
        )
        # the parameters' own nodes in autograd may be alive, of a loss that somebody keeps, and belong to the usual stream, which
        # a capture must not touch: differentiated are others in the same memory
        names: dict[str, Tensor] = {
            name: nn.Parameter(p.detach(), requires_grad=p.requires_grad) for name, p in model.named_parameters()
        }
        with torch.enable_grad(), autocast, _reparametrize_module(model, names, tie_weights=True):
            # whatever wraps the model's forward is around this already
            output = type(model).forward(
                model,
                self.ids,
                labels=self.labels,
                skip_logits=True,
                graph_training=False,
                return_dict=True,
                **options,
            )
        self.gradients = torch.autograd.grad(
            output.loss, [p for p in names.values() if p.requires_grad], allow_unused=True
        )
        self.loss = output.loss.detach()
        self.others = {
            name: value.detach() for name, value in output.items() if isinstance(value, Tensor) and name != "loss"
        }

    def replay(self) -> None:
        self.turn += 1
        self.graph.replay()


class _Replay(torch.autograd.Function):
    """The loss () of a graph's batch, as a function of the parameters."""

    @staticmethod
    def forward(ctx: Any, graph: _TrainingGraph, *parameters: Tensor) -> Tensor:
        graph.replay()
        ctx.graph, ctx.turn = graph, graph.turn
        return graph.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        if ctx.turn != graph.turn:
            raise RuntimeError(
                "With `graph_training` the gradients of a batch are gone when the next batch of its shape is read; call "
                "backward() before the next forward, or set `model.graph_training = False`."
            )
        known = [gradient for gradient in graph.gradients if gradient is not None]
        scaled = iter(_scaled(known, grad))
        return None, *(None if gradient is None else next(scaled) for gradient in graph.gradients)


def _scaled(gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
    """The gradients times `factor` (): a launch for each dtype, since torch takes one for each tensor where they are mixed."""
    places: dict[torch.dtype, list[int]] = {}
    for index, gradient in enumerate(gradients):
        places.setdefault(gradient.dtype, []).append(index)
    scaled = list(gradients)
    for dtype, indices in places.items():
        products = torch._foreach_mul([gradients[index] for index in indices], factor.to(dtype))
        for index, product in zip(indices, products, strict=True):
            scaled[index] = product
    return scaled
