"""The Triton causal convolution and its update against the fp64 oracles.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import causal_conv1d, causal_conv1d_update

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors
from .oracle import differentiate, errors_at_both_ends, relative_error

pytest.importorskip("triton")

CONV, UPDATE = "mamba_kernels.causal_conv1d.", "mamba_kernels.state_update."
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# id: what differs from a call of two rows of 11 tokens of 20 channels with a bias, silu and an initial state
TOY_CASES: dict[str, dict[str, Any]] = {
    "several-tiles": {},
    "bare": {"bare": True, "activation": None},
    "one-token": {"length": 1},
    "two-tokens": {"length": 2},
    "one-tap": {"taps": 1},
    "eight-taps": {"taps": 8},
    "nine-taps-in-eager": {"taps": 9},
    "seq-idx": {"seq_idx": [[0, 0, -1, 1, 1, 1, -1, 1, 2, 2, 2], [-1, 3, 3, 3, 3, 4, 4, 5, 5, -1, -1]]},
    "seq-idx-all-padding": {"seq_idx": [[-1] * 11, [0] * 11]},
    "cu-seqlens": {"batch": 1, "cu_seqlens": [0, 0, 2, 3, 11, 11]},
    "strided": {"strided": True},
    "no-gradient-of-y": {"without": "y"},
    "no-gradient-of-states": {"without": "final_states"},
    "fp16": {"dtype": FP16},
    "update": {"tokens": 1},
    "update-one-of-many": {"tokens": None},
    "update-many-tokens": {"tokens": 8},
    "update-rows": {"tokens": 2, "rows": [3, -1]},
    "update-long-state": {"tokens": 2, "state": 7, "bare": True, "activation": None},
    "update-strided": {"tokens": 3, "strided": True},
    "update-one-tap": {"tokens": 3, "taps": 1, "state": 2},
    "update-fp16-state": {"tokens": 2, "dtype": FP16},
    "update-step-of-rows": {"tokens": None, "rows": [3, -1]},
    "update-step-of-several-programs": {"tokens": None, "channels": 150, "bare": True, "activation": None},
    "update-step-fp16": {"tokens": 1, "dtype": FP16},
    "update-step-strided": {"tokens": None, "strided": True},
    "update-step-of-three-taps": {"tokens": None, "taps": 3},
}


def make_operands(
    batch: int,
    length: int,
    channels: int,
    taps: int = 4,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    sequences: int | None = None,
    bare: bool = False,
    strided: bool = False,
) -> dict[str, Tensor | None]:
    """Random operands of one call; those of `strided` are views with gaps, the weight transposed."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = normal(batch, length, channels)
    weight = normal(channels, taps)
    if strided:
        x, weight = normal(batch, length, channels + 7)[:, :, 3 : channels + 3], normal(taps, channels).t()
    return {
        "x": x,
        "weight": weight,
        "bias": None if bare else normal(channels),
        "initial_states": None if bare else normal(sequences or batch, channels, taps - 1),
    }


def triton_op() -> Any:
    return importlib.import_module(CONV + "triton_conv").causal_conv1d_triton


def errors_of(
    operands: dict[str, Tensor | None], without: str | None = None, oracle: str = "reference", **options: Any
) -> dict[str, float]:
    """Errors of every output and gradient of the convolution. `oracle` "eager" is the vectorised one in fp64."""
    name = "causal_conv1d_ref" if oracle == "reference" else "causal_conv1d_eager"
    reference = getattr(importlib.import_module(CONV + oracle), name)
    x, weight = operands["x"], operands["weight"]
    assert x is not None and weight is not None
    cu_seqlens = options.get("cu_seqlens")
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = (torch.randn_like(x), torch.randn(sequences, x.shape[2], weight.shape[1] - 1, device=x.device))
    actual = differentiate(triton_op(), operands, weights, without, **options)
    double = {name: None if value is None else value.double() for name, value in operands.items()}
    expected = differentiate(reference, double, weights, without, **options)
    return {name: relative_error(actual[name], want) for name, want in expected.items()}


