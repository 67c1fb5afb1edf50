"""The RMS norms against their oracles: values, gradients, rounding, tracing and errors."""

import doctest
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import add_rms_norm, backend, rms_norm, rms_norm_gated
from mamba_kernels.norm import add_rms_norm_ref, rms_norm_gated_ref, rms_norm_ref

from .comparison import assert_matches
from .oracle import Tensors, compare_with_oracle, outputs_and_gradients, saved_bytes

SHAPES = [(8,), (1, 8), (3, 5, 8), (2, 3, 4, 8), (0, 8), (64, 1024)]
HALF = [torch.bfloat16, torch.float16]


def make(
    *names: str, shape: tuple[int, ...] = (3, 5, 8), dtype: torch.dtype = torch.float32, weight: bool = True
) -> Tensors:
    """Random tensors of one shape under `names`, and a weight."""
    generator = torch.Generator().manual_seed(len(shape))

    def randn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors: Tensors = {name: randn(shape) for name in names}
    tensors["weight"] = randn(shape[-1:]) if weight else None
    return tensors


def test_oracle_is_torch_rms_norm() -> None:
    tensors = make("x", dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(tensors["x"], (8,), tensors["weight"], eps=1e-3)
    torch.testing.assert_close(rms_norm_ref(**tensors, eps=1e-3), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
def test_rms_norm(shape: tuple[int, ...], weight: bool) -> None:
    compare_with_oracle(rms_norm, rms_norm_ref, make("x", shape=shape, weight=weight), torch.float32, eps=1e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "first block"])
def test_add_rms_norm(shape: tuple[int, ...], residual: bool) -> None:
    tensors = make("x", "residual", shape=shape)
    if not residual:
        tensors["residual"] = None
    compare_with_oracle(add_rms_norm, add_rms_norm_ref, tensors, torch.float32, eps=1e-2)


@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
@pytest.mark.parametrize("group_size", [None, 1, 2, 4, 8], ids=lambda g: f"group {g}")
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
def test_rms_norm_gated(weight: bool, gate: bool, group_size: int | None, before: bool) -> None:
    tensors = make("x", "z", weight=weight)
    if not gate:
        tensors["z"] = None
    options = {"eps": 1e-2, "group_size": group_size, "norm_before_gate": before}
    compare_with_oracle(rms_norm_gated, rms_norm_gated_ref, tensors, torch.float32, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_gated_shapes(shape: tuple[int, ...]) -> None:
    compare_with_oracle(rms_norm_gated, rms_norm_gated_ref, make("x", "z", shape=shape), torch.float32, group_size=4)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    tensors = make("x", shape=(6, 64), dtype=dtype)
    compare_with_oracle(rms_norm, rms_norm_ref, tensors, dtype)
    compare_with_oracle(add_rms_norm, add_rms_norm_ref, make("x", "residual", shape=(6, 64), dtype=dtype), dtype)
    for before in (False, True):
        gated = make("x", "z", shape=(6, 64), dtype=dtype)
        compare_with_oracle(rms_norm_gated, rms_norm_gated_ref, gated, dtype, norm_before_gate=before)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_follows_transformers(dtype: torch.dtype) -> None:
    tensors = make("x", "z", shape=(40, 64), dtype=dtype)
    x, z, weight = tensors["x"], tensors["z"], tensors["weight"]

    def normed(value: Tensor) -> Tensor:
        return weight * (value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)

    # the same roundings in the same order; only the last bit of an fp32 intermediate may differ
    for found, expected in (
        (rms_norm(x, weight), normed(x.float())),
        (rms_norm_gated(x, weight, z), normed(x.float() * torch.nn.functional.silu(z.float()))),
    ):
        assert (found != expected).float().mean() < 0.01


def test_fp32_weight_keeps_the_dtype_of_x() -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.rand(8)
    assert rms_norm(x, weight).dtype == torch.bfloat16
    assert rms_norm_gated(x, weight, x).dtype == torch.bfloat16
    assert rms_norm_gated(x, weight, group_size=2).dtype == torch.bfloat16


def test_residual_dtype() -> None:
    x, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 8)
    y, total = add_rms_norm(x, residual, torch.ones(8))
    assert y.dtype == torch.bfloat16 and torch.equal(total, x.float() + residual)
    y, total = add_rms_norm(x, None, torch.ones(8), residual_dtype=torch.float32)
    assert y.dtype == torch.bfloat16 and torch.equal(total, x.float())
    y, total = add_rms_norm(x, residual.bfloat16(), None)
    # one rounding of the exact sum, and the norm of what is returned
    assert torch.equal(total, (x.float() + residual.bfloat16().float()).bfloat16())
    assert torch.equal(y, rms_norm(total, None))


def test_fp32_residual_is_not_rounded_on_its_way_to_the_norm() -> None:
    x = torch.full((1, 4), 2.0**-10).bfloat16()
    residual = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    _, total = add_rms_norm(x, residual, None)
    assert torch.equal(total, residual + 2.0**-10)


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_gated"])
def test_large_and_tiny_values(op: str) -> None:
    x = torch.randn(4, 64) * torch.tensor([1e-12, 1e-4, 1e4, 1e15])[:, None]
    tensors: Tensors = {"x": x, "weight": torch.rand(64)}
    run, oracle = (rms_norm, rms_norm_ref) if op == "rms_norm" else (rms_norm_gated, rms_norm_gated_ref)
    if op == "rms_norm_gated":
        tensors["z"] = torch.randn(4, 64)
    assert_matches(run(**tensors), oracle(**{k: v.double() for k, v in tensors.items()}))


def test_strided_views() -> None:
    wide = torch.randn(3, 5, 24)
    tensors: Tensors = {"x": wide[..., 3:11], "weight": torch.rand(16)[::2], "z": wide[..., 16:]}
    compare_with_oracle(rms_norm_gated, rms_norm_gated_ref, tensors, torch.float32, group_size=4)
    tensors = {"x": torch.randn(8, 3).t(), "weight": torch.ones(1).expand(8)}
    compare_with_oracle(rms_norm, rms_norm_ref, tensors, torch.float32)


@pytest.mark.parametrize("before", [False, True], ids=["gate first", "norm first"])
def test_gradcheck(before: bool) -> None:
    tensors = make("x", "z", shape=(3, 4), dtype=torch.float64)
    leaves = [tensors[name].requires_grad_() for name in ("x", "weight", "z")]
    options = {"group_size": 2, "norm_before_gate": before}
    assert torch.autograd.gradcheck(lambda x, w, z: rms_norm_gated(x, w, z, **options), leaves)
    assert torch.autograd.gradcheck(lambda x, w, z: add_rms_norm(x, z, w), leaves)
    assert torch.autograd.gradcheck(rms_norm, leaves[:2])


def test_only_inputs_are_saved() -> None:
    x, z = make("x", "z", shape=(256, 64)), make("x", "z", shape=(256, 64))
    del x["z"]
    size = 256 * 64 * 4
    assert saved_bytes(rms_norm, x) <= 1.01 * size
    assert saved_bytes(rms_norm_gated, z) <= 2.01 * size
    assert saved_bytes(add_rms_norm, make("x", "residual", shape=(256, 64))) <= 1.01 * size


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "rms_norm_gated"])
def test_compile_fullgraph(op: str) -> None:
    run = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "rms_norm_gated": rms_norm_gated}[op]
    tensors = make("x", *{"rms_norm": (), "add_rms_norm": ("residual",), "rms_norm_gated": ("z",)}[op])
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(run, tensors)
    for name, value in outputs_and_gradients(compiled, tensors).items():
        assert_matches(value, expected[name], torch.float64, name)


