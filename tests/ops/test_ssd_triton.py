"""The Triton SSD scan against the fp64 oracle.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import ssd_chunk_scan

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors
from .oracle import differentiate, errors_at_both_ends, relative_error

pytest.importorskip("triton")

PACKAGE = "mamba_kernels.ssd."
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# id: what differs from a call of two rows of 21 tokens with everything there is; blocks have 16 tokens
TOY_CASES: dict[str, dict[str, Any]] = {
    "two-blocks": {},
    "bare": {"bare": True},
    "one-token": {"length": 1},
    "exactly-one-block": {"length": 16},
    "groups-and-parts": {"heads": 4, "groups": 2, "programs": 64},
    "one-part-a-group": {"heads": 3, "programs": 1},
    "segments": {"batch": 1, "length": 53, "split": True},
    "segments-without-states": {"batch": 1, "length": 53, "split": True, "bare": True},
    "several-blocks-of-channels": {"head_dim": 20, "channels": 16, "per_channel": True},
    "states-in-parts": {"size": 20, "states": 16},
    "seq-idx": {"seq_idx": True, "length": 37},
    "seq-idx-and-segments": {"seq_idx": True, "batch": 1, "length": 53, "split": True},
    "cu-seqlens": {"batch": 1, "length": 45, "cu_seqlens": [0, 0, 16, 23, 45, 45]},
    "cu-seqlens-and-segments": {"batch": 1, "length": 61, "cu_seqlens": [0, 0, 16, 61], "split": True},
    "limits": {"limit": (0.3, 0.9)},
    "no-softplus": {"softplus": False},
    "strided": {"strided": True},
    "heads-in-turns": {"heads": 3, "workspace": 1},
    "no-gradient-of-y": {"without": "y"},
    "no-gradient-of-states": {"without": "final_states"},
    "large-steps": {"scale": 20.0},
    "fp16": {"dtype": FP16, "heads": 3},
    "fp16-bare-and-segments": {"dtype": FP16, "batch": 1, "length": 53, "split": True, "bare": True},
    "fp16-states-in-parts": {"dtype": FP16, "size": 20, "states": 16},
    "fp16-with-16-bit-states": {"dtype": FP16, "heads": 3, "small": 0},
    "fp16-strided-and-per-channel": {"dtype": FP16, "strided": True, "per_channel": True},
    "fp16-in-fp32": {"dtype": FP16, "heads": 3, "guarded": True},
    "fp16-in-fp32-strided": {"dtype": FP16, "strided": True, "per_channel": True, "guarded": True},
    "fp16-guarded": {"dtype": FP16, "head_dim": 32, "size": 16, "channels": 32, "guarded": True},
    "fp16-bare-with-16-bit-states": {"dtype": FP16, "bare": True, "small": 0},
}


def make_operands(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    groups: int,
    size: int,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    sequences: int | None = None,
    bare: bool = False,
    per_channel: bool = False,
    strided: bool = False,
    softplus: bool = True,
    scale: float = 1.0,
) -> dict[str, Tensor | None]:
    """Random operands of one call; those of `strided` are views with gaps, and dt has its heads far apart."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def tokens(*shape: int) -> Tensor:
        if strided:
            return normal(batch, length, shape[0] + 1, 2 * shape[1] + 1).to(dtype)[:, :, 1:, 1 : shape[1] + 1]
        return normal(batch, length, *shape).to(dtype)

    dt = normal(batch, heads, length).to(dtype).transpose(1, 2) if strided else normal(batch, length, heads).to(dtype)
    return {
        "x": tokens(heads, head_dim),
        "dt": dt * scale if softplus else dt.abs() * 0.3,
        "A": -2 * torch.rand(heads, device=device),
        "B": tokens(groups, size),
        "C": tokens(groups, size),
        "D": None if bare else normal(heads, head_dim) if per_channel else normal(heads),
        "z": None if bare else tokens(heads, head_dim),
        "dt_bias": None if bare or not softplus else normal(heads),
        "initial_states": None if bare else normal(sequences or batch, heads, head_dim, size),
    }


def triton_op() -> Any:
    return importlib.import_module(PACKAGE + "triton_scan").ssd_chunk_scan_triton


