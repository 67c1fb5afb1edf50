"""Running an op and its oracle on the same inputs: outputs and every gradient."""

import math
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


def differentiate(
    fn: Callable[..., Any],
    operands: Tensors,
    weights: tuple[Tensor, Tensor],
    without: str | None = None,
    **options: Any,
) -> Tensors:
    """Outputs and gradients of an op with final states, under fixed gradients of its outputs.

    `without` "y" or "final_states" leaves that output out of the differentiation.
    """
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in operands.items()}
    y, final = fn(**leaves, **options, return_final_states=True)
    outputs = [y, final] if without is None else [final if without == "y" else y]
    incoming = [*weights] if without is None else [weights[1 if without == "y" else 0]]
    present = {name: value for name, value in leaves.items() if value is not None}
    gradients = torch.autograd.grad(
        outputs,
        list(present.values()),
        [weight.to(output) for weight, output in zip(incoming, outputs, strict=True)],
        allow_unused=True,
    )
    return {"y": y.detach(), "final_states": final.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(present, gradients, strict=True)
    }


def relative_error(have: Tensor | None, want: Tensor | None) -> float:
    """RMS-relative error; infinite where something is not finite."""
    if want is None or have is None or want.numel() == 0:
        # an oracle says None where a gradient cannot depend on the input
        return 0.0 if have is None or not have.any() else math.inf
    want = want.to(have.device)
    scale = want.square().mean().sqrt().clamp(min=1e-30)
    value = float((have.double() - want).square().mean().sqrt() / scale)
    return value if math.isfinite(value) else math.inf


def errors_at_both_ends(
    fn: Callable[..., Any], operands: Tensors, tokens: tuple[str, ...], length: int
) -> dict[str, float]:
    """Errors of a call with `length` tokens, zeros but for the first and the last ones, against a call with those alone.

    Zeros before the last tokens keep the state at zero. `tokens` names the operands (1, L, …).
    """
    x = operands["x"]
    assert x is not None
    short = x.shape[1]
    weight = torch.randn_like(x)

    def spread(value: Tensor) -> Tensor:
        long = value.new_zeros(1, length, *value.shape[2:])
        long[:, :short], long[:, -short:] = value, value
        return long

    def run(given: Tensors, incoming: Tensor) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in given.items() if value is not None}
        y = fn(**leaves)
        names = [name for name in tokens if name in leaves]
        gradients = torch.autograd.grad(y, [leaves[name] for name in names], incoming)
        return {"y": y.detach(), **{f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}}

    expected = run(operands, weight)
    given = {
        name: spread(value) if name in tokens and value is not None else value for name, value in operands.items()
    }
    actual = run(given, spread(weight))
    return {
        f"{name} at the {end}": relative_error(actual[name][:, part], want.double())
        for name, want in expected.items()
        for end, part in (("start", slice(0, short)), ("end", slice(-short, None)))
    }


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


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight
