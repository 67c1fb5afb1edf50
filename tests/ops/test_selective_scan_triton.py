"""The Triton selective scan against the fp64 oracle.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import selective_scan

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors
from .oracle import differentiate, errors_at_both_ends, relative_error

pytest.importorskip("triton")

PACKAGE = "mamba_kernels.selective_scan."
OPERANDS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")

# id: what differs from a plain call; `channels` and `tile` of a program, `chunk` and `split` shape the launch
TOY_CASES: dict[str, dict[str, Any]] = {
    "one-token": {"length": 1, "initial": True},
    "cut-in-chunks": {"initial": True},
    "whole-sequences": {"split": False, "initial": True},
    "states-parked-in-memory": {"registers": 2, "initial": True},
    "groups": {"groups": 2, "width": 4, "channels": 2},
    "bare": {"bare": True, "size": 3},
    "no-softplus": {"softplus": False},
    "seq-idx": {"seq_idx": [[0, 0, -1, 1, 1, 1, -1, 1, 2], [-1, 3, 3, 3, 3, 4, 4, -1, -1]], "initial": True},
    "cu-seqlens": {"batch": 1, "cu_seqlens": [0, 0, 2, 8, 9], "initial": True},
    "strided-and-little-workspace": {"strided": True, "workspace": 1},
    "no-gradient-of-y": {"length": 5, "without": "y"},
    "no-gradient-of-states": {"length": 5, "without": "final_states"},
    "whole-tiles": {"length": 8, "width": 4, "initial": True},
    "whole-tiles-whole-sequences": {"length": 8, "width": 4, "split": False},
    "sums-by-products": {
        "dtype": torch.float16,
        "batch": 1,
        "length": 24,
        "width": 34,
        "channels": 32,
        "tile": 8,
        "chunk": 16,
    },
    "fp16-words": {"dtype": torch.float16, "length": 5},
    "wavefront": {
        "wavefront": (2, 4),
        "batch": 1,
        "length": 13,
        "width": 33,
        "channels": 64,
        "chunk": 8,
        "initial": True,
    },
    "wavefront-of-four": {"wavefront": (4, 2), "length": 11, "groups": 2, "width": 4},
    "wavefront-bare": {"wavefront": (2, 2), "size": 2, "length": 6, "width": 40, "channels": 64, "bare": True},
    "wavefront-of-six": {"wavefront": (2, 4), "batch": 1, "size": 12, "dtype": torch.float16},
    "wavefront-of-words": {"wavefront": (2, 4), "size": 8, "length": 9, "dtype": torch.float16},
    "wavefront-without-softplus": {"wavefront": (2, 2), "softplus": False},
}


def triton_op() -> Any:
    return importlib.import_module(PACKAGE + "triton_scan").selective_scan_triton


def make_operands(
    batch: int,
    length: int,
    width: int,
    size: int,
    groups: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sequences: int | None = None,
    initial: bool = False,
    bare: bool = False,
    strided: bool = False,
    softplus: bool = True,
) -> dict[str, Tensor | None]:
    """Random operands of one call; those of `strided` are views with gaps, dt with its channels far apart."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def tokens() -> Tensor:
        if strided:
            return normal(batch, length, 2 * width + 1)[:, :, 1 : width + 1].to(dtype)
        return normal(batch, length, width).to(dtype)

    projection = (batch, length, size) if groups is None else (batch, length, groups, size)
    dt = normal(batch, width, length).to(dtype).transpose(1, 2) if strided else tokens()
    return {
        "x": tokens(),
        "dt": dt if softplus else dt.abs() * 0.3,
        "A": -2 * torch.rand(width, size, device=device),
        "B": normal(*projection).to(dtype),
        "C": normal(*projection).to(dtype),
        "D": None if bare else normal(width),
        "z": None if bare else tokens(),
        "dt_bias": None if bare or not softplus else normal(width),
        "initial_states": normal(sequences or batch, width, size) if initial else None,
    }


def errors_of(operands: dict[str, Tensor | None], without: str | None = None, **options: Any) -> dict[str, float]:
    """RMS-relative error of every output, with and without gradients, and of every gradient; infinite where something is not finite.

    The oracle runs on the CPU, where its many small steps are as fast as on a GPU that others use as well. For no tokens and
    for more than 65 it is the vectorised scan in fp64, itself tested against the reference.
    """
    x, A = operands["x"], operands["A"]
    assert x is not None and A is not None
    module, suffix = ("reference", "ref") if 0 < x.shape[1] < 66 else ("eager", "eager")
    oracle = getattr(importlib.import_module(PACKAGE + module), f"selective_scan_{suffix}")
    sequences = x.shape[0] if options.get("cu_seqlens") is None else options["cu_seqlens"].shape[0] - 1
    weights = (torch.randn_like(x), torch.randn(sequences, *A.shape, device=x.device))
    actual = differentiate(triton_op(), operands, weights, without, **options)
    with torch.no_grad():
        # without gradients it may be another kernel
        alone = triton_op()(**operands, **options, return_final_states=True)
    double = {name: None if value is None else value.double().cpu() for name, value in operands.items()}
    options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    expected = differentiate(oracle, double, weights, without, **options)
    errors = {name: relative_error(actual[name], want) for name, want in expected.items()}
    for name, value in zip(("y", "final_states"), alone, strict=True):
        errors[f"{name}, no gradients"] = relative_error(value, expected[name])
    return errors


