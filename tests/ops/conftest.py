"""Fixtures of the ops' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not yet written is full of NaN, so that an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def shared_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give the GPU's memory back after a test that used it: several processes test on it at once."""
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()
