"""A layer's ops as one function of its projection: in Triton against the ops one by one in fp64, and what it refuses.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import backend
from mamba_kernels.mixer import MixerSizes, add_norm_linear, interface, mamba2_inner, mamba_inner

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors
from .oracle import relative_error

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# id: what differs from a call of two rows of 21 tokens with everything there is; blocks have 16 tokens
TOY_CASES: dict[str, dict[str, Any]] = {
    "with-projection": {},
    "recomputed": {"recompute": True},
    "without-projection": {"width": None},
    "bare": {"bare": True},
    "one-token": {"length": 1},
    "groups-and-parts": {"heads": 4, "groups": 2, "programs": 64},
    "heads-in-turns": {"heads": 4, "workspace": 1},
    "seq-idx": {"packed": True, "length": 37, "recompute": True},
    "limits": {"limit": (0.3, 0.9)},
    "long-groups": {"head_dim": 12, "largest_block": 16},
    "frozen": {"frozen": ("norm_weight", "out_weight", "out_bias", "conv_weight")},
    "fp16": {"dtype": FP16, "recompute": True},
}


def make_operands(
    sizes: MixerSizes,
    batch: int,
    length: int,
    width: int | None,
    taps: int,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    bare: bool = False,
) -> dict[str, Tensor | None]:
    """Random operands of one call; those of `bare` lack what can be left out."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    inner, convolved, heads = sizes.widths
    return {
        "projected": normal(batch, length, sum(sizes.widths)).to(dtype),
        "conv_weight": normal(convolved, taps).to(dtype),
        "conv_bias": None if bare else normal(convolved).to(dtype),
        "A": -2 * torch.rand(heads, device=device),
        "D": None if bare else normal(heads),
        "dt_bias": None if bare else normal(heads),
        "norm_weight": normal(inner).to(dtype),
        "out_weight": None if width is None else (normal(width, inner) / inner**0.5).to(dtype),
        "out_bias": None if bare or width is None else normal(width).to(dtype),
    }


def gradients_of(
    name: str,
    operands: dict[str, Tensor | None],
    weights: Tensor,
    frozen: tuple[str, ...],
    op: Callable[..., Tensor] = mamba2_inner,
    **options: Any,
) -> dict[str, Tensor]:
    """The output and the gradient of every operand, with a backend."""
    leaves = {
        key: None if value is None else value.detach().clone().requires_grad_(key not in frozen)
        for key, value in operands.items()
    }
    with backend(name):
        y = op(**leaves, **options)
        y.backward(weights.to(y.dtype))
    found = {f"gradient of {key}": leaf.grad for key, leaf in leaves.items() if leaf is not None and key not in frozen}
    assert all(gradient is not None for gradient in found.values())
    return {"y": y.detach(), **found}


def errors_of(
    operands: dict[str, Tensor | None], sizes: MixerSizes, frozen: tuple[str, ...] = (), **options: Any
) -> dict[str, float]:
    """RMS-relative error of the output and of every gradient; infinite where something is not finite."""
    projected, out_weight = operands["projected"], operands["out_weight"]
    assert projected is not None
    last = sizes.widths[0] if out_weight is None else out_weight.shape[0]
    weights = torch.randn(*projected.shape[:2], last, device=projected.device)
    return errors_beside(operands, weights, frozen, sizes=sizes, **options)


def errors_beside(
    operands: dict[str, Tensor | None], weights: Tensor, frozen: tuple[str, ...], **options: Any
) -> dict[str, float]:
    """Errors against fp64. On a GPU in 16 bits, where what passes from op to op is rounded, against the kernels one by one."""
    actual = gradients_of("triton", operands, weights, frozen, **options)
    if weights.is_cuda and next(iter(operands.values())).dtype != FP32:  # type: ignore[union-attr]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interface, "mixers_are_fused", lambda *_, **__: False)
            expected = gradients_of("triton", operands, weights, frozen, **options)
    else:
        double = {name: None if value is None else value.double() for name, value in operands.items()}
        expected = gradients_of("eager", double, weights.double(), frozen, **options)
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
    state_size: int = 6,
    width: int | None = 7,
    taps: int = 4,
    programs: int = 264,
    workspace: int = 1 << 30,
    largest_block: int = 8192,
    limit: tuple[float, float] = (0.0, math.inf),
    packed: bool = False,
    recompute: bool = False,
    frozen: tuple[str, ...] = (),
    **kind: Any,
) -> dict[str, float]:
    """One entry of TOY_CASES, with blocks and programs small enough to have several of everything."""
    plan = importlib.import_module("mamba_kernels.ssd.triton_plan")
    plan.block_of = lambda dtype, size: 16
    interface.fits_16_bits = lambda *_: True
    importlib.import_module("mamba_kernels.ssd.triton_projections").TARGET_PROGRAMS = programs
    importlib.import_module("mamba_kernels.ssd.triton_backward").WORKSPACE_BYTES = workspace
    importlib.import_module("mamba_kernels.norm.triton_forward").LARGEST_BLOCK = largest_block
    group_size = heads * head_dim // groups
    sizes = MixerSizes(heads, head_dim, groups, state_size, 1e-5, group_size, dt_limit=limit)
    operands = make_operands(sizes, batch, length, width, taps, **kind)
    seq_idx = random_packing(batch, length) if packed else None
    return errors_of(operands, sizes, frozen, seq_idx=seq_idx, recompute=recompute)


