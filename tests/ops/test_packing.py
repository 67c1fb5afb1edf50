"""Packing metadata: what `seq_idx` and `cu_seqlens` mean, and the checks of both."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from mamba_kernels.packing import (
    check_packing,
    cu_seqlens_to_seq_idx,
    remember_while_captured,
    remembered,
    resets_and_valid,
    segments_and_valid,
)
from mamba_kernels.ssd.grid import chunk_grid

LAYOUTS = {
    "one": [0, 5],
    "several": [0, 1, 4, 10],
    "empty in front": [0, 0, 0, 3],
    "empty inside": [0, 2, 2, 2, 7],
    "empty at the end": [0, 4, 4],
    "nothing": [0, 0],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_cu_seqlens_to_seq_idx(name: str, dtype: torch.dtype) -> None:
    bounds = LAYOUTS[name]
    expected = [number for number, (a, b) in enumerate(pairwise(bounds)) for _ in range(b - a)]
    found = cu_seqlens_to_seq_idx(torch.tensor(bounds, dtype=dtype), bounds[-1])
    assert found.dtype == torch.int32 and found.tolist() == [expected]


ROWS = {
    "one sequence": [0, 0, 0],
    "two": [0, 0, 1, 1],
    "numbers that return": [0, 1, 0],
    "numbers that fall": [7, 7, 3],
    "left padding": [-1, -1, 0, 0],
    "right padding": [0, 0, -1],
    "padding inside one sequence": [0, -1, 0],
    "padding between two": [0, -1, -5, 1],
    "only padding": [-1, -1],
    "nothing": [],
}


@pytest.mark.parametrize("name", ROWS)
def test_resets_and_valid(name: str) -> None:
    row = ROWS[name]
    resets, previous = [], None
    for number in row:
        resets.append(number >= 0 and previous is not None and number != previous)
        previous = number if number >= 0 else previous
    found, valid = resets_and_valid(torch.tensor([row], dtype=torch.int64))
    assert found.tolist() == [resets]
    assert valid.tolist() == [[number >= 0 for number in row]]


def test_rows_do_not_see_each_other() -> None:
    resets, _ = resets_and_valid(torch.tensor([[0, 0], [1, 1], [-1, 0]]))
    assert not resets.any()


@pytest.mark.parametrize("name", ROWS)
def test_segments_and_valid(name: str) -> None:
    seq_idx = torch.tensor([ROWS[name]], dtype=torch.int64)
    segments, valid = segments_and_valid(seq_idx)
    assert segments.tolist() == [resets_and_valid(seq_idx)[0].long().cumsum(1)[0].tolist()]
    assert (valid is None) == (min(ROWS[name], default=0) >= 0)
    if valid is not None:
        assert torch.equal(valid, seq_idx >= 0)


@pytest.mark.parametrize("block", [1, 3, 64], ids=lambda b: f"block {b}")
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "nothing"])
def test_chunk_grid(name: str, block: int) -> None:
    bounds = LAYOUTS[name]
    grid = chunk_grid(torch.tensor(bounds), bounds[-1], block)
    rows = grid.tokens.view(-1, block).tolist(), grid.filled.view(-1, block).tolist()
    chunks = [list(range(start, min(start + block, b))) for a, b in pairwise(bounds) for start in range(a, b, block)]
    assert [[t for t, f in zip(*row, strict=True) if f] for row in zip(*rows, strict=True)] == chunks
    starts = {a: number for number, (a, b) in enumerate(pairwise(bounds)) if b > a}
    ends = {b: number for number, (a, b) in enumerate(pairwise(bounds)) if b > a}
    assert grid.enter.tolist() == [starts.get(chunk[0], -1) for chunk in chunks]
    assert grid.leave.tolist() == [ends.get(chunk[-1] + 1, len(bounds) - 1) for chunk in chunks]
    assert grid.tokens[grid.places].tolist() == list(range(bounds[-1]))


def test_number_of_states() -> None:
    assert check_packing("op", 3, 4, None, None) == 3
    assert check_packing("op", 3, 4, torch.zeros(3, 4).int(), None) == 3
    assert check_packing("op", 1, 4, None, torch.tensor([0, 2, 2, 4])) == 3


ERRORS: dict[str, tuple[int, int, Any, Any, type[Exception], str]] = {
    "both": (1, 2, torch.zeros(1, 2).int(), torch.tensor([0, 2]), ValueError, "give only one of them"),
    "list": (1, 2, [[0, 0]], None, TypeError, "`seq_idx` must be a torch.Tensor, got list"),
    "float seq_idx": (1, 2, torch.zeros(1, 2), None, TypeError, "`seq_idx` must have dtype int32, int64, got float32"),
    "seq_idx shape": (1, 2, torch.zeros(2).int(), None, ValueError, r"`seq_idx` must have shape \(B, L\) = \(1, 2\)"),
    "float cu_seqlens": (1, 2, None, torch.tensor([0.0, 2.0]), TypeError, "`cu_seqlens` must have dtype"),
    "one number": (1, 2, None, torch.tensor([0]), ValueError, r"shape \(n \+ 1,\) with n >= 1, got \(1,\)"),
    "2-D": (1, 2, None, torch.tensor([[0, 2]]), ValueError, r"shape \(n \+ 1,\)"),
    "batch": (2, 2, None, torch.tensor([0, 2]), ValueError, "a batch of one, got a batch of 2"),
    "start": (
        1,
        2,
        None,
        torch.tensor([1, 2]),
        ValueError,
        r"from 0 to the length 2 without decreasing, got \[1, 2\]",
    ),
    "end": (1, 2, None, torch.tensor([0, 3]), ValueError, "from 0 to the length 2"),
    "falls": (1, 2, None, torch.tensor([0, 3, 2]), ValueError, "without decreasing"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    batch, length, seq_idx, cu_seqlens, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        check_packing("op", batch, length, seq_idx, cu_seqlens)


def test_what_packing_means_is_made_once_until_it_changes() -> None:
    seq_idx = torch.tensor([[0, 0, 1]])
    made = []

    def make() -> int:
        made.append(len(made))
        return int(seq_idx.sum())

    assert [remembered(seq_idx, "sum", make) for _ in range(3)] == [1, 1, 1]
    assert len(made) == 1
    assert remembered(seq_idx, "another", lambda: "made") == "made"
    assert remembered(seq_idx.clone(), "sum", lambda: "of the copy") == "of the copy"
    seq_idx[0, 0] = 5
    assert remembered(seq_idx, "sum", make) == 6
    seq_idx.copy_(torch.tensor([[2, 2, 2]]))
    assert remembered(seq_idx, "sum", make) == 6 and len(made) == 3


def test_inference_tensors_are_not_remembered() -> None:
    with torch.inference_mode():
        seq_idx = torch.tensor([[0, 0, 1]])
        assert remembered(seq_idx, "sum", lambda: 1) == 1
        assert remembered(seq_idx, "sum", lambda: 2) == 2


@pytest.mark.gpu
def test_a_captured_graph_works_out_packing_anew_on_gpu() -> None:
    seq_idx = torch.tensor([[0, 0, 1]], device="cuda")

    def run(packing: torch.Tensor) -> torch.Tensor:
        return remembered(packing, "double", lambda: packing * 2) + remembered(packing, "double", lambda: packing * 3)

    assert run(seq_idx).tolist() == [[0, 0, 4]]
    torch.cuda.synchronize()
    graphs = []
    for fresh in (False, True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(remember_while_captured(seq_idx.clone()) if fresh else seq_idx)
        graphs.append((graph, found))
    seq_idx.fill_(1)
    for (graph, found), expected in zip(graphs, (5, 4), strict=True):
        graph.replay()
        assert found.tolist() == [[expected] * 3]
