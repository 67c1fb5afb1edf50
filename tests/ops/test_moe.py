"""Routed experts in plain torch against the fp64 oracles, what the public ops refuse, and their examples."""

import doctest
import importlib
from typing import Any

import pytest
import torch

import mamba_kernels
from mamba_kernels.moe import experts_step, route, routed_experts

from .moe_cases import TOY_CASES, errors_of_case, make_operands


@pytest.mark.parametrize("case", [name for name, case in TOY_CASES.items() if case["op"] != "products"])
def test_eager_equals_the_oracle(case: str) -> None:
    errors = errors_of_case(**TOY_CASES[case], implementation="eager")
    wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
    assert not wrong


def test_fp64_runs_in_eager() -> None:
    operands = make_operands(dtype=torch.float64)
    indices = torch.randint(0, 5, (19, 2))
    results = []
    for name in ("triton", "reference"):
        with mamba_kernels.backend(name):
            results.append(routed_experts(operands["x"], indices, torch.ones(19, 2), operands["up"], operands["down"]))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_no_tokens(name: str) -> None:
    operands = make_operands(tokens=0)
    indices = torch.zeros(0, 1, dtype=torch.int64)
    with mamba_kernels.backend(name):
        y = routed_experts(operands["x"], indices, torch.zeros(0, 1), operands["up"], operands["down"])
    assert y.shape == (0, 8)


X, UP, DOWN = torch.randn(3, 8), torch.randn(5, 12, 8), torch.randn(5, 8, 12)
CHOICE = {"indices": torch.zeros(3, 1, dtype=torch.int64), "weights": torch.ones(3, 1)}
LOGITS = {"router_logits": torch.zeros(3, 5)}


@pytest.mark.parametrize(
    ("call", "error", "part"),
    [
        (lambda: route(X, torch.randn(5, 7)), ValueError, "`weight`"),
        (lambda: route(X, torch.randn(5, 8), top_k=6), ValueError, "`top_k` must be from 1 to the 5"),
        (lambda: route(X, torch.randn(5, 8), scoring="tanh"), ValueError, "`scoring`"),
        (lambda: route(X, torch.randn(5, 8), bias=torch.randn(4)), ValueError, "`bias`"),
        (lambda: route(X.int(), torch.randn(5, 8)), TypeError, "`x`"),
        (lambda: routed_experts(X, **CHOICE, up=UP, down=DOWN, gated=True), ValueError, "`up`"),
        (lambda: routed_experts(X, **CHOICE, up=UP, down=DOWN.half()), TypeError, "one dtype"),
        (lambda: routed_experts(X, **CHOICE, up=UP, down=DOWN, activation="tanh"), ValueError, "`activation`"),
        (lambda: routed_experts(X, CHOICE["weights"], CHOICE["weights"], UP, DOWN), TypeError, "`indices`"),
        (lambda: routed_experts(X, CHOICE["indices"], torch.ones(3, 2), UP, DOWN), ValueError, "`weights`"),
        (lambda: routed_experts(X, **CHOICE, up=UP, down=DOWN, up_bias=torch.ones(5, 8)), ValueError, "`up_bias`"),
        (lambda: experts_step(X, UP, DOWN), ValueError, "either `indices` and `weights`"),
        (lambda: experts_step(X, UP, DOWN, **CHOICE, **LOGITS), ValueError, "either `indices` and `weights`"),
        (lambda: experts_step(X, UP, DOWN, router_logits=torch.zeros(3, 4)), ValueError, "`router_logits`"),
        (lambda: experts_step(X, UP, DOWN, **LOGITS, top_k=0), ValueError, "`top_k`"),
        (lambda: experts_step(X, UP, DOWN, **LOGITS, residual=X[:1]), ValueError, "`residual`"),
        (lambda: experts_step(X, UP.clone().requires_grad_(), DOWN, **LOGITS), RuntimeError, "no gradient"),
    ],
)
def test_bad_arguments_are_refused(call: Any, error: type[Exception], part: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert part in str(caught.value)


def test_examples() -> None:
    failed, attempted = doctest.testmod(importlib.import_module("mamba_kernels.moe.interface"))
    assert failed == 0 and attempted >= 9