def run_toy_case(
    batch: int = 2,
    length: int = 9,
    width: int = 3,
    size: int = 4,
    groups: int | None = None,
    channels: int = 4,
    tile: int = 2,
    chunk: int = 4,
    split: bool = True,
    registers: int = 16,
    workspace: int = 1 << 20,
    wavefront: tuple[int, int] | None = None,
    softplus: bool = True,
    seq_idx: list[list[int]] | None = None,
    cu_seqlens: list[int] | None = None,
    without: str | None = None,
    **kind: Any,
) -> dict[str, float]:
    """One entry of TOY_CASES, with programs small enough to have several of everything."""
    forward = importlib.import_module(PACKAGE + "triton_forward")
    backward = importlib.import_module(PACKAGE + "triton_backward")
    chain = importlib.import_module(PACKAGE + "triton_chain")
    tuning = forward.Tuning(channels=channels, tile=tile)
    forward.FORWARD = chain.CHUNK_STATES = backward.BACKWARD = backward.SWEEP = backward.GRADIENT_SWEEP = tuning
    forward.LARGEST_TILE = tile
    forward.SHORTEST_CHUNK = forward.LONGEST_CHUNK = chunk
    forward.UNSPLIT_PROGRAMS = forward.UNSPLIT_SHORT = 1 << 30 if split else 0
    forward.MOST_WAVEFRONTS = 0
    if wavefront is not None:
        forward.SHORT, forward.FEWEST_WAVEFRONTS, forward.MOST_WAVEFRONTS = 0, 0, 1 << 30
        forward.WAVEFRONT = type(forward.WAVEFRONT)(*wavefront)
    forward.FORWARD_REGISTER_STATES = registers
    backward.WORKSPACE_BYTES = workspace
    options: dict[str, Any] = {"dt_softplus": softplus, "without": without}
    sequences = batch
    if seq_idx is not None:
        options["seq_idx"] = torch.tensor(seq_idx)
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        sequences = len(cu_seqlens) - 1
    operands = make_operands(batch, length, width, size, groups=groups, sequences=sequences, softplus=softplus, **kind)
    return errors_of(operands, **options)


@pytest.mark.parametrize(
    ("batch", "length", "width", "chunk", "split", "wavefront"),
    [
        (1, 8, 1536, 16, False, False),
        (1, 128, 1536, 16, True, False),
        (1, 2048, 1536, 64, True, False),
        (1, 65536, 1536, 512, True, False),
        (1, 2048, 5120, 128, True, False),
        (4, 128, 5120, 32, False, False),
        (8, 2048, 1024, 128, True, False),
        (8, 2048, 1536, 128, True, True),
        (8, 2048, 2048, 256, True, True),
        (64, 2048, 5120, 1024, False, False),
    ],
)
def test_how_time_is_cut(batch: int, length: int, width: int, chunk: int, split: bool, wavefront: bool) -> None:
    scan, forward = (importlib.import_module(PACKAGE + name) for name in ("triton_scan", "triton_forward"))
    x, B = (torch.empty(batch, length, size, dtype=torch.bfloat16, device="meta") for size in (width, 16))
    A = torch.empty(width, 16, device="meta")
    plan = forward.plan_of(scan._inputs(x, x, A, B, B, None, x, None, None, None, None, True))
    assert (plan.chunk, plan.split, plan.wavefront) == (chunk, split, wavefront)
    packed = forward.plan_of(
        scan._inputs(x, x, A, B, B, None, x, None, None, torch.empty(0, device="meta"), None, True)
    )
    assert not packed.wavefront


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    return errors_under_interpreter(__name__)


@pytest.mark.parametrize("case", list(TOY_CASES))
def test_kernels_under_the_interpreter(toy_errors: Errors, case: str) -> None:
    tolerance = TOLERANCES[TOY_CASES[case].get("dtype", torch.float32)]
    wrong = {name: error for name, error in toy_errors[case].items() if not error <= tolerance}
    assert not wrong


