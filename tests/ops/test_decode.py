"""The decoding ops without a GPU: what eager computes, and what is refused."""

from typing import Any

import pytest
import torch

import mamba_kernels
from mamba_kernels.decode import reference

from .test_decode_triton import LINEAR, MAMBA, MAMBA2, TOY_CASES, make_operands, relative

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", TOY_CASES)
def test_equals_the_oracle(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    op = TOY_CASES[case]["op"]
    tensors, options = make_operands(**TOY_CASES[case], dtype=dtype)
    held = None if tensors.get("state") is None else tensors["state"].double()
    given = {**tensors, **({} if held is None else {"state": held})}
    expected = getattr(reference, op + "_ref")(**given, **options)
    with mamba_kernels.backend("eager"):
        actual = getattr(mamba_kernels, op)(**tensors, **options)
    # a few roundings follow one another: of the norm, of dt, of the product
    assert relative(actual, expected) <= 2 * DTYPES[dtype]
    if held is not None:
        assert relative(tensors["state"], held) <= 2 * DTYPES[dtype]
    if case == "linear-bias-residual":
        assert actual.dtype == torch.float32
    else:
        assert actual.dtype == (torch.float32 if "residual" in TOY_CASES[case] else dtype)


WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "rank": (LINEAR, {"x": torch.ones(64)}, ValueError, r"`x` must have shape \(B, K\)"),
    "inputs": (LINEAR, {"weight": torch.ones(12, 63)}, ValueError, r"`weight` must have shape \(O, K\)"),
    "dtype": (LINEAR, {"weight": torch.ones(12, 64, dtype=torch.int64)}, TypeError, "`weight` must have dtype"),
    "no tensor": (LINEAR, {"bias": 3}, TypeError, "`bias` must be a torch.Tensor, got int"),
    "z alone": (LINEAR, {"z": torch.ones(3, 64)}, ValueError, "needs `norm_weight`"),
    "group": (LINEAR, {"group_size": 7}, ValueError, "`group_size` must divide the 64 inputs"),
    "residual": (LINEAR, {"residual": torch.ones(3, 11)}, ValueError, r"`residual` must have shape \(B, O\)"),
    "gradient": (LINEAR, {"bias": torch.ones(12, requires_grad=True)}, RuntimeError, "`bias` requires one"),
    "device": (LINEAR, {"bias": torch.ones(12, device="meta")}, ValueError, "`bias` is on meta"),
    "state": (MAMBA, {"state": torch.ones(3, 64, 15)}, ValueError, r"`state` must have shape \(B, D, N\)"),
    "parameters": (MAMBA, {"parameters": torch.ones(3, 41)}, ValueError, r"\(B, R \+ 2 N\)"),
    "rank of dt": (MAMBA, {"dt_weight": torch.ones(64, 9)}, ValueError, r"\(B, R \+ 2 N\)"),
    "groups": (MAMBA2, {"groups": 3}, ValueError, "`groups` must divide the 4 heads, got 3"),
    "xBC": (MAMBA2, {"xBC": torch.ones(3, 10)}, ValueError, r"\(B, H P \+ 2 G N\)"),
    "heads": (MAMBA2, {"D": torch.ones(5)}, ValueError, r"`D` must have shape \(H,\)"),
}


@pytest.mark.parametrize("op, wrong, error, message", WRONG.values(), ids=WRONG.keys())
def test_bad_input(op: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, options = make_operands(op)
    with pytest.raises(error, match=message):
        getattr(mamba_kernels, op)(**{**tensors, **options, **wrong})