@pytest.fixture(scope="module")
def toy_errors() -> Errors:
    pytest.importorskip("triton")
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
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"width": None, "bare": True},
        {"groups": 2, "heads": 6, "length": 65},
        # rows of the projection begin at odd numbers of elements
        {"heads": 3, "head_dim": 40, "state_size": 24},
        {"packed": True},
        {"heads": 24, "length": 2048, "batch": 2},
    ],
    ids=["with-projection", "bare", "groups", "P40-N24", "packed", "mamba2-130m"],
)
def test_gradients_on_gpu(case: dict[str, Any], recompute: bool, dtype: torch.dtype) -> None:
    kind = {"batch": 2, "length": 257, "heads": 4, "head_dim": 64, "groups": 1, "state_size": 128, "width": 96} | case
    packed, bare = kind.pop("packed", False), kind.pop("bare", False)
    batch, length, width = kind.pop("batch"), kind.pop("length"), kind.pop("width")
    sizes = MixerSizes(**kind, eps=1e-5, group_size=kind["heads"] * kind["head_dim"] // kind["groups"])
    operands = make_operands(sizes, batch, length, width, 4, dtype=dtype, device="cuda", bare=bare)
    seq_idx = random_packing(batch, length, device="cuda", often=40) if packed else None
    assert_within_tolerance(errors_of(operands, sizes, seq_idx=seq_idx, recompute=recompute), dtype)


def test_the_width_of_the_projection_is_checked() -> None:
    sizes = MixerSizes(2, 4, 1, 3, 1e-5, 8)
    with pytest.raises(ValueError, match="projected"):
        mamba2_inner(torch.randn(1, 2, 5), torch.randn(14, 4), None, -torch.rand(2), None, None, torch.ones(8), sizes)


def test_second_derivatives_are_refused() -> None:
    sizes = MixerSizes(2, 4, 1, 3, 1e-5, 8)
    projected = torch.randn(1, 3, sum(sizes.widths), requires_grad=True)
    y = mamba2_inner(projected, torch.randn(14, 4), None, -torch.rand(2), None, None, torch.ones(8), sizes)
    (gradient,) = torch.autograd.grad(y.sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        gradient.sum().backward()


def run_projection(
    dtype: torch.dtype = FP32,
    residual_dtype: torch.dtype | None = None,
    device: str = "cpu",
    width: int = 20,
    rows: int = 7,
    unused: str | None = None,
) -> dict[str, float]:
    """Errors of `add_norm_linear` in Triton against fp64; `residual_dtype` None leaves the residual out."""
    torch.manual_seed(1)
    values: dict[str, Tensor | None] = {
        "x": torch.randn(2, rows, width, device=device).to(dtype),
        "residual": None if residual_dtype is None else torch.randn(2, rows, width, device=device).to(residual_dtype),
        "norm_weight": torch.randn(width, device=device).to(dtype),
        "weight": (torch.randn(24, width, device=device) / width**0.5).to(dtype),
        "bias": torch.randn(24, device=device).to(dtype),
    }
    weights = [torch.randn(2, rows, 24, device=device), torch.randn(2, rows, width, device=device)]
    found = []
    for name, given in (
        ("triton", values),
        ("eager", {k: None if v is None else v.double() for k, v in values.items()}),
    ):
        leaves = {key: None if v is None else v.detach().clone().requires_grad_() for key, v in given.items()}
        # the residual stream may be wider than what is added to it
        stream = torch.float64 if name == "eager" else torch.float32
        with backend(name):
            outputs = add_norm_linear(**leaves, residual_dtype=stream)
        used = [(y, w.to(y.dtype)) for i, (y, w) in enumerate(zip(outputs, weights, strict=True)) if str(i) != unused]
        torch.autograd.backward([y for y, _ in used], [w for _, w in used])
        grads = {
            f"gradient of {k}": leaf.grad for k, leaf in leaves.items() if leaf is not None and leaf.grad is not None
        }
        found.append({"projected": outputs[0].detach(), "total": outputs[1].detach(), **grads})
    assert found[0].keys() == found[1].keys()
    return {name: relative_error(found[0][name], want) for name, want in found[1].items()}


def run_mamba(
    batch: int = 2,
    length: int = 9,
    width: int = 6,
    size: int = 4,
    rank: int = 2,
    model: int = 5,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    bare: bool = False,
    packed: bool = False,
    recompute: bool = False,
    frozen: tuple[str, ...] = (),
    chunk: int | None = 4,
) -> dict[str, float]:
    """Errors of `mamba_inner` in Triton against fp64; `chunk` makes programs small enough to have several of everything."""
    if chunk is not None:
        forward = importlib.import_module("mamba_kernels.selective_scan.triton_forward")
        backward = importlib.import_module("mamba_kernels.selective_scan.triton_backward")
        chain = importlib.import_module("mamba_kernels.selective_scan.triton_chain")
        tuning = forward.Tuning(channels=4, tile=2)
        forward.FORWARD = chain.CHUNK_STATES = backward.BACKWARD = backward.SWEEP = backward.GRADIENT_SWEEP = tuning
        forward.LARGEST_TILE, forward.SHORTEST_CHUNK, forward.LONGEST_CHUNK = 2, chunk, chunk
        forward.UNSPLIT_PROGRAMS = 1 << 30

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    operands: dict[str, Tensor | None] = {
        "projected": normal(batch, length, 2 * width).to(dtype),
        "conv_weight": normal(width, 4).to(dtype),
        "conv_bias": None if bare else normal(width).to(dtype),
        "x_weight": (normal(rank + 2 * size, width) / width**0.5).to(dtype),
        "dt_weight": (normal(width, rank) / rank**0.5).to(dtype),
        "dt_bias": None if bare else normal(width).to(dtype),
        "A": -2 * torch.rand(width, size, device=device),
        "D": None if bare else normal(width),
        "out_weight": (normal(model, width) / width**0.5).to(dtype),
        "out_bias": None if bare else normal(model).to(dtype),
    }
    seq_idx = random_packing(batch, length, device) if packed else None
    # gradients of weights are sums over all tokens, which must not leave the range of fp16
    weights = normal(batch, length, model) / length
    return errors_beside(operands, weights, frozen, op=mamba_inner, seq_idx=seq_idx, recompute=recompute)


MAMBA: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba-recomputed": {"recompute": True},
    "mamba-bare": {"bare": True},
    "mamba-one-token": {"length": 1},
    "mamba-seq-idx": {"packed": True, "recompute": True},
    "mamba-frozen": {"frozen": ("x_weight", "dt_weight", "out_weight", "out_bias")},
    "mamba-fp16": {"dtype": FP16, "recompute": True},
}


@pytest.mark.parametrize("case", list(MAMBA))
def test_mamba_under_the_interpreter(toy_errors: Errors, case: str) -> None:
    assert_within_tolerance(toy_errors[case], MAMBA[case].get("dtype", FP32))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"bare": True, "length": 65},
        {"packed": True},
        {"width": 1536, "rank": 48, "length": 2048, "model": 768},
    ],
    ids=["whole", "bare", "packed", "mamba-130m"],
)
def test_mamba_on_gpu(case: dict[str, Any], recompute: bool, dtype: torch.dtype) -> None:
    sizes = {"length": 257, "width": 192, "size": 16, "rank": 12, "model": 96} | case
    assert_within_tolerance(run_mamba(**sizes, dtype=dtype, device="cuda", recompute=recompute, chunk=None), dtype)