def assert_within_tolerance(errors: dict[str, float], dtype: torch.dtype) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}
    assert not wrong


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("length", [0, 1, 2, 3, 63, 64, 65, 257, 2000, 8192, 65536])
def test_lengths_on_gpu(length: int, dtype: torch.dtype) -> None:
    batch, width = (2, 80) if length < 8192 else (1, 24)
    operands = make_operands(batch, length, width, 16, dtype=dtype, device="cuda", initial=True)
    assert_within_tolerance(errors_of(operands), dtype)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        {"bare": True},
        {"groups": 4},
        {"strided": True, "initial": True},
        {"size": 1},
        {"size": 5},
        {"size": 24, "initial": True},
        {"size": 256, "length": 70},
        {"batch": 8, "width": 2048, "length": 70, "initial": True},
        {"batch": 64, "width": 33, "length": 100},
        {"batch": 6, "width": 2040, "length": 333, "initial": True},
        {"batch": 4, "width": 3072, "length": 144, "groups": 2, "bare": True},
    ],
    ids=[
        "bare",
        "groups",
        "strided",
        "N1",
        "N5",
        "N24",
        "N256",
        "whole-sequences",
        "batch-64",
        "wavefront",
        "wavefront-groups",
    ],
)
def test_shapes_on_gpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = {"batch": 2, "length": 257, "width": 80, "size": 16} | shape
    assert_within_tolerance(errors_of(make_operands(**sizes, dtype=dtype, device="cuda")), dtype)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_on_gpu(packing: str, dtype: torch.dtype) -> None:
    if packing == "seq_idx":
        seq_idx = torch.randint(0, 40, (3, 300), device="cuda").eq(0).cumsum(1)
        options = {"seq_idx": torch.where(torch.rand(3, 300, device="cuda") < 0.1, -1, seq_idx)}
        operands = make_operands(3, 300, 80, 16, dtype=dtype, device="cuda", initial=True)
    else:
        bounds = [0, 64, 64, 65, 300, 556, 700, 700]
        options = {"cu_seqlens": torch.tensor(bounds, device="cuda", dtype=torch.int32)}
        operands = make_operands(1, 700, 80, 16, dtype=dtype, device="cuda", initial=True, sequences=len(bounds) - 1)
    assert_within_tolerance(errors_of(operands, **options), dtype)


@pytest.mark.gpu
def test_padding_may_hold_nan_on_gpu() -> None:
    operands = make_operands(2, 100, 64, 16, device="cuda")
    seq_idx = torch.zeros(2, 100, dtype=torch.int32, device="cuda")
    seq_idx[:, 40:45] = -1
    expected = triton_op()(**operands, seq_idx=seq_idx)
    for name in ("x", "dt", "B", "C", "z"):
        operands[name][:, 40:45] = float("nan")
    assert torch.equal(triton_op()(**operands, seq_idx=seq_idx), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [20.0, 80.0], ids=["dt-20", "dt-80"])
def test_extreme_steps_on_gpu(scale: float) -> None:
    operands = make_operands(2, 257, 64, 16, device="cuda", initial=True)
    operands["dt"] = (torch.rand_like(operands["dt"]) * 2 - 1) * scale
    assert_within_tolerance(errors_of(operands), torch.float32)


@pytest.mark.gpu
def test_same_bits_every_time_on_gpu() -> None:
    operands = make_operands(4, 1000, 256, 16, dtype=torch.bfloat16, device="cuda", initial=True)
    weights = (torch.randn_like(operands["x"]), torch.randn(4, 256, 16, device="cuda"))
    first = differentiate(triton_op(), operands, weights, None)
    for _ in range(9):
        again = differentiate(triton_op(), operands, weights, None)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_compiles_without_graph_breaks_on_gpu() -> None:
    operands = make_operands(2, 300, 128, 16, device="cuda", initial=True)
    weights = (torch.randn_like(operands["x"]), torch.randn(2, 128, 16, device="cuda"))
    expected = differentiate(selective_scan, operands, weights, None)
    actual = differentiate(torch.compile(selective_scan, fullgraph=True), operands, weights, None)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.gpu
def test_cuda_graph_on_gpu() -> None:
    operands = make_operands(1, 300, 128, 16, device="cuda")
    expected = triton_op()(**operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_op()(**operands)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.xdist_group("much-memory")
def test_more_than_two_to_the_31_elements_on_gpu() -> None:
    operands = make_operands(1, 400, 512, 16, dtype=torch.bfloat16, device="cuda", bare=True)
    operands["A"] = operands["A"] - 1
    errors = errors_at_both_ends(triton_op(), operands, ("x", "dt", "B", "C"), (1 << 22) + 77)
    assert_within_tolerance(errors, torch.bfloat16)


@pytest.mark.gpu
def test_more_rows_than_a_second_grid_axis_has_on_gpu() -> None:
    operands = make_operands(70_000, 2, 16, 4, device="cuda", bare=True)
    ends = torch.tensor([0, 1, 69_998, 69_999], device="cuda")
    weights = (torch.randn_like(operands["x"]), torch.randn(70_000, 16, 4, device="cuda"))
    picked = {name: value if name == "A" or value is None else value[ends] for name, value in operands.items()}
    expected = differentiate(triton_op(), picked, (weights[0][ends], weights[1][ends]))
    actual = differentiate(triton_op(), operands, weights)
    for name, want in expected.items():
        if name != "gradient of A":
            torch.testing.assert_close(actual[name][ends], want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    print_errors(run_toy_case, TOY_CASES)
