"""The gate before the clock: a contender's outputs and gradients at the full shape against the fp64 reference.

The reference goes token by token and cannot run at the full shape. But the ops are causal: where the output's gradient is zero
beyond the first T tokens, everything up to there is what T tokens alone give. And where `x` is zero before the last T tokens,
so is the state that reaches them. So two calls at full shape, with the kernels and the launch that are then timed, are compared
at both ends, in the first and the last row of the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import mamba_kernels
from benchmarks.op_contenders import Implementation
from benchmarks.op_rows import OPS, Operands, OpRow, call_op, make_operands

__all__ = ["TOLERANCES", "Gate"]

# RMS of the error over RMS of the expected value: ours, and peers', whose rounding is not ours to judge
TOLERANCES = {True: 1e-2, False: 5e-2}
# no multiple of any block of tokens
WINDOW = 130


@dataclass
class _Window:
    """One end of a row: the operands of the full call, the gradients of its outputs, and what the reference makes of them."""

    operands: Operands
    part: slice
    weights: list[Tensor]
    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


class Gate:
    """Fresh random operands of one row and what the reference makes of them, for one contender after the other."""

    def __init__(self, row: OpRow, device: torch.device) -> None:
        self.op, self.tokens, self.state = row.op, OPS[row.op].tokens, OPS[row.op].updates
        self.operands = make_operands(row, device)
        self.rows = sorted({0, row.shape["B"] - 1})
        self.windows = [] if self.state is not None else [self._window(False), self._window(True)]

    def errors(self, implementation: Implementation) -> dict[str, float]:
        """RMS-relative error of every output and gradient, the larger of both ends; infinite where one is not finite."""
        if self.state is not None:
            return self._update_errors(implementation, self.state)
        worst: dict[str, float] = {}
        for window in self.windows:
            for name, error in self._window_errors(implementation, window).items():
                worst[name] = max(worst.get(name, 0.0), error)
        return worst

    def _part(self, name: str, value: Tensor, part: slice) -> Tensor:
        """What the window sees of an operand or its gradient."""
        return value[self.rows, part] if name in self.tokens else value

    def _window(self, at_end: bool) -> _Window:
        operands, x = self.operands, self.operands["x"]
        length = x.shape[1]
        part = slice(max(0, length - WINDOW), length) if at_end else slice(0, min(WINDOW, length))
        if at_end:
            x = x.clone()
            x[:, : part.start] = 0
            operands = operands | {"x": x}
        wide = {
            name: self._part(name, value, part).detach().double().requires_grad_() for name, value in operands.items()
        }
        outputs = _reference(self.op, wide)
        # the same numbers for both: what bf16 can hold
        weights = [torch.randn_like(output).to(torch.bfloat16).double() for output in outputs]
        gradients = torch.autograd.grad(outputs, list(wide.values()), weights)
        return _Window(operands, part, weights, tuple(output.detach() for output in outputs), gradients)

    def _window_errors(self, implementation: Implementation, window: _Window) -> dict[str, float]:
        leaves = {name: value.detach().requires_grad_() for name, value in window.operands.items()}
        with implementation.applied():
            outputs = implementation.restore(implementation.call(implementation.prepare(leaves)))
            incoming = []
            for output, given in zip(outputs, window.weights, strict=True):
                weight = torch.zeros_like(output)
                weight[self.rows, window.part] = given.to(output.dtype)
                incoming.append(weight)
            gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
        errors = {
            f"output {i}": _error(have[self.rows, window.part].detach(), want)
            for i, (have, want) in enumerate(zip(outputs, window.outputs, strict=True))
        }
        for name, have, want in zip(leaves, gradients, window.gradients, strict=True):
            errors[f"gradient of {name}"] = _error(self._part(name, have, window.part), want)
            # the window has neighbours: what is not finite there must not go unseen
            if not torch.isfinite(have).all():
                errors[f"gradient of {name}"] = math.inf
        return errors

    def _update_errors(self, implementation: Implementation, state: str) -> dict[str, float]:
        operands = self.operands | {state: self.operands[state].clone()}
        wide = {name: value.double() for name, value in self.operands.items()}
        # `double` copies nothing that is fp64 already, and the reference works in place
        wide[state] = wide[state].clone()
        prepared = implementation.prepare(operands)
        with torch.no_grad():
            with implementation.applied():
                (y,) = implementation.restore(implementation.call(prepared))
            (expected,) = _reference(self.op, wide)
        return {"y": _error(y, expected), state: _error(prepared[state], wide[state])}


def _error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.square().mean().sqrt().clamp(min=1e-30)
    value = float((actual.double() - expected).square().mean().sqrt() / scale)
    return value if math.isfinite(value) else math.inf


def _reference(op: str, operands: Operands) -> tuple[Tensor, ...]:
    with mamba_kernels.backend("reference"):
        return call_op(op, operands)
