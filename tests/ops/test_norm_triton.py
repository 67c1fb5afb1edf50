"""The Triton norms against the fp64 oracles.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_kernels

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors

pytest.importorskip("triton")

PACKAGE = "mamba_kernels.norm."
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-3

# id: what differs from `rms_norm` of (5, 12) with a weight; `largest` makes longer rows run in blocks of 8
TOY_CASES: dict[str, dict[str, Any]] = {
    "rms_norm": {},
    "no-weight": {"weight": False},
    "one-row": {"shape": (7,)},
    "several-dimensions": {"shape": (3, 5, 12), "programs": 4},
    "rows-in-blocks": {"shape": (3, 21), "largest": 8, "programs": 2},
    "strided": {"strided": True},
    "add": {"op": "add_rms_norm"},
    "add-in-blocks": {"op": "add_rms_norm", "shape": (3, 21), "largest": 8},
    "add-narrow": {"op": "add_rms_norm", "dtype": FP16, "shape": (9, 12)},
    "add-wide-residual": {"op": "add_rms_norm", "dtype": FP16, "residual_dtype": FP32, "shape": (2, 3, 12)},
    "add-without-sum": {"op": "add_rms_norm", "without": 1, "dtype": FP16, "residual_dtype": FP32},
    "add-without-normed": {"op": "add_rms_norm", "without": 0, "dtype": FP16, "residual_dtype": FP32},
    "first-block-without-normed": {
        "op": "add_rms_norm",
        "without": 0,
        "dtype": FP16,
        "residual_dtype": FP32,
        "residual": False,
    },
    "first-block": {"op": "add_rms_norm", "dtype": FP16, "residual_dtype": FP32, "residual": False},
    "first-block-alike": {"op": "add_rms_norm", "residual": False},
    "gate-first": {"op": "rms_norm_gated", "strided": True},
    "gate-first-groups": {"op": "rms_norm_gated", "group_size": 4, "programs": 4},
    "gate-first-in-blocks": {"op": "rms_norm_gated", "shape": (3, 42), "group_size": 21, "largest": 8},
    "gate-last": {"op": "rms_norm_gated", "before": True, "programs": 4},
    "gate-last-groups-no-weight": {"op": "rms_norm_gated", "before": True, "group_size": 3, "weight": False},
    "gate-last-in-blocks": {"op": "rms_norm_gated", "before": True, "shape": (3, 21), "largest": 8},
    "groups-no-gate": {"op": "rms_norm_gated", "gate": False, "group_size": 6},
}


def make_operands(
    shape: tuple[int, ...] = (5, 12),
    op: str = "rms_norm",
    dtype: torch.dtype = FP32,
    weight: bool = True,
    weight_dtype: torch.dtype = FP32,
    residual: bool = True,
    residual_dtype: torch.dtype | None = None,
    gate: bool = True,
    strided: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Random operands of one call; those of `strided` are views with gaps, x with its channels far apart."""

    def normal(dtype: torch.dtype = dtype) -> Tensor:
        if strided:
            return torch.randn(*shape[:-1], 2 * shape[-1] + 1, device=device).to(dtype)[..., 1 : shape[-1] + 1]
        return torch.randn(*shape, device=device).to(dtype)

    operands: dict[str, Tensor | None] = {
        "x": torch.randn(*shape[::-1], device=device).to(dtype).permute(*range(len(shape))[::-1])
        if strided
        else normal(),
        "weight": torch.randn(shape[-1], device=device).to(weight_dtype) if weight else None,
    }
    if op == "add_rms_norm":
        operands["residual"] = normal(residual_dtype or dtype) if residual else None
    if op == "rms_norm_gated":
        operands["z"] = normal() if gate else None
    return operands


def call(op: str, operands: dict[str, Tensor | None], oracle: bool, **options: Any) -> tuple[Tensor, ...]:
    """Outputs of an op in Triton or of its oracle."""
    suffix, module = ("_ref", "reference") if oracle else ("_triton", "triton_norm")
    fn = getattr(importlib.import_module(PACKAGE + module), op + suffix)
    result = fn(**operands, eps=EPS, **options)
    return result if isinstance(result, tuple) else (result,)