def update_errors(
    batch: int = 2,
    tokens: int | None = 1,
    channels: int = 20,
    taps: int = 4,
    state: int = 4,
    dtype: torch.dtype = FP32,
    rows: list[int] | None = None,
    bare: bool = False,
    strided: bool = False,
    activation: str | None = "silu",
    device: str = "cpu",
) -> dict[str, float]:
    """Errors of the outputs and of the state that a call of the update leaves behind."""
    kernel = importlib.import_module(UPDATE + "triton_conv").causal_conv1d_update_triton
    reference = importlib.import_module(UPDATE + "reference").causal_conv1d_update_ref
    operands = make_operands(
        batch, tokens or 1, channels, taps, dtype=dtype, device=device, bare=bare, strided=strided
    )
    x = operands["x"] if tokens is not None else operands["x"][:, 0]
    held = torch.randn(5 if rows else batch, state, channels, device=device).to(dtype).transpose(1, 2)
    held = held if strided else held.contiguous()
    wide = held.double()
    indices = None if rows is None else torch.tensor(rows, device=device)
    options = {"activation": activation, "state_indices": indices}
    y = kernel(x, held, operands["weight"], bias=operands["bias"], **options)
    bias = None if operands["bias"] is None else operands["bias"].double()
    want = reference(x.double(), wide, operands["weight"].double(), bias=bias, **options)
    return {"y": relative_error(y, want), "state": relative_error(held, wide)}


def run_toy_case(
    batch: int = 2,
    length: int = 11,
    channels: int = 20,
    tokens: int | str | None = "none",
    without: str | None = None,
    seq_idx: list[list[int]] | None = None,
    cu_seqlens: list[int] | None = None,
    activation: str | None = "silu",
    **kind: Any,
) -> dict[str, float]:
    """One entry of TOY_CASES, with programs small enough to have several of everything."""
    if tokens != "none":
        return update_errors(batch=batch, tokens=tokens, channels=channels, activation=activation, **kind)
    module = importlib.import_module(CONV + "triton_conv")
    # the backward takes W - 1 tokens off its rounds
    module.FORWARD = module.Tuning(channels=16, tokens=2, longest=2)
    module.BACKWARD = module.Tuning(channels=16, tokens=4, longest=2)
    options: dict[str, Any] = {"activation": activation, "without": without}
    sequences = batch
    if seq_idx is not None:
        options["seq_idx"] = torch.tensor(seq_idx)
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        sequences = len(cu_seqlens) - 1
    return errors_of(make_operands(batch, length, channels, sequences=sequences, **kind), **options)


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    return errors_under_interpreter(__name__)


def assert_within_tolerance(errors: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: value for name, value in errors.items() if not value <= TOLERANCES[dtype]}
    assert not wrong


@pytest.mark.parametrize("case", list(TOY_CASES))
def test_kernels_under_the_interpreter(toy_errors: Errors, case: str) -> None:
    assert_within_tolerance(toy_errors[case], TOY_CASES[case].get("dtype", FP32))


DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("length", [0, 1, 2, 3, 63, 64, 65, 257, 2000, 8192, 65536])
def test_lengths_on_gpu(length: int, dtype: torch.dtype) -> None:
    operands = make_operands(2, length, 96, dtype=dtype, device="cuda")
    errors = errors_of(operands, oracle="reference" if length < 66 else "eager", activation="silu")
    assert_within_tolerance(errors, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [{"bare": True}, {"strided": True, "channels": 100}, {"taps": 1}, {"taps": 3}, {"batch": 64, "channels": 33}],
    ids=["bare", "strided", "W1", "W3", "batch-64"],
)
def test_shapes_on_gpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    operands = make_operands(**({"batch": 2, "length": 257, "channels": 96} | shape), dtype=dtype, device="cuda")
    activation = None if shape.get("bare") else "silu"
    # with one tap there is no state to differentiate
    without = "final_states" if shape.get("taps") == 1 else None
    assert_within_tolerance(errors_of(operands, without, oracle="eager", activation=activation), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_on_gpu(packing: str, dtype: torch.dtype) -> None:
    if packing == "seq_idx":
        numbers = torch.randint(0, 20, (3, 300), device="cuda").eq(0).cumsum(1)
        options = {"seq_idx": torch.where(torch.rand(3, 300, device="cuda") < 0.2, -1, numbers)}
        operands = make_operands(3, 300, 96, dtype=dtype, device="cuda")
    else:
        bounds = [0, 64, 64, 65, 300, 556, 700, 700]
        options = {"cu_seqlens": torch.tensor(bounds, device="cuda", dtype=torch.int32)}
        operands = make_operands(1, 700, 96, dtype=dtype, device="cuda", sequences=len(bounds) - 1)
    assert_within_tolerance(errors_of(operands, oracle="eager", activation="silu", **options), dtype)


@pytest.mark.gpu
def test_padding_may_hold_nan_on_gpu() -> None:
    operands = make_operands(2, 100, 96, device="cuda")
    seq_idx = torch.zeros(2, 100, dtype=torch.int32, device="cuda")
    seq_idx[:, 40:45] = -1
    expected = triton_op()(**operands, seq_idx=seq_idx)
    operands["x"][:, 40:45] = math.nan
    assert torch.equal(triton_op()(**operands, seq_idx=seq_idx), expected)


@pytest.mark.gpu
def test_same_bits_every_time_on_gpu() -> None:
    operands = make_operands(4, 3000, 768, dtype=BF16, device="cuda")
    weights = (torch.randn_like(operands["x"]), torch.randn(4, 768, 3, device="cuda"))
    first = differentiate(triton_op(), operands, weights, None, activation="silu")
    for _ in range(9):
        again = differentiate(triton_op(), operands, weights, None, activation="silu")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_compiles_without_graph_breaks_on_gpu() -> None:
    operands = make_operands(2, 300, 96, device="cuda")
    weights = (torch.randn_like(operands["x"]), torch.randn(2, 96, 3, device="cuda"))
    expected = differentiate(causal_conv1d, operands, weights, None, activation="silu")
    actual = differentiate(torch.compile(causal_conv1d, fullgraph=True), operands, weights, None, activation="silu")
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
@pytest.mark.xdist_group("much-memory")
def test_more_than_two_to_the_31_elements_on_gpu() -> None:
    # more than 65,535 tiles of tokens too
    operands = make_operands(1, 400, 1024, dtype=BF16, device="cuda", bare=True)
    errors = errors_at_both_ends(triton_op(), operands, ("x",), (1 << 21) + 77)
    assert_within_tolerance(errors, BF16)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("tokens", [None, 1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_update_on_gpu(batch: int, tokens: int | None, dtype: torch.dtype) -> None:
    errors = update_errors(batch=batch, tokens=tokens, channels=5120, dtype=dtype, device="cuda")
    assert_within_tolerance(errors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [None, 2])
def test_update_of_rows_on_gpu(tokens: int | None) -> None:
    assert_within_tolerance(update_errors(batch=3, rows=[4, -1, 0], tokens=tokens, channels=300, device="cuda"), FP32)


@pytest.mark.gpu
@DTYPES
def test_steps_equal_the_convolution_on_gpu(dtype: torch.dtype) -> None:
    x = torch.randn(3, 20, 300, device="cuda").to(dtype)
    weight, bias = torch.randn(300, 4, device="cuda"), torch.randn(300, device="cuda")
    expected = causal_conv1d(x, weight, bias, activation="silu")
    state = torch.zeros(3, 300, 4, device="cuda", dtype=dtype)
    steps = [causal_conv1d_update(x[:, t], state, weight, bias, activation="silu") for t in range(20)]
    assert_within_tolerance({"y": relative_error(torch.stack(steps, dim=1), expected.double())}, dtype)


@pytest.mark.gpu
def test_update_compiles_without_graph_breaks_on_gpu() -> None:
    x, state = torch.randn(2, 96, device="cuda"), torch.randn(2, 96, 4, device="cuda")
    weight, other = torch.randn(96, 4, device="cuda"), state.clone()
    expected = causal_conv1d_update(x, state, weight, activation="silu")
    actual = torch.compile(causal_conv1d_update, fullgraph=True)(x, other, weight, activation="silu")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, state, rtol=0, atol=0)


if __name__ == "__main__":
    print_errors(run_toy_case, TOY_CASES)
