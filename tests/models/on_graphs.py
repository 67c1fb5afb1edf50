"""Tests of CUDA graphs that run without a GPU, too: what would be captured is called instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hf_mamba import RecurrentCache
from hf_mamba.generation import graphs, mixin, speculative

from .builders import random_ids
from .oracles import TOLERANCE


class Called:
    """Stands for a CUDA graph on a CPU: runs as often as a real one before it is used, and leaves the random state.

    Attributes:
        replays: of all graphs, but for those that read the prompt of a drafted call.
    """

    replays = 0

    def __init__(self, function: Callable[[], None], device: torch.device, warm_ups: int = graphs.WARM_UPS):
        self.function = function
        state = torch.get_rng_state()
        for _ in range(warm_ups + 1):
            function()
        torch.set_rng_state(state)

    def replay(self) -> None:
        Called.replays += 1
        self.function()


DEVICES = ["called", pytest.param("cuda", marks=pytest.mark.gpu)]


def graph_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    read_by_graph = mixin.read_by_graph

    def uncounted(*args: Any) -> bool:
        before = Called.replays
        found = read_by_graph(*args)
        Called.replays = before
        return found

    monkeypatch.setattr(mixin, "read_by_graph", uncounted)
    if request.param == "cuda":
        replay = graphs.CudaGraph.replay

        def counted(self: graphs.CudaGraph) -> None:
            Called.replays += 1
            replay(self)

        monkeypatch.setattr(graphs.CudaGraph, "replay", counted)
        return torch.device("cuda", 0)
    monkeypatch.setattr(graphs, "capture", Called)
    monkeypatch.setattr(graphs, "device_memory", lambda device: 2**34)
    monkeypatch.setattr(graphs, "runs_graphs", lambda device: True)
    return torch.device("cpu")


def generate(model: Any, *args: Any, replayed: bool | None = True, seed: int = 0, **options: Any) -> Any:
    """generate() from a fixed random state, with a look at whether graphs were replayed; None for either."""
    torch.manual_seed(seed)
    before = Called.replays
    result = model.generate(*args, **options)
    assert replayed is None or (Called.replays > before) == replayed
    return result


def stock(model: Any, *args: Any, **options: Any) -> Any:
    """transformers' own loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MAMBA_CUDA_GRAPH", "0")
        return generate(model, *args, replayed=False, **options)


class Collect(BaseStreamer):
    """Keeps the tokens that are put into it, and whether they have ended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def pause_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have plain steps between any two times that drafts are judged, but only three."""
    monkeypatch.setattr(speculative, "SHORTEST_PAUSE", 3)
    monkeypatch.setattr(speculative, "LONGEST_PAUSE", 3)
    monkeypatch.setattr(speculative, "ENOUGH", 100)


def watch_drafting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every step from now on, whether it drafts."""
    drafted: list[bool] = []
    original = speculative._Pace.next

    def watched(pace: Any, step: Any) -> bool:
        drafted.append(original(pace, step))
        return drafted[-1]

    monkeypatch.setattr(speculative._Pace, "next", watched)
    return drafted


def assert_goes_on(model: Any, cache: RecurrentCache, sequence: torch.Tensor) -> None:
    """`cache` has seen all of `sequence` (1, L) but the last token, and further tokens have the logits of a whole forward."""
    assert cache.get_seq_length() == sequence.shape[1] - 1 and not cache.recording
    new = torch.cat([sequence[:, -1:].cpu(), random_ids(1, 3, seed=9)], dim=1).to(model.device)
    with torch.no_grad():
        whole = torch.cat([sequence[:, :-1].to(model.device), new], dim=1)
        expected = model(whole, use_cache=False).logits[:, -new.shape[1] :]
        actual = model(new, cache=cache).logits
    assert (actual - expected).abs().max().item() <= TOLERANCE
