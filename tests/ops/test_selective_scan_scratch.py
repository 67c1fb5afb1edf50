"""The buffers that one `selective_scan` on a CPU leaves to the next: nobody else's while in use, and no part of any result."""

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mamba_kernels import selective_scan
from mamba_kernels.selective_scan import eager as scan_eager
from mamba_kernels.selective_scan import recurrence

from .oracle import Tensors, outputs_and_gradients

CPU = torch.device("cpu")
BATCH, LENGTH, CHANNELS, SIZE = 2, 70, 8, 5


def make(seed: int, length: int = LENGTH) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": randn(BATCH, length, CHANNELS),
        "dt": randn(BATCH, length, CHANNELS),
        "A": -0.1 - randn(CHANNELS, SIZE).abs(),
        "B": randn(BATCH, length, SIZE),
        "C": randn(BATCH, length, SIZE),
        "D": randn(CHANNELS),
        "z": randn(BATCH, length, CHANNELS),
        "dt_bias": randn(CHANNELS),
        "initial_states": randn(BATCH, CHANNELS, SIZE),
    }


def run(tensors: Tensors) -> Tensors:
    return outputs_and_gradients(selective_scan, tensors, return_final_states=True)


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def memory(scratch: recurrence.Scratch) -> list[Tensor]:
    """All that a scratch holds, the channels beyond the last included."""
    views = [scratch.added.rows, scratch.added.values, *scratch._narrow, *(buffer.tile for buffer in scratch._states)]
    return [torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()) for view in views]


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 tokens, the last one shorter, and nothing kept before or after."""
    monkeypatch.setattr(scan_eager, "_tile_length", lambda ops, saves: min(16, ops.x.shape[0]))
    recurrence._kept.scratch = None
    yield
    recurrence._kept.scratch = None


def interrupt(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Have `action` called in the middle of every tile, forward and backward."""
    original = scan_eager._contract_state

    def contract(*args: Any, **kwargs: Any) -> None:
        action()
        original(*args, **kwargs)

    monkeypatch.setattr(scan_eager, "_contract_state", contract)


def test_kept_for_the_next_scan_of_the_same_tile() -> None:
    run(make(0))
    scratch = recurrence._kept.scratch
    assert scratch is not None
    run(make(1, length=LENGTH + 5))
    assert recurrence._kept.scratch is scratch
    run(make(2, length=9))
    assert recurrence._kept.scratch is not scratch


def test_results_do_not_change_later() -> None:
    first = run(make(0))
    scratch = recurrence._kept.scratch
    assert scratch is not None
    buffers = {buffer.data_ptr() for buffer in memory(scratch)}
    for name, value in first.items():
        assert value.untyped_storage().data_ptr() not in buffers, name
    copies = {name: value.clone() for name, value in first.items()}
    run(make(1))
    with torch.no_grad():
        selective_scan(**make(2))
    assert_equal(first, copies)


def test_what_was_saved_for_backward_does_not_change_later() -> None:
    expected = [run(make(seed)) for seed in range(3)]
    leaves = [{name: value.requires_grad_() for name, value in make(seed).items()} for seed in range(3)]
    outputs: Any = [selective_scan(**tensors, return_final_states=True) for tensors in leaves]
    generator = torch.Generator().manual_seed(7)
    shapes = ((BATCH, LENGTH, CHANNELS), (BATCH, CHANNELS, SIZE))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).float() for shape in shapes]
    for seed in (1, 0, 2):
        gradients = torch.autograd.grad(outputs[seed], list(leaves[seed].values()), weights)
        for name, gradient in zip(leaves[seed], gradients, strict=True):
            assert torch.equal(gradient, expected[seed][f"gradient of {name}"]), name


