"""Running an op and its oracle on the same inputs: outputs and every gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .comparison import assert_matches

Tensors = dict[str, Tensor | None]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers in fp32, always the same for one shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) * 1009 + seed))


def outputs_and_gradients(op: Callable[..., Any], tensors: Tensors, **options: Any) -> Tensors:
    """Results of `op(**tensors, **options)` and the gradient of each tensor for fixed random cotangents."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    results = op(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    # a result without tokens may depend on nothing
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    gradients: tuple[Tensor | None, ...] = (None,) * len(given)
    if pairs:
        roots, weights = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(roots, list(given.values()), weights, allow_unused=True)
    found: Tensors = {f"output {i}": r.detach() for i, r in enumerate(results)}
    for (name, leaf), gradient in zip(given.items(), gradients, strict=True):
        assert gradient is None or (gradient.dtype == leaf.dtype and gradient.shape == leaf.shape), name
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def compare_with_oracle(
    op: Callable[..., Any], oracle: Callable[..., Any], tensors: Tensors, dtype: torch.dtype, **options: Any
) -> None:
    """Assert that `op` on `tensors` gives the outputs and gradients that `oracle` gives on the same values in fp64."""
    actual = outputs_and_gradients(op, tensors, **options)
    wide = {name: None if t is None else t.detach().double() for name, t in tensors.items()}
    expected = outputs_and_gradients(oracle, wide, **options)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_matches(value, expected[name], dtype=dtype, name=name)


def saved_bytes(op: Callable[..., Any], tensors: Tensors, **options: Any) -> int:
    """Bytes of the tensors that `op` keeps for backward, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        # the result is kept alive until the count is done, so that no storage is counted under a reused address
        result = op(**leaves, **options)
        total = sum(storages.values())
        del result
    return total
