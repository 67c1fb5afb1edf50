"""What the routers of a MoE-Mamba do: log entries and a warning for people who train, and a recorder of single forwards.

Symbols: N tokens, E experts, k experts per token.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..layers.switch import Routing, router_probabilities, router_scores
from ..models.moe_mamba.experts import MoeMambaSparseMoe

__all__ = ["RouterHealth", "expert_layers", "recorded_routing"]

logger = logging.get_logger(__name__)


def expert_layers(model: nn.Module) -> dict[int, MoeMambaSparseMoe]:
    """The routed layers of a model, wrapped or not, by the number of their residual layer."""
    found = {}
    for name, module in model.named_modules():
        number = re.search(r"layers\.(\d+)\.", f"{name}.")
        if isinstance(module, MoeMambaSparseMoe) and number is not None:
            found[int(number[1])] = module
    return found


@contextlib.contextmanager
def recorded_routing(model: nn.Module) -> Iterator[dict[int, list[Routing]]]:
    """Collect what each layer with experts does with its tokens, one `Routing` for each forward.

    Example:
        >>> with recorded_routing(model) as routing:
        ...     model(input_ids)
        >>> routing[1][0].indices  # (N, k), the experts of layer 1
    """
    layers = expert_layers(model)
    before = {number: layer.observer for number, layer in layers.items()}
    routing: dict[int, list[Routing]] = {number: [] for number in layers}
    for number, layer in layers.items():
        layer.observer = routing[number].append
    try:
        yield routing
    finally:
        for number, layer in layers.items():
            layer.observer = before[number]


class RouterHealth(TrainerCallback):
    """Adds the state of the routers to what a `Trainer` logs, and warns of experts that get no token any more.

    Each log of the training loss then holds, over all tokens since the last one and over all layers:

    - `router_entropy`: mean entropy in nats of the probabilities of a token; log E = undecided;
    - `router_dropped_fraction`: choices that found their expert full, before they reached it;
    - `router_max_load`, `router_min_load`: share of the busiest and of the idlest expert of any layer, times E; 1 = even;
    - `router_unused_experts`: experts without a token;

    and the entry of `trainer.state.log_history` also `router_layers`: for every layer its number, its entropy and dropped
    fraction, and `load`, the share of each expert in the choices. Choices count before tokens are dropped, as in the
    balancing loss; padding does not count. Everything is summed on the device; only logging waits for it.

    An expert without a token for `patience` steps is named in a warning, once, at the next log or at the end of training.
    Other models are left alone.

    `Trainer(callbacks=[RouterHealth()])` reaches the history and the console. TensorBoard, W&B and the like are asked before
    the callbacks of the user; `RouterHealth().attach(trainer)` goes first and so reaches them too.

    Args:
        patience: training steps without a token after which an expert counts as lost.
    """

    def __init__(self, patience: int = 100) -> None:
        if patience < 1:
            raise ValueError(f"`patience` must be a number of steps from 1 up, got {patience}.")
        self.patience = patience
        self._layers: dict[int, MoeMambaSparseMoe] = {}
        self._records: dict[int, _LayerRecord] = {}
        self._lost: set[tuple[int, int]] = set()

    def attach(self, trainer: Trainer) -> "RouterHealth":
        """Put this callback before all others of `trainer`, the reporting ones included."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._layers = {} if model is None else expert_layers(model)
        self._records = {number: _LayerRecord(layer, state.global_step) for number, layer in self._layers.items()}
        self._lost = set()
        for number, layer in self._layers.items():
            layer.observer = self._records[number]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for record in self._records.values():
            record.step.fill_(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._records or logs is None or "loss" not in logs:
            return
        layers = self._summaries(state.global_step)
        if not layers:
            return
        loads = [share * len(layer["load"]) for layer in layers for share in layer["load"]]
        scalars = {
            "router_entropy": sum(layer["entropy"] for layer in layers) / len(layers),
            "router_dropped_fraction": sum(layer["dropped_fraction"] for layer in layers) / len(layers),
            "router_max_load": max(loads),
            "router_min_load": min(loads),
            "router_unused_experts": loads.count(0.0),
        }
        logs.update(scalars)
        # the trainer has already put a copy of `logs` into its history
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(scalars, router_layers=layers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._records:
            self._summaries(state.global_step)
        for layer in self._layers.values():
            layer.observer = None
        self._layers, self._records = {}, {}

    def _summaries(self, step: int) -> list[dict[str, Any]]:
        """One dictionary for each layer that saw tokens since the last call; warns of lost experts on the way."""
        layers, lost = [], {}
        for number, record in self._records.items():
            summary, last_used = record.collect()
            if summary is not None:
                layers.append({"layer": number, **summary})
            idle = [expert for expert, last in enumerate(last_used) if step - last >= self.patience]
            new = [expert for expert in idle if (number, expert) not in self._lost]
            if new:
                lost[number] = new
                self._lost.update((number, expert) for expert in new)
        if lost:
            named = "; ".join(f"layer {number}: {', '.join(map(str, experts))}" for number, experts in lost.items())
            logger.warning(
                f"Experts received no token for {self.patience} training steps or more, at step {step}: {named}. Their "
                "weights no longer learn. Raise `router_aux_loss_coef`, lower the learning rate or lengthen its warm-up, "
                "or use fewer experts."
            )
        return layers


class _LayerRecord:
    """Running sums of one layer, on its device. Called with every `Routing`.

    `load` (E,) choices of each expert, `last_used` (E,) the last step with one, `counts` (2,) tokens and dropped choices,
    `entropy` () summed over tokens.
    """

    def __init__(self, layer: MoeMambaSparseMoe, step: int) -> None:
        router = layer.router
        self.scoring, device = router.scoring, router.weight.device
        self.load = torch.zeros(router.num_experts, dtype=torch.int64, device=device)
        self.last_used = torch.full_like(self.load, step)
        self.step = torch.tensor(step, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def __call__(self, routing: Routing) -> None:
        if not routing.training:
            return
        top_k = routing.indices.shape[1]
        real = torch.ones_like(routing.indices[:, 0]) if routing.valid is None else routing.valid.to(torch.int64)
        choices = real[:, None].expand(-1, top_k).flatten()
        load = torch.zeros_like(self.load).scatter_add_(0, routing.indices.flatten(), choices)
        probabilities = router_probabilities(router_scores(routing.router_logits, self.scoring), self.scoring)
        entropy = (torch.special.entr(probabilities).sum(dim=-1) * real).sum()
        tokens = real.sum()
        # what is not kept of a real token was dropped; padding is never kept
        dropped = torch.zeros_like(tokens) if routing.kept is None else top_k * tokens - routing.kept.sum()
        self.load += load
        self.last_used.copy_(torch.where(load > 0, self.step, self.last_used))
        self.counts += torch.stack([tokens, dropped])
        self.entropy += entropy

    def collect(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The sums of all processes since the last call as fractions, if there were tokens, and the last step of each expert."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (self.load, self.counts, self.entropy):
                torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(self.last_used, torch.distributed.ReduceOp.MAX)
        load, last_used = self.load.tolist(), self.last_used.tolist()
        tokens, dropped = self.counts.tolist()
        entropy = self.entropy.item()
        for total in (self.load, self.counts, self.entropy):
            total.zero_()
        if not tokens:
            return None, last_used
        choices = sum(load)
        summary = {
            "entropy": entropy / tokens,
            "dropped_fraction": dropped / choices,
            "load": [count / choices for count in load],
        }
        return summary, last_used
