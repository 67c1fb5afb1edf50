"""Checks that are made once for arguments of one kind: what was refused stays refused, and nothing unseen slips through."""

from typing import Any

import pytest
import torch

from mamba_kernels.signatures import once_per_signature


def counting() -> tuple[Any, list[tuple[Any, ...]]]:
    """A check that refuses tensors of two dimensions and the number 1.0, and the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    @once_per_signature
    def check(x: torch.Tensor, option: Any = None) -> None:
        calls.append((x, option))
        if x.dim() == 2 or isinstance(option, float):
            raise ValueError("refused")

    return check, calls


def test_equal_arguments_are_checked_once() -> None:
    check, calls = counting()
    for _ in range(3):
        check(torch.randn(3), 1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4),
        torch.randn(3, dtype=torch.float64),
        torch.randn(3, requires_grad=True),
        torch.empty(3, device="meta"),
    ],
    ids=["shape", "dtype", "requires_grad", "device"],
)
def test_another_tensor_is_checked(other: torch.Tensor) -> None:
    check, calls = counting()
    check(torch.randn(3), 1)
    check(other, 1)
    assert len(calls) == 2


def test_gradient_mode_is_part_of_the_signature() -> None:
    check, calls = counting()
    check(torch.randn(3))
    with torch.no_grad():
        check(torch.randn(3))
    assert len(calls) == 2


def test_equal_values_of_other_types_are_checked() -> None:
    check, _ = counting()
    check(torch.randn(3), 1)
    with pytest.raises(ValueError, match="refused"):
        check(torch.randn(3), 1.0)


def test_what_was_refused_is_refused_again() -> None:
    check, calls = counting()
    for _ in range(2):
        with pytest.raises(ValueError, match="refused"):
            check(torch.randn(3, 3))
    assert len(calls) == 2


def test_what_a_check_returns_is_remembered_with_its_signature() -> None:
    @once_per_signature
    def is_wide(x: torch.Tensor, limit: int | None = None) -> bool:
        return x.shape[-1] > (4 if limit is None else limit)

    for _ in range(2):
        assert is_wide(torch.randn(5)) is True
        assert is_wide(torch.randn(5), 5) is False
        assert is_wide(torch.randn(3)) is False
        assert is_wide(torch.randn(3), None) is False


def test_unhashable_arguments_are_checked_each_time() -> None:
    check, calls = counting()
    for _ in range(2):
        check(torch.randn(3), [1])
    assert len(calls) == 2
