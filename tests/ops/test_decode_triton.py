"""The decoding ops in Triton against the fp64 oracles.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import mamba_kernels
from mamba_kernels.decode import reference
from mamba_kernels.early import early_launches

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors

pytest.importorskip("triton")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LINEAR, MAMBA, MAMBA2 = "fused_linear", "mamba_step", "mamba2_step"

TOY_CASES: dict[str, dict[str, Any]] = {
    "linear": {"op": LINEAR},
    "linear-one-row": {"op": LINEAR, "rows": 1},
    "linear-four-rows": {"op": LINEAR, "rows": 4, "norm": True},
    "linear-beyond-four-rows": {"op": LINEAR, "rows": 5},
    "linear-many-rows": {"op": LINEAR, "rows": 9, "norm": True, "bias": True, "residual": True},
    "linear-many-rows-groups": {"op": LINEAR, "rows": 9, "norm": True, "gated": True, "inputs": 60, "group_size": 20},
    "linear-many-rows-strided": {
        "op": LINEAR,
        "rows": 9,
        "norm": True,
        "gated": True,
        "residual": True,
        "strided": True,
    },
    "linear-odd-widths": {"op": LINEAR, "inputs": 37, "outputs": 11},
    "linear-norm": {"op": LINEAR, "norm": True},
    "linear-norm-odd-width": {"op": LINEAR, "norm": True, "inputs": 37},
    "linear-gated-norm": {"op": LINEAR, "norm": True, "gated": True},
    "linear-gated-norm-groups": {"op": LINEAR, "norm": True, "gated": True, "inputs": 256, "group_size": 64},
    "linear-gated-norm-small-groups": {"op": LINEAR, "norm": True, "gated": True, "inputs": 60, "group_size": 20},
    "linear-bias-residual": {"op": LINEAR, "bias": True, "residual": True, "norm": True},
    "linear-strided": {"op": LINEAR, "bias": True, "residual": True, "strided": True, "norm": True, "gated": True},
    "linear-no-inputs": {"op": LINEAR, "inputs": 0, "bias": True},
    "mamba": {"op": MAMBA},
    "mamba-norm": {"op": MAMBA, "norm_eps": 1e-3},
    "mamba-odd": {"op": MAMBA, "channels": 37, "size": 5, "rank": 3, "strided": True},
    "mamba-one-state": {"op": MAMBA, "size": 1, "rank": 1, "channels": 3},
    "mamba-many-rows": {"op": MAMBA, "rows": 9, "channels": 37, "size": 5, "rank": 3, "strided": True},
    "mamba-many-rows-norm": {"op": MAMBA, "rows": 9, "norm_eps": 1e-3},
    "mamba2": {"op": MAMBA2},
    "mamba2-groups": {"op": MAMBA2, "groups": 2, "strided": True},
    "mamba2-limits": {"op": MAMBA2, "limit": (0.3, 0.9)},
    "mamba2-odd": {"op": MAMBA2, "heads": 3, "head_dim": 5, "size": 7},
}

# for the product on tensor cores, which takes fp32 under the interpreter if it is told to
SKINNY_CASES: dict[str, dict[str, Any]] = {
    "linear-skinny": {"op": LINEAR, "rows": 5},
    "linear-skinny-two-tiles": {"op": LINEAR, "rows": 8, "inputs": 512, "outputs": 21, "bias": True},
    "linear-skinny-odd-widths": {"op": LINEAR, "rows": 7, "inputs": 301, "outputs": 37, "norm": True},
    "linear-skinny-many-outputs": {"op": LINEAR, "rows": 6, "inputs": 130, "outputs": 2050},
    "linear-skinny-strided": {
        "op": LINEAR,
        "rows": 8,
        "norm": True,
        "gated": True,
        "bias": True,
        "residual": True,
        "strided": True,
    },
    "linear-skinny-groups": {
        "op": LINEAR,
        "rows": 2,
        "norm": True,
        "gated": True,
        "residual": True,
        "inputs": 60,
        "group_size": 20,
    },
}


def make_operands(
    op: str,
    rows: int = 3,
    inputs: int = 64,
    outputs: int = 12,
    norm: bool = False,
    gated: bool = False,
    group_size: int | None = None,
    bias: bool = False,
    residual: bool = False,
    channels: int = 64,
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
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Tensors and options of a call, in the dtypes that a model has."""

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if strided:
            return torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., : shape[-1]]
        return torch.randn(*shape, device=device).to(dtype)

    def vector(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    if op == LINEAR:
        tensors: dict[str, Tensor | None] = {
            "x": randn(rows, inputs, dtype=FP32 if residual else dtype),
            "weight": vector(outputs, inputs, scale=max(inputs, 1) ** -0.5),
            "bias": vector(outputs) if bias else None,
            "norm_weight": vector(inputs) if norm else None,
            "z": randn(rows, inputs) if gated else None,
            "residual": randn(rows, outputs, dtype=FP32) if residual else None,
        }
        return tensors, {"group_size": group_size, "eps": 1e-3}
    if op == MAMBA:
        return {
            "state": vector(rows, channels, size, dtype=FP32),
            "x": randn(rows, channels),
            "parameters": randn(rows, rank + 2 * size),
            "dt_weight": vector(channels, rank, scale=rank**-0.5),
            "dt_bias": vector(channels),
            "A_log": vector(channels, size, dtype=FP32),
            "D": vector(channels, dtype=FP32),
            "z": randn(rows, channels),
        }, {"norm_eps": norm_eps}
    return {
        "state": vector(rows, heads, head_dim, size, dtype=FP32),
        "xBC": randn(rows, heads * head_dim + 2 * groups * size),
        "dt": randn(rows, heads),
        "dt_bias": vector(heads, dtype=FP32),
        "A_log": vector(heads, dtype=FP32),
        "D": vector(heads, dtype=FP32),
    }, {"groups": groups, "dt_limit": limit}


def errors(op: str, **case: Any) -> dict[str, float]:
    """RMS-relative errors of result and state against the oracle."""
    tensors, options = make_operands(op, **case)
    state = tensors.get("state")
    held = None if state is None else state.double()
    expected = getattr(reference, op + "_ref")(**{**tensors, **({} if held is None else {"state": held})}, **options)
    with mamba_kernels.backend("triton"):
        actual = getattr(mamba_kernels, op)(**tensors, **options)
    found = {"result": relative(actual, expected)}
    if state is not None and held is not None:
        found["state"] = relative(state, held)
    return found


def relative(actual: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(actual).all()) or actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp(min=1e-30))


