"""What `python -m benchmarks ops` measures: ops at the shapes of the "Numbers to beat", their operands and what they must move.

Symbols: B batch, L length, D inner width, N state size, H heads, P head_dim, G groups, W conv width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

import mamba_kernels

__all__ = [
    "OPS",
    "ROWS",
    "Op",
    "OpRow",
    "Operands",
    "call_op",
    "floor_bytes",
    "make_operands",
    "operand_bytes",
    "rows_at",
]

Operands = dict[str, Tensor]


@dataclass(frozen=True)
class OpRow:
    """One op at one shape. Targets are milliseconds on an H100, forward and forward plus backward; None where none is set."""

    op: str
    shape: dict[str, int]
    forward_target: float | None = None
    both_target: float | None = None

    @property
    def label(self) -> str:
        """Op and shape in one line, such as `selective_scan B8 D2048 L2048 N16`."""
        return " ".join([self.op, *(f"{name}{size}" for name, size in self.shape.items())])


@dataclass(frozen=True)
class Op:
    """How an op is called here.

    Args:
        make: operands of a shape in bf16, parameters and states in fp32.
        tokens: the operands with leading dimensions (B, L).
        options: arguments that are no tensors.
        updates: the operand that is updated in place; such an op has no backward and one token.
    """

    make: Callable[[dict[str, int], torch.device], Operands]
    tokens: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    updates: str | None = None


def _bf16(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def _step_bias(channels: int, device: torch.device) -> Tensor:
    """(channels,) inverse softplus of steps from 0.001 to 0.1, as Mamba initialises them."""
    step = torch.exp(torch.rand(channels, device=device) * math.log(100) + math.log(0.001))
    return step + torch.log(-torch.expm1(-step))


def _selective_scan(s: dict[str, int], device: torch.device) -> Operands:
    lead = (s["B"], s["L"]) if "L" in s else (s["B"],)
    states = torch.arange(1, s["N"] + 1, dtype=torch.float32, device=device)
    return {
        "x": _bf16(device, *lead, s["D"]),
        "dt": _bf16(device, *lead, s["D"]) * 0.5,
        "A": -states.repeat(s["D"], 1),
        "B": _bf16(device, *lead, s["N"]),
        "C": _bf16(device, *lead, s["N"]),
        "D": torch.randn(s["D"], device=device),
        "z": _bf16(device, *lead, s["D"]),
        "dt_bias": _step_bias(s["D"], device),
    }


def _ssd(s: dict[str, int], device: torch.device) -> Operands:
    lead = (s["B"], s["L"]) if "L" in s else (s["B"],)
    heads = s["H"]
    return {
        "x": _bf16(device, *lead, heads, s["P"]),
        "dt": _bf16(device, *lead, heads) * 0.5,
        "A": -1 - 15 * torch.rand(heads, device=device),
        "B": _bf16(device, *lead, s["G"], s["N"]),
        "C": _bf16(device, *lead, s["G"], s["N"]),
        "D": torch.randn(heads, device=device),
        "dt_bias": _step_bias(heads, device),
    }


def _conv(s: dict[str, int], device: torch.device) -> Operands:
    lead = (s["B"], s["L"]) if "L" in s else (s["B"],)
    return {
        "x": _bf16(device, *lead, s["D"]),
        "weight": torch.randn(s["D"], s["W"], device=device) / 2,
        "bias": torch.randn(s["D"], device=device),
    }


def _selective_update(s: dict[str, int], device: torch.device) -> Operands:
    return {"state": torch.randn(s["B"], s["D"], s["N"], device=device), **_selective_scan(s, device)}


def _ssd_update(s: dict[str, int], device: torch.device) -> Operands:
    return {"state": torch.randn(s["B"], s["H"], s["P"], s["N"], device=device), **_ssd(s, device)}


def _conv_update(s: dict[str, int], device: torch.device) -> Operands:
    return {"conv_state": _bf16(device, s["B"], s["D"], s["W"]), **_conv(s, device)}


def _norm(*tokens: str) -> Callable[[dict[str, int], torch.device], Operands]:
    """Operands of a norm over B · L rows of D channels; the residual stream is fp32."""

    def make(s: dict[str, int], device: torch.device) -> Operands:
        operands = {name: _bf16(device, s["B"], s["L"], s["D"]) for name in tokens}
        if "residual" in operands:
            operands["residual"] = operands["residual"].float()
        return {**operands, "weight": torch.randn(s["D"], device=device)}

    return make


SILU: dict[str, object] = {"activation": "silu"}
OPS: dict[str, Op] = {
    "selective_scan": Op(_selective_scan, ("x", "dt", "B", "C", "z")),
    "ssd_chunk_scan": Op(_ssd, ("x", "dt", "B", "C"), {"chunk_size": 256}),
    "causal_conv1d": Op(_conv, ("x",), SILU),
    "selective_state_update": Op(_selective_update, updates="state"),
    "ssd_state_update": Op(_ssd_update, updates="state"),
    "causal_conv1d_update": Op(_conv_update, options=SILU, updates="conv_state"),
    "rms_norm": Op(_norm("x"), ("x",)),
    "add_rms_norm": Op(_norm("x", "residual"), ("x", "residual")),
    "rms_norm_gated": Op(_norm("x", "z"), ("x", "z")),
}

MAMBA2 = {"P": 64, "G": 1, "N": 128}
ROWS: tuple[OpRow, ...] = (
    OpRow("selective_scan", {"B": 8, "L": 2048, "D": 2048, "N": 16}, 0.30, 1.5),
    OpRow("selective_scan", {"B": 1, "L": 8192, "D": 5120, "N": 16}, 0.47, 2.2),
    OpRow("selective_scan", {"B": 1, "L": 65536, "D": 1536, "N": 16}, 1.1, 5.0),
    OpRow("ssd_chunk_scan", {"B": 8, "L": 2048, "H": 32, **MAMBA2}, 0.35, 1.4),
    OpRow("ssd_chunk_scan", {"B": 1, "L": 8192, "H": 80, **MAMBA2}, 0.40, 1.7),
    OpRow("ssd_chunk_scan", {"B": 1, "L": 65536, "H": 24, **MAMBA2}, 0.65, 2.5),
    OpRow("ssd_chunk_scan", {"B": 8, "L": 2048, "H": 128, **MAMBA2, "G": 8}, 0.65, 2.9),
    OpRow("ssd_chunk_scan", {"B": 1, "L": 512, "H": 24, **MAMBA2}, 0.15, 0.6),
    OpRow("causal_conv1d", {"B": 8, "L": 2048, "D": 2048, "W": 4}, 0.052, 0.20),
    OpRow("selective_state_update", {"B": 1, "D": 5120, "N": 16}),
    OpRow("selective_state_update", {"B": 64, "D": 5120, "N": 16}),
    OpRow("ssd_state_update", {"B": 1, "H": 80, **MAMBA2}),
    OpRow("ssd_state_update", {"B": 64, "H": 80, **MAMBA2}),
    OpRow("causal_conv1d_update", {"B": 1, "D": 5120, "W": 4}),
    OpRow("causal_conv1d_update", {"B": 64, "D": 5120, "W": 4}),
    OpRow("rms_norm", {"B": 8, "L": 2048, "D": 2560}),
    OpRow("add_rms_norm", {"B": 8, "L": 2048, "D": 2560}),
    OpRow("rms_norm_gated", {"B": 8, "L": 2048, "D": 5120}),
)
# what a curve of time against length is drawn for: one layer of a 130m model
CURVES: tuple[OpRow, ...] = (
    OpRow("selective_scan", {"B": 1, "L": 2048, "D": 1536, "N": 16}),
    OpRow("ssd_chunk_scan", {"B": 1, "L": 2048, "H": 24, **MAMBA2}),
    OpRow("causal_conv1d", {"B": 1, "L": 2048, "D": 1536, "W": 4}),
)


def rows_at(lengths: list[int]) -> tuple[OpRow, ...]:
    """The parallel ops with a batch of one at several lengths."""
    return tuple(OpRow(row.op, row.shape | {"L": length}) for row in CURVES for length in lengths)


def make_operands(row: OpRow, device: torch.device) -> Operands:
    """Fresh random operands of a row."""
    return OPS[row.op].make(row.shape, device)


def call_op(op: str, operands: Operands) -> tuple[Tensor, ...]:
    """The outputs of the public op, with the options of its rows."""
    result = getattr(mamba_kernels, op)(**operands, **OPS[op].options)
    return result if isinstance(result, tuple) else (result,)


def operand_bytes(tensors: Operands) -> int:
    """The memory that is read when each tensor is read once."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def floor_bytes(row: OpRow, operands: Operands) -> tuple[int, int]:
    """The least that a forward, and a forward with its backward, can read and write.

    Forward reads the operands and writes the outputs. Backward reads the operands and the outputs' gradients again and writes
    a gradient for each operand.
    """
    read = operand_bytes(operands)
    if (state := OPS[row.op].updates) is not None:
        moved = read + operand_bytes({"state": operands[state], "y": operands["x"]})
        return moved, moved
    written = operand_bytes(
        {"y": operands["x"]} | {name: operands[name] for name in ("residual",) if name in operands}
    )
    return read + written, 3 * read + 2 * written


def softplus_steps(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """softplus(dt + dt_bias) in fp32, for contenders that want it done before."""
    return F.softplus(dt.float() + dt_bias)