def errors_of(
    operands: dict[str, Tensor | None], without: str | None = None, oracle: str = "reference", **options: Any
) -> dict[str, float]:
    """RMS-relative error of every output and gradient; infinite where something is not finite.

    `oracle` "eager" is the vectorised scan in fp64, itself tested against the reference: for lengths of thousands of tokens.
    """
    name = "ssd_chunk_scan_ref" if oracle == "reference" else "ssd_chunk_scan_eager"
    reference = getattr(importlib.import_module(PACKAGE + oracle), name)
    x, B = operands["x"], operands["B"]
    assert x is not None and B is not None
    cu_seqlens = options.get("cu_seqlens")
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = (torch.randn_like(x), torch.randn(sequences, *x.shape[2:], B.shape[3], device=x.device))
    actual = differentiate(triton_op(), operands, weights, without, **options)
    double = {name: None if value is None else value.double() for name, value in operands.items()}
    expected = differentiate(reference, double, weights, without, **options)
    return {name: relative_error(actual[name], want) for name, want in expected.items()}


def random_packing(batch: int, length: int, device: str = "cpu", often: int = 9) -> Tensor:
    """(B, L) sequence numbers that rise about every `often` tokens, one token in five padding."""
    numbers = torch.randint(0, often, (batch, length), device=device).eq(0).cumsum(1)
    return torch.where(torch.rand(batch, length, device=device) < 0.2, -1, numbers)


def run_toy_case(
    batch: int = 2,
    length: int = 21,
    heads: int = 2,
    head_dim: int = 5,
    groups: int = 1,
    size: int = 6,
    channels: int = 16,
    states: int = 128,
    programs: int = 264,
    split: bool = False,
    workspace: int = 1 << 30,
    small: int = 1 << 20,
    guarded: bool = False,
    softplus: bool = True,
    seq_idx: bool = False,
    cu_seqlens: list[int] | None = None,
    limit: tuple[float, float] | None = None,
    without: str | None = None,
    **kind: Any,
) -> dict[str, float]:
    """One entry of TOY_CASES, with blocks and programs small enough to have several of everything."""
    plan = importlib.import_module(PACKAGE + "triton_plan")
    projections = importlib.import_module(PACKAGE + "triton_projections")
    plan.block_of = lambda dtype, size: 16
    # the kernels themselves are right at any size
    scan, sizes = importlib.import_module(PACKAGE + "triton_scan"), importlib.import_module(PACKAGE + "sizes")
    scan.fits_16_bits = sizes.fits_16_bits if guarded else lambda *_: True
    scan.in_whole_rows = sizes.in_whole_rows if guarded else lambda *_: True
    plan.LARGEST_CHANNELS = plan.LARGEST_CHANNELS_FP32 = channels
    plan.FEW_HEADS, plan.FEW_ELEMENTS = 0, small
    inputs = importlib.import_module(PACKAGE + "triton_inputs")
    inputs.WHOLE, inputs.PART, inputs.PART_FP32 = states, 16, 16
    inputs.TARGET_PROGRAMS = 1
    importlib.import_module(PACKAGE + "triton_forward").PART_FP32 = 16
    plan.TARGET_PROGRAMS, plan.SHORTEST_SEGMENT = 1 << 20 if split else 0, 16
    plan.SHORTEST_SPLIT = 0
    projections.TARGET_PROGRAMS = programs
    projections.LARGEST_PART = projections.LARGEST_PART_FP32 = states
    importlib.import_module(PACKAGE + "triton_backward").WORKSPACE_BYTES = workspace
    options: dict[str, Any] = {"dt_softplus": softplus, "without": without}
    options["dt_limit"] = limit or ((0.0, math.inf) if softplus else (-math.inf, math.inf))
    sequences = batch
    if seq_idx:
        options["seq_idx"] = random_packing(batch, length)
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        sequences = len(cu_seqlens) - 1
    operands = make_operands(
        batch, length, heads, head_dim, groups, size, sequences=sequences, softplus=softplus, **kind
    )
    return errors_of(operands, **options)