def differentiate(
    op: str,
    operands: dict[str, Tensor | None],
    weights: list[Tensor],
    oracle: bool,
    without: int | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs and gradients of a call under fixed gradients of its outputs; nobody uses output `without`."""
    leaves = {name: None if value is None else value.detach().requires_grad_() for name, value in operands.items()}
    outputs = call(op, leaves, oracle, **options)
    present = {name: value for name, value in leaves.items() if value is not None}
    incoming = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=False)]
    used = [i for i in range(len(outputs)) if i != without]
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], list(present.values()), [incoming[i] for i in used], allow_unused=True
    )
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for (name, leaf), gradient in zip(present.items(), gradients, strict=True):
        if gradient is None:
            assert without is not None, name
            continue
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, name
        found[f"gradient of {name}"] = gradient
    return found


def errors_of(op: str, operands: dict[str, Tensor | None], **options: Any) -> dict[str, float]:
    """RMS-relative error of every output and gradient; infinite where something is not finite."""
    x = operands["x"]
    assert x is not None
    weights = [torch.randn_like(x, dtype=torch.float32) for _ in range(2)]
    actual = differentiate(op, operands, weights, False, **options)
    double = {name: None if value is None else value.detach().double() for name, value in operands.items()}
    if "residual_dtype" in options:
        options["residual_dtype"] = torch.float64
    expected = differentiate(op, double, weights, True, **options)
    errors = {}
    for name, want in expected.items():
        scale = want.square().mean().sqrt().clamp(min=1e-30)
        errors[name] = float((actual[name].double() - want).square().mean().sqrt() / scale) if want.numel() else 0.0
    total = actual.get("output 1")
    if total is not None and total.dtype == x.dtype:
        (again,) = call("rms_norm", {"x": total, "weight": operands["weight"]}, False)
        same = torch.equal(again, actual["output 0"])
        if x.dtype == FP32:
            # nothing is rounded between, but sums may be formed in another order
            same = torch.allclose(again, actual["output 0"], rtol=1e-5, atol=1e-6)
        errors["norm of the sum as returned"] = 0.0 if same else float("inf")
    return {name: error if error == error else float("inf") for name, error in errors.items()}


def options_of(op: str, operands: dict[str, Tensor | None], case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are no tensors."""
    x = operands["x"]
    assert x is not None
    if op == "add_rms_norm":
        return {"residual_dtype": case.get("residual_dtype") or x.dtype}
    if op == "rms_norm_gated":
        return {"group_size": case.get("group_size") or x.shape[-1], "norm_before_gate": case.get("before", False)}
    return {}


def errors_of_case(device: str = "cpu", **case: Any) -> dict[str, float]:
    """The errors of one call described as in TOY_CASES."""
    op = case.get("op", "rms_norm")
    kind = {name: value for name, value in case.items() if name not in ("group_size", "before", "without")}
    operands = make_operands(**kind, device=device)
    return errors_of(op, operands, without=case.get("without"), **options_of(op, operands, case))


def run_toy_case(largest: int = 8192, programs: int = 4224, **case: Any) -> dict[str, float]:
    """One entry of TOY_CASES, with tiles small enough to have several of everything."""
    forward = importlib.import_module(PACKAGE + "triton_forward")
    backward = importlib.import_module(PACKAGE + "triton_backward")
    forward.FORWARD = backward.SHORT = backward.LONG = forward.Tuning(tile=32, per_warp=32, loop_block=8, loop_warps=1)
    forward.LARGEST_BLOCK, backward.BACKWARD_WARPS = largest, programs
    return errors_of_case(**case)


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    return errors_under_interpreter(__name__)


@pytest.mark.parametrize("case", list(TOY_CASES))
def test_kernels_under_the_interpreter(toy_errors: Errors, case: str) -> None:
    tolerance = TOLERANCES[TOY_CASES[case].get("dtype", FP32)]
    wrong = {name: error for name, error in toy_errors[case].items() if not error <= tolerance}
    assert not wrong


def assert_within_tolerance(errors: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}
    assert not wrong


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
OPS = ["rms_norm", "add_rms_norm", "rms_norm_gated"]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("op", OPS)
def test_rows_on_gpu(op: str, dtype: torch.dtype) -> None:
    for rows in (0, 1, 2, 3, 63, 64, 65, 257, 2000, 65536):
        assert_within_tolerance(errors_of_case("cuda", op=op, shape=(rows, 100), dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [16, 768, 2560, 5120, 10240])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [("rms_norm", FP16), ("add_rms_norm", FP32), ("rms_norm_gated", BF16)],
    ids=["rms_norm-fp16", "add_rms_norm-fp32", "rms_norm_gated-bf16"],
)
def test_widths_on_gpu(op: str, dtype: torch.dtype, width: int) -> None:
    for rows in (1, 131):
        assert_within_tolerance(errors_of_case("cuda", op=op, shape=(rows, width), dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "case",
    [
        {"weight": False},
        {"weight_dtype": BF16},
        {"weight_dtype": FP16},
        {"op": "add_rms_norm", "residual_dtype": FP32},
        {"op": "add_rms_norm", "residual_dtype": FP32, "residual": False},
        {"op": "add_rms_norm", "dtype": FP32, "residual_dtype": BF16},
        {"op": "rms_norm_gated", "group_size": 16},
        {"op": "rms_norm_gated", "group_size": 32, "before": True},
        {"op": "rms_norm_gated", "group_size": 32, "gate": False},
        {"op": "rms_norm_gated", "before": True, "weight": False, "shape": (3, 40, 10240)},
    ],
    ids=lambda case: "-".join(str(value).removeprefix("torch.") for value in case.values()),
)
def test_options_on_gpu(case: dict[str, Any]) -> None:
    # a residual in bf16 under x in fp32 rounds the sum
    dtype = case.get("residual_dtype", BF16) if case.get("dtype") == FP32 else BF16
    assert_within_tolerance(errors_of_case("cuda", **{"shape": (3, 40, 96), "dtype": BF16} | case), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", OPS)
def test_strided_operands_on_gpu(op: str) -> None:
    for shape in ((257, 96), (3, 40, 96)):
        assert_within_tolerance(errors_of_case("cuda", op=op, shape=shape, strided=True), FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_same_bits_every_time_on_gpu(op: str) -> None:
    operands = make_operands((5000, 768), op, BF16, device="cuda")
    options = options_of(op, operands, {})
    weights = [torch.randn(5000, 768, device="cuda") for _ in range(2)]
    first = differentiate(op, operands, weights, False, **options)
    for _ in range(9):
        again = differentiate(op, operands, weights, False, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_breaks_on_gpu(op: str) -> None:
    operands = make_operands((70, 96), op, device="cuda")
    options = options_of(op, operands, {})
    leaves = {name: value.requires_grad_() for name, value in operands.items() if value is not None}

    public = getattr(mamba_kernels, op)

    def run(leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        result = public(**leaves, eps=EPS, **options)
        return result if isinstance(result, tuple) else (result,)

    results = []
    for fn in (run, torch.compile(run, fullgraph=True)):
        outputs = fn(leaves)
        weights = [torch.ones_like(output) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), weights)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_second_derivative_is_refused_on_gpu() -> None:
    x = torch.randn(4, 96, device="cuda", requires_grad=True)
    (y,) = call("rms_norm", {"x": x, "weight": None}, False)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.xdist_group("much-memory")
@pytest.mark.parametrize("op", OPS)
def test_more_than_two_to_the_31_elements_on_gpu(op: str) -> None:
    width = 768
    rows = (1 << 31) // width + 1000
    operands = make_operands((20, width), op, BF16, device="cuda")
    options = options_of(op, operands, {})
    weight = torch.randn(20, width, device="cuda").to(BF16)

    def spread(value: Tensor) -> Tensor:
        """Ten rows at either end, zeros between, which add nothing to the gradient of the weight."""
        long = value.new_zeros(rows, width)
        long[:10], long[-10:] = value[:10], value[10:]
        return long

    long = {
        name: value if name == "weight" else spread(value) for name, value in operands.items() if value is not None
    }
    expected = differentiate(op, operands, [weight, weight], False, **options)
    actual = differentiate(op, dict(long), [spread(weight)] * 2, False, **options)
    for name, want in expected.items():
        have = actual.pop(name)
        if name != "gradient of weight":
            have = torch.cat([have[:10], have[-10:]])
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


if __name__ == "__main__":
    print_errors(run_toy_case, TOY_CASES)