def interpreted_errors(skinny: bool = False, **case: Any) -> dict[str, float]:
    """`errors`, and 0 as `product` if the skinny one ran where the case is for it, and only there."""
    from mamba_kernels.decode import triton_rows, triton_skinny

    dtypes = (FP32,) if skinny else triton_skinny.DTYPES
    with (
        mock.patch.object(triton_skinny, "DTYPES", dtypes),
        mock.patch.object(triton_rows, "skinny_linear", wraps=triton_skinny.skinny_linear) as product,
    ):
        return errors(**case) | {"product": 0.0 if product.called == skinny else float("inf")}


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_under_interpreter(__name__)


@pytest.mark.parametrize("case", [*TOY_CASES, *SKINNY_CASES])
def test_under_the_interpreter(interpreted: Errors, case: str) -> None:
    for name, error in interpreted[case].items():
        assert error <= 1e-5, name


@pytest.mark.parametrize(
    ("rows", "elements", "normed", "gated", "in_half", "in_fp32"),
    [
        (1, 1 << 26, True, True, True, True),
        (2, 1 << 26, True, False, True, True),
        (2, 1 << 21, True, True, True, True),
        (2, 1 << 23, True, True, False, True),
        (3, 1 << 15, True, False, True, True),
        (3, 768 * 3072, True, False, False, True),
        (4, 2048 * 8192, True, False, False, False),
        (4, 1536 * 768, False, False, True, True),
        (4, 5120 * 2560, False, False, False, True),
        (5, 1 << 10, False, False, False, False),
    ],
)
def test_which_products_are_one_launch(
    rows: int, elements: int, normed: bool, gated: bool, in_half: bool, in_fp32: bool
) -> None:
    from mamba_kernels.decode.triton_linear import takes_one_launch

    for skinny, expected in ((True, in_half), (False, in_fp32)):
        assert takes_one_launch(rows, elements, normed, gated, skinny) == expected, skinny


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "dtype", "expected"),
    [
        (2, 768, 1536, BF16, True),
        (8, 2560, 5120, FP16, True),
        (9, 2560, 5120, FP16, False),
        (1, 2560, 5120, FP16, False),
        (4, 2560, 5120, FP32, False),
        (8, 80, 1536, BF16, True),
        (8, 192, 5120, BF16, False),
    ],
)
def test_which_products_are_skinny(rows: int, outputs: int, inputs: int, dtype: torch.dtype, expected: bool) -> None:
    from mamba_kernels.decode.triton_skinny import beats_the_library

    assert beats_the_library(rows, torch.empty(outputs, inputs, dtype=dtype)) == expected