@pytest.mark.parametrize("pads", [False, True], ids=["", "padded channels"])
def test_kept_buffers_are_written_before_they_are_read(pads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pads:
        monkeypatch.setattr(recurrence, "GRAIN", BATCH * SIZE * CHANNELS)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = run(make(0))
    scratch = recurrence._kept.scratch
    assert scratch is not None
    assert (scratch._states[0].tokens[0].shape[-1] > CHANNELS) is pads
    for buffer in memory(scratch):
        buffer.fill_(math.nan)
    assert_equal(run(make(0)), expected)
    assert recurrence._kept.scratch is scratch


def test_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [make(seed) for seed in range(2)]
    expected = [run(tensors) for tensors in inputs]
    # neither goes on before the other is as far, each with half a tile done
    together = threading.Barrier(2, timeout=60)
    interrupt(monkeypatch, together.wait)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for found, alone in zip(pool.map(run, inputs), expected, strict=True):
                assert_equal(found, alone)


def test_scan_inside_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = make(0), make(1)
    expected, expected_inner = run(outer), run(inner)
    depth = 0

    def nest() -> None:
        nonlocal depth
        if depth < 2:
            depth += 1
            with torch.enable_grad():
                assert_equal(run(inner), expected_inner)
            depth -= 1

    interrupt(monkeypatch, nest)
    assert_equal(run(outer), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_forward_inside_backward(reentrant: bool) -> None:
    """As gradient checkpointing does it: two scans, one after the other, recomputed in backward."""

    def two(*values: Tensor) -> Tensor:
        inputs = dict(zip(make(0), values, strict=True))
        y: Any = selective_scan(**inputs)
        again: Any = selective_scan(**{**inputs, "x": y})
        return again

    gradients = []
    for recompute in (False, True):
        leaves = {name: value.requires_grad_() for name, value in make(0).items()}
        values = leaves.values()
        y: Any = checkpoint(two, *values, use_reentrant=reentrant) if recompute else two(*values)
        y.square().sum().backward()
        gradients.append({name: value.grad for name, value in leaves.items()})
    assert_equal(*gradients)


def test_an_exception_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run(make(0))

    def fail() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        interrupt(patch, fail)
        with pytest.raises(ZeroDivisionError):
            run(make(0))
    assert recurrence._kept.scratch is None


def test_large_sets_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    run(make(0))
    scratch = recurrence._kept.scratch
    assert scratch is not None
    size = sum(buffer.numel() * buffer.element_size() for buffer in memory(scratch))
    assert scratch.nbytes() == size
    for limit, kept in ((size, True), (size - 1, False)):
        recurrence._kept.scratch = None
        monkeypatch.setattr(recurrence, "KEPT_BYTES", limit)
        run(make(0))
        # forward alone takes less and is kept, so what counts is what backward leaves
        found = recurrence._kept.scratch
        assert (found is not None and found.nbytes() == size) is kept


def test_freed_with_its_thread() -> None:
    def work() -> "weakref.ref[recurrence.Scratch]":
        run(make(0))
        assert recurrence._kept.scratch is not None
        return weakref.ref(recurrence._kept.scratch)

    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(work).result()
    gc.collect()
    assert left() is None and recurrence._kept.scratch is None


class Plain(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


UNKEPT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "dispatch mode": Plain,
    "function mode": lambda: torch.device("cpu"),
    "forward AD": forward_ad.dual_level,
}


@pytest.mark.parametrize("where", UNKEPT)
def test_neither_taken_nor_kept(where: str) -> None:
    tensors = make(0)
    expected = selective_scan(**tensors)
    scratch = recurrence._kept.scratch
    assert scratch is not None
    for buffer in memory(scratch):
        buffer.fill_(1)
    with UNKEPT[where]():
        found = selective_scan(**tensors)
    assert isinstance(found, Tensor) and isinstance(expected, Tensor)
    assert torch.equal(found, expected)
    assert recurrence._kept.scratch is scratch
    assert all((buffer == 1).all() for buffer in memory(scratch))


def test_tangents_do_not_stay() -> None:
    # a single tile: over several, selective_scan has no forward derivative
    tensors = make(0, length=9)
    with forward_ad.dual_level():
        D = forward_ad.make_dual(tensors["D"], torch.ones(CHANNELS))
        selective_scan(**{**tensors, "D": D})
        assert recurrence._kept.scratch is None
        y: Any = selective_scan(**tensors)
        assert forward_ad.unpack_dual(y).tangent is None
    assert recurrence._kept.scratch is None


def test_not_kept_under_a_transform_nor_where_memory_is_filled(poisoned: None) -> None:
    assert not recurrence._keeps(CPU)
    torch.use_deterministic_algorithms(False)
    assert recurrence._keeps(CPU)
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(recurrence._keeps(CPU))
        return x

    torch.func.vmap(look)(torch.zeros(2))
    torch.func.grad(lambda x: look(x))(torch.zeros(()))
    assert seen == [False, False]
