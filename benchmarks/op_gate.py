"""The gate before the clock: a contender's outputs and gradients at the full shape against the fp64 reference.

The reference goes token by token and cannot run at the full shape. But the ops are causal: where the output's gradient is zero
beyond the first T tokens, everything up to there is what T tokens alone give. And where `x` is zero before the last T tokens,
so is the state that reaches them. So two calls at full shape, with the kernels and the launch that are then timed, are compared
at both ends, in the first and the last row of the batch.
"""

import math

import torch
from torch import Tensor

import mamba_kernels
from benchmarks.op_contenders import Implementation
from benchmarks.op_rows import OPS, Operands, OpRow, call_op, make_operands

__all__ = ["TOLERANCES", "gate"]

# RMS of the error over RMS of the expected value: ours, and peers', whose rounding is not ours to judge
TOLERANCES = {True: 1e-2, False: 5e-2}
# no multiple of any block of tokens
WINDOW = 130


def gate(row: OpRow, implementation: Implementation, device: torch.device) -> dict[str, float]:
    """RMS-relative error of every output and gradient on fresh random operands; infinite where something is not finite."""
    operands = make_operands(row, device)
    if OPS[row.op].updates is not None:
        return _update_errors(row, implementation, operands)
    worst: dict[str, float] = {}
    for at_end in (False, True):
        for name, error in _window_errors(row, implementation, operands, at_end).items():
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.square().mean().sqrt().clamp(min=1e-30)
    value = float((actual.double() - expected).square().mean().sqrt() / scale)
    return value if math.isfinite(value) else math.inf


def _reference(op: str, operands: Operands) -> tuple[Tensor, ...]:
    with mamba_kernels.backend("reference"):
        return call_op(op, operands)


def _update_errors(row: OpRow, implementation: Implementation, operands: Operands) -> dict[str, float]:
    state = OPS[row.op].updates
    assert state is not None
    wide = {name: value.double() for name, value in operands.items()}
    prepared = implementation.prepare(operands)
    with implementation.applied(), torch.no_grad():
        (y,) = implementation.restore(implementation.call(prepared))
        (expected,) = _reference(row.op, wide)
    return {"y": _error(y, expected), state: _error(prepared[state], wide[state])}


def _window_errors(row: OpRow, implementation: Implementation, operands: Operands, at_end: bool) -> dict[str, float]:
    tokens = OPS[row.op].tokens
    batch, length = operands["x"].shape[:2]
    window = slice(max(0, length - WINDOW), length) if at_end else slice(0, min(WINDOW, length))
    rows = sorted({0, batch - 1})
    if at_end:
        head = operands["x"].clone()
        head[:, : window.start] = 0
        operands = operands | {"x": head}

    leaves = {name: value.detach().requires_grad_() for name, value in operands.items()}
    with implementation.applied():
        outputs = implementation.restore(implementation.call(implementation.prepare(leaves)))
        weights = []
        for output in outputs:
            weight = torch.zeros_like(output)
            weight[rows, window] = torch.randn_like(weight[rows, window])
            weights.append(weight)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)

    def part(name: str, value: Tensor) -> Tensor:
        return value[rows, window] if name in tokens else value

    wide = {name: part(name, value).detach().double().requires_grad_() for name, value in operands.items()}
    expected = _reference(row.op, wide)
    incoming = [weight[rows, window].double() for weight in weights]
    wanted = torch.autograd.grad(expected, list(wide.values()), incoming)
    errors = {
        f"output {i}": _error(have[rows, window].detach(), want.detach())
        for i, (have, want) in enumerate(zip(outputs, expected, strict=True))
    }
    for name, have, want in zip(leaves, gradients, wanted, strict=True):
        errors[f"gradient of {name}"] = _error(part(name, have), want)
        # the window has neighbours: what is not finite there must not go unseen
        if not torch.isfinite(have).all():
            errors[f"gradient of {name}"] = math.inf
    return errors
