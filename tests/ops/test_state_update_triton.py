"""The Triton state updates against the fp64 oracles and the parallel ops.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_kernels

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors

pytest.importorskip("triton")

PACKAGE = "mamba_kernels.state_update."
SELECTIVE, SSD = "selective_state_update", "ssd_state_update"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = [4, -1, 0]

# id: what differs from a call of three entries with one token, D, z and dt_bias
TOY_CASES: dict[str, dict[str, Any]] = {
    "selective": {},
    "selective-tokens": {"tokens": 3, "size": 5},
    "selective-one-token-of-many": {"tokens": 1},
    "selective-bare": {"bare": True, "softplus": False, "tokens": 2},
    "selective-groups-of-odd-width": {"groups": 4, "tokens": 2},
    "selective-one-group": {"groups": 1},
    "selective-rows": {"rows": ROWS, "tokens": 2, "steps": True},
    "selective-steps-of-one-token": {"rows": ROWS, "steps": True, "strided": True},
    "selective-fp16-state": {"state_dtype": FP16},
    "selective-strided": {"strided": True, "tokens": 2, "groups": 2},
    "ssd": {"op": SSD},
    "ssd-tokens": {"op": SSD, "tokens": 3, "groups": 2},
    "ssd-one-token-of-many": {"op": SSD, "tokens": 1},
    "ssd-bare": {"op": SSD, "bare": True, "softplus": False, "tokens": 2},
    "ssd-rows": {"op": SSD, "rows": ROWS, "tokens": 2, "steps": True, "groups": 4},
    "ssd-steps-of-one-token": {"op": SSD, "rows": ROWS, "steps": True, "strided": True},
    "ssd-limits-and-skip-per-channel": {"op": SSD, "limit": (0.3, 0.9), "per_channel": True},
    "ssd-limits-without-softplus": {"op": SSD, "limit": (0.3, 0.9), "softplus": False, "bare": True},
    "ssd-fp16-state": {"op": SSD, "state_dtype": FP16},
    "ssd-strided": {"op": SSD, "strided": True, "tokens": 2, "groups": 2},
}


def make_operands(
    op: str = SELECTIVE,
    batch: int = 3,
    tokens: int | None = None,
    channels: int = 12,
    size: int = 6,
    heads: int = 4,
    head_dim: int = 5,
    groups: int | None = None,
    dtype: torch.dtype = FP32,
    state_dtype: torch.dtype = FP32,
    bare: bool = False,
    softplus: bool = True,
    per_channel: bool = False,
    rows: list[int] | None = None,
    strided: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Random operands of one call; those of `strided` are views with gaps, the state with its states far apart."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if strided:
            return torch.randn(*shape[:-1], 2 * shape[-1] + 1, device=device).to(dtype)[..., 1::2][..., : shape[-1]]
        return torch.randn(*shape, device=device).to(dtype)

    lead = (batch,) if tokens is None else (batch, tokens)
    ssd = op == SSD
    width = (heads, head_dim) if ssd else (channels,)
    per_step = (heads,) if ssd else width
    if ssd and groups is None:
        groups = 1
    projection = (size,) if groups is None else (groups, size)
    saved = batch if rows is None else max(rows) + 2
    state = torch.randn(saved, *width, size, device=device).to(state_dtype)
    dt = normal(*lead, *per_step)
    operands = {
        "state": state.transpose(-1, -2).contiguous().transpose(-1, -2) if strided else state,
        "x": normal(*lead, *width),
        "dt": dt if softplus else dt.abs() * 0.5,
        "A": -torch.rand(*((heads,) if ssd else (channels, size)), device=device) * 3,
        "B": normal(*lead, *projection),
        "C": normal(*lead, *projection),
    }
    if not bare:
        operands["D"] = normal(*(width if per_channel or not ssd else per_step), dtype=FP32)
        operands["z"] = normal(*lead, *width)
        operands["dt_bias"] = normal(*per_step, dtype=FP32)
    if rows is not None:
        indices = torch.tensor(rows, device=device, dtype=torch.int32)
        operands["state_indices"] = indices.repeat_interleave(2)[::2] if strided else indices
    return operands


def triton_op(op: str) -> Callable[..., Any]:
    """The launcher of an op."""
    module = importlib.import_module(PACKAGE + ("triton_ssd" if op == SSD else "triton_selective"))
    return getattr(module, f"{op}_triton")


def oracle_of(op: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(PACKAGE + "reference"), f"{op}_ref")


def errors_of(op: str, operands: dict[str, Tensor], **options: Any) -> dict[str, float]:
    """RMS-relative error of every output and of the state left behind; infinite where something is not finite."""
    ours = operands | {"state": operands["state"].clone()}
    theirs = {name: value.double() if value.is_floating_point() else value for name, value in operands.items()}
    theirs["state"] = operands["state"].double().clone()
    found, expected = triton_op(op)(**ours, **options), oracle_of(op)(**theirs, **options)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    pairs = {"y": (found[0], expected[0]), "state": (ours["state"], theirs["state"])}
    assert found[0].dtype == operands["x"].dtype
    if len(found) > 1:
        assert found[1].dtype == operands["state"].dtype
        pairs["step states"] = (found[1], expected[1])
    errors = {}
    for name, (have, want) in pairs.items():
        assert have.shape == want.shape, name
        error = (have.double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30)
        errors[name] = float(error) if error == error else float("inf")
        # padding is exactly 0, and rows that nobody named keep their bits
        if name != "state" and "state_indices" in operands:
            errors[f"{name} of padding"] = float(have[operands["state_indices"] < 0].abs().sum())
    if "state_indices" in operands:
        others = [row for row in range(len(ours["state"])) if row not in operands["state_indices"].tolist()]
        errors["other rows"] = float((ours["state"][others] != operands["state"][others]).sum())
    return errors


def errors_of_case(
    device: str = "cpu", limit: tuple[float, float] | None = None, steps: bool = False, **case: Any
) -> dict[str, float]:
    """The errors of one call described as in TOY_CASES."""
    options: dict[str, Any] = {"return_step_states": steps, "dt_softplus": case.get("softplus", True)}
    if limit is not None:
        options["dt_limit"] = limit
    return errors_of(case.get("op", SELECTIVE), make_operands(**case, device=device), **options)


def run_toy_case(**case: Any) -> dict[str, float]:
    """One entry of TOY_CASES, with tiles small enough to have several of them."""
    for module in ("triton_selective", "triton_ssd"):
        importlib.import_module(PACKAGE + module).TILE = 32
    return errors_of_case(**case)


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    return errors_under_interpreter(__name__)


def assert_within_tolerance(
    errors: dict[str, float], dtype: torch.dtype = FP32, state_dtype: torch.dtype = FP32
) -> None:
    limits = {"y": TOLERANCES[dtype], "state": TOLERANCES[state_dtype], "step states": TOLERANCES[state_dtype]}
    wrong = {name: error for name, error in errors.items() if not error <= limits.get(name, 0.0)}
    assert not wrong


@pytest.mark.parametrize("case", list(TOY_CASES))
def test_kernels_under_the_interpreter(toy_errors: Errors, case: str) -> None:
    assert_within_tolerance(toy_errors[case], state_dtype=TOY_CASES[case].get("state_dtype", FP32))


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
OPS = pytest.mark.parametrize("op", [SELECTIVE, SSD])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@OPS
def test_tokens_and_batches_on_gpu(op: str, dtype: torch.dtype) -> None:
    for batch, tokens in ((1, None), (8, None), (33, None), (3, 1), (2, 2), (3, 4), (1, 8), (2, 11)):
        errors = errors_of_case("cuda", op=op, batch=batch, tokens=tokens, groups=2, dtype=dtype)
        assert_within_tolerance(errors, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 5120, "size": 16},
        {"channels": 33, "size": 5},
        {"channels": 100, "size": 24, "groups": 4},
        {"channels": 96, "size": 64, "groups": 2},
        {"channels": 64, "size": 256},
        {"channels": 1, "size": 1},
        {"op": SSD, "heads": 80, "head_dim": 64, "size": 128},
        {"op": SSD, "heads": 24, "head_dim": 64, "size": 128, "groups": 8},
        {"op": SSD, "heads": 8, "head_dim": 16, "size": 16, "groups": 8},
        {"op": SSD, "heads": 3, "head_dim": 80, "size": 100},
        {"op": SSD, "heads": 2, "head_dim": 256, "size": 256},
        {"op": SSD, "heads": 4, "head_dim": 33, "size": 17, "groups": 2},
        {"op": SSD, "heads": 1, "head_dim": 1, "size": 1},
    ],
    ids=lambda shape: "-".join(str(value) for value in shape.values()),
)
def test_shapes_on_gpu(shape: dict[str, Any]) -> None:
    assert_within_tolerance(errors_of_case("cuda", dtype=BF16, **shape), BF16)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [name for name in TOY_CASES if name not in ("selective", "ssd")])
def test_options_on_gpu(case: str) -> None:
    assert_within_tolerance(errors_of_case("cuda", **TOY_CASES[case]), FP32, TOY_CASES[case].get("state_dtype", FP32))


@pytest.mark.gpu
@OPS
@pytest.mark.parametrize("dt", [-20.0, 20.0])
def test_extreme_steps_on_gpu(op: str, dt: float) -> None:
    operands = make_operands(op, tokens=4, groups=2, device="cuda")
    operands["dt"] = torch.full_like(operands["dt"], dt)
    del operands["dt_bias"]
    assert_within_tolerance(errors_of(op, operands))


@pytest.mark.gpu
@OPS
def test_a_nan_step_is_not_hidden_on_gpu(op: str) -> None:
    operands = make_operands(op, groups=2, device="cuda")
    operands["dt"][1, 0] = float("nan")
    y = triton_op(op)(**operands)
    assert y[1].isnan().any() and not y[[0, 2]].isnan().any()


@pytest.mark.gpu
def test_steps_equal_the_selective_scan_on_gpu() -> None:
    scan = importlib.import_module("mamba_kernels.selective_scan").selective_scan
    operands = make_operands(SELECTIVE, tokens=11, channels=96, size=16, device="cuda")
    state = operands.pop("state")
    y, final = scan(**operands, initial_states=state, return_final_states=True)
    assert_steps_match(SELECTIVE, operands, state, y, final)


@pytest.mark.gpu
def test_steps_equal_the_chunk_scan_on_gpu() -> None:
    scan = importlib.import_module("mamba_kernels.ssd").ssd_chunk_scan
    operands = make_operands(SSD, tokens=11, head_dim=16, size=32, groups=2, device="cuda")
    state = operands.pop("state")
    y, final = scan(**operands, chunk_size=16, dt_limit=(0.1, 2.0), initial_states=state, return_final_states=True)
    assert_steps_match(SSD, operands, state, y, final, dt_limit=(0.1, 2.0))


def assert_steps_match(
    op: str, operands: dict[str, Tensor], state: Tensor, y: Tensor, final: Tensor, **options: Any
) -> None:
    """Eleven tokens in pieces of 1, 4 and 6, a single token without a time dimension among them."""
    outputs = []
    for start, end in ((0, 1), (1, 5), (5, 11)):
        part = {
            name: value[:, start] if end - start == 1 else value[:, start:end]
            for name, value in operands.items()
            if name in ("x", "dt", "B", "C", "z")
        }
        piece = triton_op(op)(state, **(operands | part), **options)
        outputs.append(piece[:, None] if end - start == 1 else piece)
    torch.testing.assert_close(torch.cat(outputs, dim=1), y, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(state, final, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@OPS
def test_same_bits_every_time_on_gpu(op: str) -> None:
    operands = make_operands(op, batch=64, tokens=4, channels=5120, size=16, heads=80, head_dim=64, device="cuda")
    results = []
    for _ in range(10):
        state = operands["state"].clone()
        results.append((triton_op(op)(**(operands | {"state": state})), state))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.gpu
@OPS
def test_cuda_graph_on_gpu(op: str) -> None:
    operands = make_operands(op, rows=ROWS, groups=2, device="cuda")
    start = operands["state"].clone()
    expected = triton_op(op)(**operands)
    after_one = operands["state"].clone()
    operands["state"].copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_op(op)(**operands)
    for _ in range(2):
        operands["state"].copy_(start)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)
        assert torch.equal(operands["state"], after_one)


@pytest.mark.gpu
@OPS
def test_compiles_without_graph_breaks_on_gpu(op: str) -> None:
    operands = make_operands(op, groups=2, device="cuda")
    state = operands.pop("state")
    other = state.clone()
    expected = triton_op(op)(state, **operands)
    actual = torch.compile(getattr(mamba_kernels, op), fullgraph=True)(other, **operands)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, state, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.xdist_group("much-memory")
@OPS
def test_more_than_two_to_the_31_elements_on_gpu(op: str) -> None:
    operands = make_operands(
        op, batch=2, channels=5120, size=16, heads=80, head_dim=16, state_dtype=BF16, device="cuda"
    )
    small = operands["state"].clone()
    rows = (1 << 31) // small[0].numel() + 10
    state = small.new_zeros(rows, *small.shape[1:])
    state[0], state[-1] = small[0], small[1]
    operands["state_indices"] = torch.tensor([0, rows - 1], device="cuda")
    actual = triton_op(op)(**(operands | {"state": state}))
    del operands["state_indices"]
    expected = triton_op(op)(**(operands | {"state": small}))
    assert torch.equal(actual, expected)
    assert torch.equal(state[[0, -1]], small)
    assert not state[1:-1].any()


@pytest.mark.gpu
@OPS
def test_more_programs_than_a_second_grid_axis_has_on_gpu(op: str) -> None:
    operands = make_operands(op, batch=70000, channels=32, heads=2, head_dim=16, size=16, device="cuda")
    ends = torch.tensor([0, 1, 69998, 69999], device="cuda")
    picked = {name: value if name in ("A", "D", "dt_bias") else value[ends] for name, value in operands.items()}
    y = triton_op(op)(**operands)
    assert torch.equal(y[ends], triton_op(op)(**picked))
    assert torch.equal(operands["state"][ends], picked["state"])


if __name__ == "__main__":
    print_errors(run_toy_case, TOY_CASES)
