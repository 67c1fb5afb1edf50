"""Capturing: what a capture that breaks off leaves behind, and that nobody else notices.

Without a GPU torch's own part is a stand-in; with `-m gpu` it is torch.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_mamba.generation import graphs


class Capture:
    """`torch.cuda.graph`, as it is where a capture cannot be ended: everything that was begun stays begun.

    Attributes:
        stream: the current one.
        recording: pools that a capture allocates from.
        waits: whether the generator waits for the end of a capture.
        invalid: whether the capture that is under way can still be ended.
    """

    stream, recording, waits, invalid = "usual", set(), False, False

    def __init__(self, graph: Any, pool: Any = None, capture_error_mode: str = "global"):
        self.pool = pool

    def __enter__(self) -> None:
        Capture.stream = "of the capture"
        if self.pool in Capture.recording:
            raise RuntimeError("already recording to this pool")
        Capture.recording.add(self.pool)
        Capture.waits = True

    def __exit__(self, *args: object) -> None:
        if Capture.invalid:
            Capture.invalid = False
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
    yield torch.device("cpu")
    Capture.stream, Capture.recording, Capture.waits, Capture.invalid = "usual", set(), False, False


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
