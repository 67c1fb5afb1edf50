"""The ops that verify drafted tokens against fp64 oracles that take one step after the other.

Tests marked `gpu` run the compiled kernels. Others run the same kernels under Triton's interpreter, and what eager computes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_kernels
from mamba_kernels import decode
from mamba_kernels.decode import reference

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors
from .test_decode_triton import relative

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CONV, MAMBA, MAMBA2 = "conv_verify", "mamba_verify", "mamba2_verify"

TOY_CASES: dict[str, dict[str, Any]] = {
    "conv": {"op": CONV},
    "conv-one-token": {"op": CONV, "tokens": 1},
    "conv-before-the-first": {"op": CONV, "accepted": -1},
    "conv-many-tokens": {"op": CONV, "tokens": 9, "bias": False, "activation": None},
    "conv-longer-history": {"op": CONV, "kept": 5, "strided": True},
    "conv-one-tap": {"op": CONV, "taps": 1},
    "mamba": {"op": MAMBA},
    "mamba-one-token": {"op": MAMBA, "tokens": 1},
    "mamba-norm": {"op": MAMBA, "norm_eps": 1e-3, "tokens": 5},
    "mamba-odd": {"op": MAMBA, "channels": 37, "size": 5, "rank": 3, "strided": True},
    "mamba-large-state": {"op": MAMBA, "channels": 3, "size": 70},
    "mamba2": {"op": MAMBA2},
    "mamba2-one-token": {"op": MAMBA2, "tokens": 1},
    "mamba2-groups": {"op": MAMBA2, "groups": 2, "strided": True},
    "mamba2-limits": {"op": MAMBA2, "limit": (0.3, 0.9)},
    "mamba2-odd": {"op": MAMBA2, "heads": 3, "head_dim": 5, "size": 7, "tokens": 6},
}


def make_operands(
    op: str,
    batch: int = 3,
    tokens: int = 4,
    accepted: int | None = None,
    channels: int = 40,
    taps: int = 4,
    kept: int | None = None,
    bias: bool = True,
    activation: str | None = "silu",
    size: int = 16,
    rank: int = 8,
    norm_eps: float | None = None,
    heads: int = 4,
    head_dim: int = 8,
    groups: int = 1,
    limit: tuple[float, float] = (0.0, float("inf")),
    strided: bool = False,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
) -> tuple[str, dict[str, Tensor | None], dict[str, Any]]:
    """The name of the buffer, tensors and options of a call."""

    def inputs(width: int) -> Tensor:
        values = torch.randn(batch, tokens, 2 * width if strided else width, device=device).to(dtype)
        return values[..., :width]

    def vector(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    # another token for every row
    at = torch.arange(batch, device=device) % tokens if accepted is None else torch.full((batch,), accepted)
    at = at.to(device)
    if op == CONV:
        history = vector(batch, (taps - 1 if kept is None else kept) + tokens, channels)
        return (
            "history",
            {
                "history": history,
                "accepted": at,
                "x": inputs(channels),
                "weight": vector(channels, taps),
                "bias": vector(channels) if bias else None,
            },
            {"activation": activation},
        )
    if op == MAMBA:
        return (
            "states",
            {
                "states": vector(batch, tokens, channels, size, dtype=FP32),
                "accepted": at,
                "x": inputs(channels),
                "parameters": inputs(rank + 2 * size),
                "dt_weight": vector(channels, rank, scale=rank**-0.5),
                "dt_bias": vector(channels),
                "A_log": vector(channels, size, dtype=FP32),
                "D": vector(channels, dtype=FP32),
                "z": inputs(channels),
            },
            {"norm_eps": norm_eps},
        )
    return (
        "states",
        {
            "states": vector(batch, tokens, heads, head_dim, size, dtype=FP32),
            "accepted": at,
            "xBC": inputs(heads * head_dim + 2 * groups * size),
            "dt": inputs(heads),
            "dt_bias": vector(heads, dtype=FP32),
            "A_log": vector(heads, dtype=FP32),
            "D": vector(heads, dtype=FP32),
        },
        {"groups": groups, "dt_limit": limit},
    )


def errors(op: str, backend: str = "triton", calls: int = 2, **case: Any) -> dict[str, float]:
    """RMS-relative errors of results and buffers against the oracle, over calls that go on from each other's buffers."""
    name, tensors, options = make_operands(op, **case)
    buffer = tensors.pop(name)
    assert buffer is not None
    # bits that are copied have to be the same, so the oracle's history has the dtype of ours
    held = buffer.clone() if op == CONV else buffer.double()
    found: dict[str, float] = {}
    for call in range(calls):
        expected = getattr(reference, op + "_ref")(held, **tensors, **options)
        with mamba_kernels.backend(backend):
            actual = getattr(decode, op)(buffer, **tensors, **options)
        found[f"result {call}"] = relative(actual, expected)
        found[f"buffer {call}"] = relative(buffer, held)
        tensors["accepted"] = (tensors["accepted"] + 1) % case.get("tokens", 4)
    return found


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    pytest.importorskip("triton")
    return errors_under_interpreter(__name__)


