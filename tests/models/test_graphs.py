"""Capturing: what a capture that breaks off leaves behind, and that nobody else notices.

Without a GPU torch's own part is a stand-in; with `-m gpu` it is torch.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from hf_mamba.generation import graphs
from mamba_kernels import early


class Capture:
    """`torch.cuda.graph`, as it is where a capture cannot be ended: everything that was begun stays begun.

    Attributes:
        stream: the current one.
        recording: pools that memory is being taken from.
        broken: pools of captures that could not be ended.
        waits: whether the generator waits for the end of a capture.
        invalid: whether the capture that is under way can still be ended.
    """

    stream, waits, invalid = "usual", False, False
    recording: ClassVar[set[Any]] = set()
    broken: ClassVar[set[Any]] = set()

    def __init__(self, graph: Any, pool: Any = None, capture_error_mode: str = "global"):
        self.pool = pool

    def __enter__(self) -> None:
        # memory is given back
        assert not Capture.recording
        if self.pool in Capture.broken:
            raise RuntimeError("already recording to this pool")
        Capture.stream = "of the capture"
        Capture.recording.add(self.pool)
        Capture.waits = True

    def __exit__(self, *args: object) -> None:
        if Capture.invalid:
            Capture.invalid = False
            Capture.broken.add(self.pool)
            raise RuntimeError("the capture is invalid")
        Capture.recording.remove(self.pool)
        Capture.stream, Capture.waits = "usual", False


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device on which captures are `Capture`."""
    pools = itertools.count(1)
    for name, value in {
        "CUDAGraph": object,
        "graph": Capture,
        "device": contextlib.nullcontext,
        "current_stream": lambda: Capture.stream,
        "set_stream": lambda stream: setattr(Capture, "stream", stream),
        "graph_pool_handle": lambda: (0, next(pools)),
        "synchronize": lambda device: None,
        "get_rng_state": lambda device: None,
        "set_rng_state": lambda state, device: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: Capture.recording.remove(pool), False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield torch.device("cpu")
    Capture.stream, Capture.waits, Capture.invalid = "usual", False, False
    Capture.recording.clear(), Capture.broken.clear()


def break_off() -> None:
    """What makes the capture that is under way impossible to end."""
    if Capture.stream != "usual":
        Capture.invalid = True
        raise RuntimeError("not while capturing")


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "broken"])
def test_the_current_stream_after_a_capture_that_fails(without_gpu: torch.device, ended: bool) -> None:
    def fail() -> None:
        if ended:
            raise ValueError("of its own")
        break_off()

    with pytest.raises(ValueError if ended else RuntimeError):
        graphs.CudaGraph(fail, without_gpu)
    assert Capture.stream == "usual"


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "broken"])
def test_a_graph_that_refuses_early_launches(without_gpu: torch.device, ended: bool) -> None:
    """It alone is captured again, without them; the graphs that there are keep their memory, and the generator draws."""
    tried = []

    def refuses_early() -> None:
        tried.append(early._asked.on)
        if early._asked.on and Capture.stream != "usual":
            early._asked.used = True
            if ended:
                raise RuntimeError("not behind a fill")
            break_off()

    before = [graphs.capture(lambda: None, without_gpu) for _ in range(2)]
    refusing = graphs.capture(refuses_early, without_gpu)
    after = graphs.capture(lambda: None, without_gpu)
    # as often as every graph, with early launches and without
    assert tried == [True] * (graphs.WARM_UPS + 1) + [False] * (graphs.WARM_UPS + 1)
    assert not Capture.waits
    assert before[0].pool is before[1].pool and refusing.pool is after.pool
    # a pool that still records takes up no other graph
    assert (refusing.pool is before[0].pool) == ended


def test_what_cannot_be_captured_is_an_error(without_gpu: torch.device) -> None:
    tried = []

    def fails() -> None:
        tried.append(1)
        break_off()

    with pytest.raises(RuntimeError):
        graphs.capture(fails, without_gpu)
    # there were no early launches to be done without
    assert len(tried) == graphs.WARM_UPS + 1
    assert not Capture.waits and graphs.capture(lambda: None, without_gpu).pool.handle not in Capture.broken


@pytest.mark.gpu
def test_graphs_outlive_a_capture_that_breaks_off_on_gpu() -> None:
    device = torch.device("cuda", 0)
    place, drawn = torch.zeros(4, device=device), torch.zeros(4, device=device)

    def draw() -> None:
        # by way of memory of the pool
        drawn.copy_(torch.rand(4, device=device) + torch.zeros(2**20, device=device).sum())

    def synchronise() -> None:
        place.copy_(torch.rand(4, device=device))
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    def replayed(graph: Any) -> torch.Tensor:
        torch.manual_seed(3)
        graph.replay()
        return drawn.clone()

    graph = graphs.capture(draw, device)
    expected = replayed(graph)
    for _ in range(2):
        torch.manual_seed(5)
        with pytest.raises(RuntimeError):
            graphs.capture(synchronise, device)
        # the failed attempts have drawn nothing
        found = torch.rand(4, device=device)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(4, device=device), found)
        assert torch.equal(replayed(graph), expected)
        assert torch.equal(replayed(graphs.capture(draw, device)), expected)
        assert torch.equal(replayed(graph), expected)


@pytest.mark.gpu
def test_the_current_stream_after_a_capture_that_fails_on_gpu() -> None:
    device, usual = torch.device("cuda", 0), torch.cuda.Stream()

    def synchronise() -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    with torch.cuda.stream(usual):
        with pytest.raises(RuntimeError):
            graphs.capture(synchronise, device)
        assert torch.cuda.current_stream(device) == usual