@pytest.mark.parametrize(
    ("heads", "length", "segment", "n_segments"),
    [
        (24, 256, 256, 1),
        (24, 512, 128, 4),
        (24, 1024, 128, 8),
        (24, 2048, 192, 11),
        (80, 512, 192, 3),
        (264, 2048, 2048, 1),
    ],
)
def test_how_sequences_are_cut(heads: int, length: int, segment: int, n_segments: int) -> None:
    scan, plan = (importlib.import_module(PACKAGE + name) for name in ("triton_scan", "triton_plan"))
    x, B = (torch.empty(1, length, *size, dtype=torch.bfloat16, device="meta") for size in ((heads, 64), (1, 128)))
    A = torch.empty(heads, device="meta")
    cut = plan.plan_of(scan._operands(x, x[..., 0], A, B, B, None, None, None, None, None, None, True, None))
    assert (cut.segment, cut.n_segments, cut.split) == (segment, n_segments, n_segments > 1)


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    return errors_under_interpreter(__name__)


def assert_within_tolerance(errors: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}
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
    batch = 2 if length < 8192 else 1
    operands = make_operands(batch, length, 4, 64, 1, 128, dtype=dtype, device="cuda")
    oracle = "reference" if 0 < length < 66 else "eager"
    assert_within_tolerance(errors_of(operands, oracle=oracle), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("length", [1, 3, 65, 257])
def test_sums_that_cancel_on_gpu(length: int, dtype: torch.dtype) -> None:
    # gradients of a few numbers, sums over everything, may happen to be small; what 16 bits leave out shows there
    for seed in range(20):
        torch.manual_seed(seed)
        operands = make_operands(2, length, 4, 64, 1, 128, dtype=dtype, device="cuda", bare=seed % 2 == 1)
        errors = errors_of(operands, oracle="eager")
        assert errors["gradient of A"] <= TOLERANCES[dtype] / 10
        assert errors.get("gradient of dt_bias", 0.0) <= TOLERANCES[dtype] / 10
        assert_within_tolerance(errors, dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        {"bare": True},
        {"heads": 8, "groups": 4, "head_dim": 32, "size": 16},
        {"strided": True, "per_channel": True},
        {"head_dim": 40, "size": 24},
        {"head_dim": 16, "size": 32},
        # heads that begin at no multiple of 16 elements, without a gate
        {"head_dim": 24, "size": 16, "bare": True},
        {"head_dim": 40, "size": 24, "bare": True},
        {"head_dim": 120, "size": 16, "heads": 3, "bare": True},
        {"head_dim": 40, "size": 32, "heads": 24, "length": 1024, "bare": True},
        {"strided": True, "bare": True},
        {"head_dim": 128, "size": 256},
        {"head_dim": 256, "size": 17, "heads": 2},
        {"batch": 64, "length": 100, "bare": True},
    ],
    ids=[
        "bare",
        "groups",
        "strided",
        "P40-N24",
        "P16-N32",
        "P24-N16-bare",
        "P40-N24-bare",
        "P120-N16-bare",
        "P40-N32-bare",
        "strided-bare",
        "P128-N256",
        "P256-N17",
        "batch-64",
    ],
)
def test_shapes_on_gpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {"batch": 2, "length": 257, "heads": 4, "head_dim": 64, "groups": 1, "size": 128} | shape
    operands = make_operands(**sizes, dtype=dtype, device="cuda")
    assert_within_tolerance(errors_of(operands, oracle="eager"), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_on_gpu(packing: str, dtype: torch.dtype) -> None:
    if packing == "seq_idx":
        options = {"seq_idx": random_packing(3, 300, device="cuda", often=40)}
        operands = make_operands(3, 300, 4, 64, 1, 128, dtype=dtype, device="cuda")
    else:
        bounds = [0, 64, 64, 65, 300, 556, 700, 700]
        options = {"cu_seqlens": torch.tensor(bounds, device="cuda", dtype=torch.int32)}
        operands = make_operands(1, 700, 4, 64, 1, 128, dtype=dtype, device="cuda", sequences=len(bounds) - 1)
    assert_within_tolerance(errors_of(operands, oracle="eager", **options), dtype)


@pytest.mark.gpu
def test_long_packed_sequences_are_split_on_gpu() -> None:
    bounds = [0, 1500, 1501, 4000, 9000]
    options = {"cu_seqlens": torch.tensor(bounds, device="cuda", dtype=torch.int32)}
    operands = make_operands(1, 9000, 4, 64, 1, 128, device="cuda", sequences=4)
    assert_within_tolerance(errors_of(operands, oracle="eager", **options), FP32)


@pytest.mark.gpu
def test_padding_may_hold_nan_on_gpu() -> None:
    operands = make_operands(2, 200, 4, 64, 1, 128, device="cuda")
    seq_idx = torch.zeros(2, 200, dtype=torch.int32, device="cuda")
    seq_idx[:, 40:45] = -1
    expected = triton_op()(**operands, seq_idx=seq_idx)
    for name in ("x", "dt", "B", "C", "z"):
        operands[name][:, 40:45] = math.nan
    assert torch.equal(triton_op()(**operands, seq_idx=seq_idx), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [20.0, 80.0], ids=["dt-20", "dt-80"])
def test_extreme_steps_on_gpu(scale: float) -> None:
    operands = make_operands(2, 257, 4, 64, 1, 128, device="cuda")
    operands["dt"] = (torch.rand_like(operands["dt"]) * 2 - 1) * scale
    assert_within_tolerance(errors_of(operands, oracle="eager"), FP32)


@pytest.mark.gpu
def test_same_bits_every_time_on_gpu() -> None:
    operands = make_operands(2, 3000, 24, 64, 1, 128, dtype=BF16, device="cuda")
    weights = (torch.randn_like(operands["x"]), torch.randn(2, 24, 64, 128, device="cuda"))
    first = differentiate(triton_op(), operands, weights, None)
    for _ in range(9):
        again = differentiate(triton_op(), operands, weights, None)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_compiles_without_graph_breaks_on_gpu() -> None:
    operands = make_operands(2, 300, 4, 64, 1, 128, device="cuda")
    weights = (torch.randn_like(operands["x"]), torch.randn(2, 4, 64, 128, device="cuda"))
    expected = differentiate(ssd_chunk_scan, operands, weights, None)
    actual = differentiate(torch.compile(ssd_chunk_scan, fullgraph=True), operands, weights, None)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
def test_cuda_graph_on_gpu() -> None:
    operands = make_operands(1, 3000, 4, 64, 1, 128, device="cuda")
    expected = triton_op()(**operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_op()(**operands)
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_heads_in_turns_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module(PACKAGE + "triton_backward"), "WORKSPACE_BYTES", 1 << 20)
    operands = make_operands(2, 257, 6, 64, 2, 128, device="cuda", per_channel=True)
    assert_within_tolerance(errors_of(operands, oracle="eager"), FP32)


@pytest.mark.gpu
@pytest.mark.xdist_group("much-memory")
def test_more_than_two_to_the_31_elements_on_gpu() -> None:
    # (1, length, 8, 64): more than 2^31 elements, and with 64 tokens a block more than 65,535 blocks
    operands = make_operands(1, 400, 8, 64, 1, 16, dtype=BF16, device="cuda", bare=True)
    operands["A"] = operands["A"] - 1
    errors = errors_at_both_ends(triton_op(), operands, ("x", "dt", "B", "C"), (1 << 22) + 77)
    assert_within_tolerance(errors, BF16)


@pytest.mark.gpu
def test_more_rows_than_a_second_grid_axis_has_on_gpu() -> None:
    operands = make_operands(70_000, 2, 1, 16, 1, 16, device="cuda", bare=True)
    ends = torch.tensor([0, 1, 69_998, 69_999], device="cuda")
    weights = (torch.randn_like(operands["x"]), torch.randn(70_000, 1, 16, 16, device="cuda"))
    picked = {name: value if name == "A" or value is None else value[ends] for name, value in operands.items()}
    expected = differentiate(triton_op(), picked, (weights[0][ends], weights[1][ends]))
    actual = differentiate(triton_op(), operands, weights)
    for name, want in expected.items():
        if name != "gradient of A":
            torch.testing.assert_close(actual[name][ends], want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    print_errors(run_toy_case, TOY_CASES)