# of published models: mamba-130m, mamba-2.8b, mamba2-2.7b, Codestral's groups, Falcon-Mamba
GPU_CASES: dict[str, dict[str, Any]] = {
    "in-130m": {"op": LINEAR, "inputs": 768, "outputs": 3072, "norm": True, "residual": False},
    "in-2.8b": {"op": LINEAR, "inputs": 2560, "outputs": 10240, "norm": True},
    "x-2.8b": {"op": LINEAR, "inputs": 5120, "outputs": 192},
    "out-2.8b": {"op": LINEAR, "inputs": 5120, "outputs": 2560, "residual": True},
    "out-mamba2": {"op": LINEAR, "inputs": 5120, "outputs": 2560, "residual": True, "norm": True, "gated": True},
    "out-codestral": {
        "op": LINEAR,
        "inputs": 8192,
        "outputs": 4096,
        "residual": True,
        "norm": True,
        "gated": True,
        "group_size": 1024,
    },
    "head": {"op": LINEAR, "inputs": 768, "outputs": 50277, "bias": True},
    "odd-large": {"op": LINEAR, "inputs": 2061, "outputs": 2051, "bias": True, "residual": True, "norm": True},
    "odd-few-outputs": {"op": LINEAR, "inputs": 1100, "outputs": 70, "bias": True, "residual": True},
    "mamba-2.8b": {"op": MAMBA, "channels": 5120, "rank": 160},
    "mamba-falcon": {"op": MAMBA, "channels": 8192, "rank": 256, "norm_eps": 1e-5},
    "mamba2-2.7b": {"op": MAMBA2, "heads": 80, "head_dim": 64, "size": 128},
    "mamba2-codestral": {"op": MAMBA2, "heads": 128, "head_dim": 64, "size": 128, "groups": 8},
    **{f"toy-{name}": case for name, case in TOY_CASES.items() if "one-row" not in name and "rows" not in case},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    for rows in (1, 2, 3, 4, 5, 8, 9, 64):
        torch.manual_seed(rows)
        for name, error in errors(**{"rows": rows, **GPU_CASES[case]}, dtype=dtype, device="cuda").items():
            assert error <= TOLERANCES[dtype], (name, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["in-2.8b", "out-mamba2", "mamba-2.8b", "mamba2-2.7b"])
def test_same_bits_ten_times(case: str) -> None:
    op = GPU_CASES[case]["op"]
    tensors, options = make_operands(**GPU_CASES[case], dtype=BF16, device="cuda")

    def run() -> Tensor:
        fresh = {k: v.clone() if k == "state" and v is not None else v for k, v in tensors.items()}
        return getattr(mamba_kernels, op)(**fresh, **options)

    first = run()
    assert all(torch.equal(run(), first) for _ in range(10))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("captured", [False, True], ids=["in-a-stream", "in-a-graph"])
def test_early_launches_have_the_same_bits(captured: bool, dtype: torch.dtype) -> None:
    """A chain of all kernels of a step, of which each reads what the one in front of it has only just written."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs launches that start early")
    layers, channels, rank, size, rounds = 6, 512, 16, 16, 5
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype) * shape[-1] ** -0.5

    weights = [
        (
            normal(2 * channels, channels),
            normal(channels, 4),
            normal(rank + 2 * size, channels),
            normal(channels, channels),
        )
        for _ in range(layers)
    ]
    heads, head_dim = 8, channels // 8
    in_ssd = [normal(2 * channels + 2 * size + heads, channels) for _ in range(layers)]
    conv_ssd = [normal(channels + 2 * size, 4) for _ in range(layers)]
    dt_weight, dt_bias = normal(channels, rank), torch.randn(channels, device="cuda")
    A_log, D, scale = (
        torch.rand(channels, size, device="cuda"),
        torch.randn(channels, device="cuda"),
        normal(channels).abs(),
    )

    def run(x: Tensor, states: list[Tensor]) -> Tensor:
        held = iter(states)
        for layer, (in_proj, taps, x_proj, out_proj) in enumerate(weights):
            hidden, z = mamba_kernels.fused_linear(x, in_proj, norm_weight=scale).chunk(2, dim=-1)
            hidden = mamba_kernels.causal_conv1d_update(hidden, next(held), taps, activation="silu")
            parameters = mamba_kernels.fused_linear(hidden, x_proj)
            y = mamba_kernels.mamba_step(next(held), hidden, parameters, dt_weight, dt_bias, A_log, D, z)
            x = mamba_kernels.fused_linear(y, out_proj, residual=x)
            widths = [channels, channels + 2 * size, heads]
            z, xBC, dt = mamba_kernels.fused_linear(x, in_ssd[layer], norm_weight=scale).split(widths, dim=-1)
            xBC = mamba_kernels.causal_conv1d_update(xBC, next(held), conv_ssd[layer], activation="silu")
            y = mamba_kernels.mamba2_step(next(held), xBC, dt, dt_bias[:heads], A_log[:heads, 0], D[:heads], groups=1)
            x = mamba_kernels.fused_linear(y, out_proj, norm_weight=scale, z=z, residual=x)
        return x

    def new_states(rows: int) -> list[Tensor]:
        shapes = [(channels, 4), (channels, size), (channels + 2 * size, 4), (heads, head_dim, size)] * layers
        kinds = [dtype, FP32] * (2 * layers)
        return [
            torch.zeros(rows, *shape, device="cuda", dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)
        ]

    for rows in (1, 2, 4, 8):
        inputs = [normal(rows, channels) for _ in range(rounds)]
        states = new_states(rows)
        expected = [run(x, states) for x in inputs]
        early_states = new_states(rows)
        with early_launches() as asked:
            if captured:
                run(inputs[0], new_states(rows))
                static, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    # behind a kernel of torch
                    out = run(static * 1, early_states)
                found = []
                for x in inputs:
                    static.copy_(x)
                    graph.replay()
                    found.append(out.clone())
            else:
                found = [run(x, early_states) for x in inputs]
        assert asked.used
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), rows
        assert all(torch.equal(a, b) for a, b in zip(early_states, states, strict=True)), rows


if __name__ == "__main__":
    print_errors(
        interpreted_errors, TOY_CASES | {name: {**case, "skinny": True} for name, case in SKINNY_CASES.items()}
    )