def test_second_derivative_raises() -> None:
    x, z = (t.requires_grad_() for t in (torch.randn(3, 8), torch.randn(3, 8)))
    for y, name in ((rms_norm(x, None), "rms_norm"), (rms_norm_gated(x, None, z), "rms_norm_gated")):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} can be differentiated only once"):
            gradient.square().sum().backward()


def test_reference_backend() -> None:
    tensors = make("x", "z")
    x, z, weight = tensors["x"], tensors["z"], tensors["weight"]
    with backend("reference"):
        assert torch.equal(rms_norm(x, weight), rms_norm_ref(x, weight))
        assert torch.equal(add_rms_norm(x, z, weight)[0], add_rms_norm_ref(x, z, weight)[0])
        assert torch.equal(rms_norm_gated(x, weight, z), rms_norm_gated_ref(x, weight, z))


ERRORS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "scalar": (rms_norm, (torch.tensor(1.0), None), {}, ValueError, "`x` must have at least one dimension"),
    "no tensor": (rms_norm, ([1.0], None), {}, TypeError, "rms_norm: `x` must be a torch.Tensor, got list"),
    "integers": (rms_norm, (torch.ones(2).int(), None), {}, TypeError, "`x` must have dtype .* got int32"),
    "weight": (
        rms_norm,
        (torch.ones(2, 3), torch.ones(2)),
        {},
        ValueError,
        r"`weight` must have shape \(D,\) = \(3\)",
    ),
    "residual": (
        add_rms_norm,
        (torch.ones(2, 3), torch.ones(3), None),
        {},
        ValueError,
        r"add_rms_norm: `residual` must have shape the shape of `x` = \(2, 3\), got \(3,\)",
    ),
    "residual_dtype": (
        add_rms_norm,
        (torch.ones(2, 3), None, None),
        {"residual_dtype": torch.int32},
        TypeError,
        "`residual_dtype` must be a floating dtype, got torch.int32",
    ),
    "z": (rms_norm_gated, (torch.ones(2, 3), None, torch.ones(2, 4)), {}, ValueError, "`z` must have shape"),
    "group_size": (
        rms_norm_gated,
        (torch.ones(2, 6), None),
        {"group_size": 4},
        ValueError,
        "`group_size` must divide the width 6 of `x`, got 4",
    ),
    "device": (rms_norm, (torch.ones(3), torch.ones(3, device="meta")), {}, ValueError, "`weight` is on meta"),
}


def test_docstring_examples() -> None:
    failed, attempted = doctest.testmod(importlib.import_module("mamba_kernels.norm.interface"))
    assert attempted and not failed


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    op, arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        op(*arguments, **options)
