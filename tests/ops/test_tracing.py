"""The Triton ops are one graph to `torch.compile`: traced here without a GPU, forward and backward, and never run."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_kernels
from mamba_kernels import dispatch

pytest.importorskip("triton")


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# id: op, its operands in order, and named ones; made when the test runs
PARALLEL: dict[str, Callable[[], tuple[str, list[Tensor], dict[str, Any]]]] = {
    "selective_scan": lambda: (
        "selective_scan",
        [leaf(2, 30, 16), leaf(2, 30, 16), leaf(16, 4), leaf(2, 30, 4), leaf(2, 30, 4)],
        {"D": leaf(16), "z": leaf(2, 30, 16), "return_final_states": True},
    ),
    "selective_scan-packed": lambda: (
        "selective_scan",
        [leaf(1, 30, 16), leaf(1, 30, 16), leaf(16, 4), leaf(1, 30, 4), leaf(1, 30, 4)],
        {"seq_idx": torch.zeros(1, 30, dtype=torch.int32)},
    ),
    "ssd_chunk_scan": lambda: (
        "ssd_chunk_scan",
        [leaf(2, 30, 4, 8), leaf(2, 30, 4), leaf(4), leaf(2, 30, 1, 16), leaf(2, 30, 1, 16)],
        {"chunk_size": 16, "initial_states": leaf(2, 4, 8, 16), "return_final_states": True},
    ),
    "ssd_chunk_scan-packed": lambda: (
        "ssd_chunk_scan",
        [leaf(1, 30, 4, 8), leaf(1, 30, 4), leaf(4), leaf(1, 30, 1, 16), leaf(1, 30, 1, 16)],
        {"seq_idx": torch.zeros(1, 30, dtype=torch.int32)},
    ),
    "causal_conv1d": lambda: (
        "causal_conv1d",
        [leaf(2, 30, 16), leaf(16, 4)],
        {"bias": leaf(16), "activation": "silu", "initial_states": leaf(2, 16, 3), "return_final_states": True},
    ),
    "causal_conv1d-packed": lambda: (
        "causal_conv1d",
        [leaf(1, 30, 16), leaf(16, 4)],
        {"cu_seqlens": numbers(0, 10, 30)},
    ),
    "rms_norm": lambda: ("rms_norm", [leaf(3, 16), leaf(16)], {}),
    "add_rms_norm": lambda: ("add_rms_norm", [leaf(3, 16), leaf(3, 16), leaf(16)], {}),
    "rms_norm_gated": lambda: ("rms_norm_gated", [leaf(3, 16), leaf(16), leaf(3, 16)], {}),
}
UPDATES: dict[str, Callable[[], tuple[str, list[Tensor], dict[str, Any]]]] = {
    "selective_state_update": lambda: (
        "selective_state_update",
        [leaf(2, 16, 4), leaf(2, 16), leaf(2, 16), leaf(16, 4), leaf(2, 4), leaf(2, 4)],
        {"state_indices": numbers(1, -1)},
    ),
    "ssd_state_update": lambda: (
        "ssd_state_update",
        [leaf(2, 4, 8, 16), leaf(2, 4, 8), leaf(2, 4), leaf(4), leaf(2, 1, 16), leaf(2, 1, 16)],
        {},
    ),
    "causal_conv1d_update": lambda: (
        "causal_conv1d_update",
        [leaf(2, 16), leaf(2, 16, 4), leaf(16, 4)],
        {"bias": leaf(16), "activation": "silu"},
    ),
}


class Traced(Exception):
    """The graph is complete, and so is the test: the kernels cannot run here."""


@pytest.mark.parametrize("case", [*PARALLEL, *UPDATES])
def test_traces_without_graph_breaks(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    # without a GPU torch takes the launch of a Triton kernel for a call that it cannot look into
    for question in ("has_triton", "has_triton_package"):
        monkeypatch.setattr(f"torch.utils._triton.{question}", lambda *_: True)
    torch.compiler.reset()
    op, operands, options = (PARALLEL | UPDATES)[case]()

    def stop(*_: Any) -> None:
        raise Traced

    compiled = torch.compile(getattr(mamba_kernels, op), fullgraph=True, backend=lambda graph, example: stop)
    with mamba_kernels.backend("triton"), torch.set_grad_enabled(case in PARALLEL), pytest.raises(Traced):
        compiled(*operands, **options)


def test_whether_triton_works_is_a_constant() -> None:
    """As on a GPU: torch must not look into the probe, nor through its cache."""

    def call(x: Tensor) -> Tensor:
        return x + 1 if dispatch._triton_works("xpu", 0) else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1.0, 1.0]