PROJECTIONS: dict[str, dict[str, Any]] = {
    "projection": {"residual_dtype": FP32},
    "projection-without-residual": {},
    "projection-of-the-sum-alone": {"residual_dtype": FP32, "unused": "1"},
    "the-sum-alone": {"residual_dtype": FP32, "unused": "0"},
    "fp16-projection": {"residual_dtype": FP32, "dtype": FP16},
    "fp16-projection-and-residual": {"residual_dtype": FP16, "dtype": FP16},
}


@pytest.mark.parametrize("case", list(PROJECTIONS))
def test_projections_under_the_interpreter(toy_errors: Errors, case: str) -> None:
    assert_within_tolerance(toy_errors[case], PROJECTIONS[case].get("dtype", FP32))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [768, 2560])
@pytest.mark.parametrize("case", list(PROJECTIONS))
def test_projections_on_gpu(case: str, width: int) -> None:
    kind = PROJECTIONS[case]
    errors = run_projection(**kind, device="cuda", width=width, rows=257)
    assert_within_tolerance(errors, kind.get("dtype", FP32))


if __name__ == "__main__":
    kinds = ((run_toy_case, TOY_CASES), (run_projection, PROJECTIONS), (run_mamba, MAMBA))
    print_errors(
        lambda run, **case: run(**case),
        {name: {"run": run, **case} for run, cases in kinds for name, case in cases.items()},
    )
