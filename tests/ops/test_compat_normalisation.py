"""The norms of mamba_ssm, against formulas written out here in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from mamba_kernels.compat import (
    layer_norm_fn,
    rms_norm_fn,
    rmsnorm_fn,
)

from .oracle import Tensors, compare_with_oracle, randn, rms


@pytest.mark.parametrize("before", [True, False], ids=["norm first", "gate first"])
@pytest.mark.parametrize("group_size", [None, 4], ids=lambda g: f"group {g}")
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("gate", [False, True], ids=["no gate", "gate"])
def test_rmsnorm_fn(gate: bool, bias: bool, group_size: int | None, before: bool) -> None:
    def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None) -> Tensor:
        y = x if z is None or before else x * silu(z)
        y = rms(y.unflatten(-1, (-1, group_size or 8)), None, 1e-3).flatten(-2) * weight
        y = y if bias is None else y + bias
        return y if z is None or not before else y * silu(z)

    def run(**arguments: Tensor | None) -> Tensor:
        return rmsnorm_fn(**arguments, eps=1e-3, group_size=group_size, norm_before_gate=before)

    tensors: Tensors = {"x": randn(3, 8), "weight": randn(8), "bias": None, "z": None}
    if bias:
        tensors["bias"] = randn(8, seed=1)
    if gate:
        tensors["z"] = randn(3, 8, seed=2)
    compare_with_oracle(run, oracle, tensors, torch.float32)


@pytest.mark.parametrize("is_rms_norm", [False, True], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    "names", [(), ("bias", "residual"), ("x1", "residual"), ("rowscale",), ("weight1", "bias1", "x1")]
)
def test_layer_norm_fn(names: tuple[str, ...], is_rms_norm: bool) -> None:
    def oracle(**t: Tensor) -> tuple[Tensor, ...]:
        total = t["x"] * t["rowscale"][..., None] if "rowscale" in t else t["x"]
        total = total + t.get("x1", 0.0) + t.get("residual", 0.0)

        def norm(weight: Tensor, bias: Tensor | float) -> Tensor:
            centred = total if is_rms_norm else total - total.mean(-1, keepdim=True)
            return rms(centred, weight, 1e-3) + bias

        second = (norm(t["weight1"], t["bias1"]),) if "weight1" in t else ()
        return norm(t["weight"], t.get("bias", 0.0)), *second, total

    def run(**t: Tensor) -> Any:
        t.setdefault("bias", None)
        if is_rms_norm:
            return rms_norm_fn(**t, eps=1e-3, prenorm=True)
        return layer_norm_fn(**t, eps=1e-3, prenorm=True)

    shapes = {"rowscale": (3, 5), "residual": (3, 5, 8), "x1": (3, 5, 8)}
    tensors: Tensors = {"x": randn(3, 5, 8), "weight": randn(8)}
    tensors |= {name: randn(*shapes.get(name, (8,)), seed=i) for i, name in enumerate(names, start=1)}
    compare_with_oracle(run, oracle, tensors, torch.float32)


def test_layer_norm_fn_dtypes_and_dropout() -> None:
    x, weight = randn(3, 8).bfloat16(), torch.ones(8)
    y, total = rms_norm_fn(x, weight, None, residual=randn(3, 8), prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    y, total = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert total.dtype == torch.float32
    assert isinstance(rms_norm_fn(x, weight, None), Tensor)
    _, total = layer_norm_fn(torch.ones(1000, 8), weight, None, dropout_p=0.5, prenorm=True)
    kept = total != 0
    assert (total[kept] == 2).all() and 0.4 < kept.float().mean() < 0.6


def test_layer_norm_fn_errors() -> None:
    x, weight = randn(3, 8), torch.ones(8)
    for options, message in (
        ({"return_dropout_mask": True}, "`return_dropout_mask` is not supported"),
        ({"rowscale": torch.ones(3), "x1": x}, "`rowscale` scales a single branch"),
        ({"bias1": weight}, "`bias1` needs `weight1`"),
        ({"residual": x[:2]}, "`residual` must have shape"),
    ):
        with pytest.raises(ValueError, match=f"layer_norm_fn: {message}"):
            layer_norm_fn(x, weight, None, **options)
        with pytest.raises(ValueError, match=f"rms_norm_fn: {message}"):
            rms_norm_fn(x, weight, None, **options)