@pytest.mark.parametrize("case", TOY_CASES)
def test_under_the_interpreter(interpreted: Errors, case: str) -> None:
    for name, error in interpreted[case].items():
        assert error <= 1e-5, name


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", TOY_CASES)
def test_eager(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # dt is rounded after its projection, then everything else follows from it
    for name, error in errors(**TOY_CASES[case], backend="eager", dtype=dtype).items():
        assert error <= 2 * TOLERANCES[dtype], name


@pytest.mark.parametrize("op", [CONV, MAMBA, MAMBA2])
def test_a_draft_refused_leaves_nothing(op: str) -> None:
    """Tokens that are not accepted make no difference to what follows, to the bit."""
    torch.manual_seed(0)
    name, tensors, options = make_operands(op)
    first = "xBC" if op == MAMBA2 else "x"
    accepted = torch.tensor([0, 1, 2])
    results = []
    for seed in (1, 2):
        buffer = tensors[name].clone()
        run = getattr(decode, op)
        torch.manual_seed(seed)
        drafted = tensors[first].clone()
        for row, kept in enumerate(accepted.tolist()):
            drafted[row, kept + 1 :] = torch.randn_like(drafted[row, kept + 1 :])
        run(**{**tensors, name: buffer, first: drafted}, **options)
        results.append(run(**{**tensors, name: buffer, "accepted": accepted}, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("op", "change", "match"),
    [
        (CONV, {"accepted": torch.zeros(3)}, "accepted"),
        (CONV, {"accepted": torch.zeros(2, dtype=torch.int64)}, "accepted"),
        (CONV, {"history": torch.zeros(3, 6, 40)}, "at least T"),
        (CONV, {"history": torch.zeros(3, 40, 7).mT}, "contiguous"),
        (MAMBA, {"states": torch.zeros(3, 5, 40, 16)}, "states"),
        (MAMBA, {"z": torch.zeros(3, 40)}, "z"),
        (MAMBA2, {"dt": torch.zeros(3, 4, 5)}, "dt"),
    ],
)
def test_wrong_arguments(op: str, change: dict[str, Tensor], match: str) -> None:
    _, tensors, options = make_operands(op)
    with pytest.raises((TypeError, ValueError), match=match):
        getattr(decode, op)(**{**tensors, **change}, **options)


# of published models: mamba-2.8b, Falcon-Mamba, mamba2-2.7b, Codestral
GPU_CASES: dict[str, dict[str, Any]] = {
    "conv-2.8b": {"op": CONV, "channels": 5120},
    "mamba-2.8b": {"op": MAMBA, "channels": 5120, "rank": 160},
    "mamba-falcon": {"op": MAMBA, "channels": 8192, "rank": 256, "norm_eps": 1e-5},
    "mamba2-2.7b": {"op": MAMBA2, "heads": 80, "head_dim": 64, "size": 128},
    "mamba2-codestral": {"op": MAMBA2, "heads": 128, "head_dim": 64, "size": 128, "groups": 8},
    **{f"toy-{name}": case for name, case in TOY_CASES.items()},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    options = dict(GPU_CASES[case])
    counts = [options.pop("tokens")] if "tokens" in options else [2, 8, 16]
    for tokens in counts:
        torch.manual_seed(tokens)
        for name, error in errors(**options, tokens=tokens, dtype=dtype, device="cuda").items():
            assert error <= 2 * TOLERANCES[dtype], (name, tokens)


if __name__ == "__main__":
    print_errors(errors, TOY_CASES)
