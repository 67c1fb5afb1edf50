"""`causal_conv1d` against the window by window oracle: values, gradients, states, packing, tracing and errors."""

import doctest
import importlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import backend, causal_conv1d
from mamba_kernels.causal_conv1d import causal_conv1d_eager, causal_conv1d_ref
from mamba_kernels.causal_conv1d import eager as conv_eager

from .comparison import LENGTHS, assert_matches
from .oracle import Tensors, compare_with_oracle, outputs_and_gradients, saved_bytes

WIDTH = 5


def make(
    batch: int = 2,
    length: int = 20,
    taps: int = 4,
    bias: bool = True,
    states: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Random inputs; `states` initial states where it is given."""
    generator = torch.Generator().manual_seed(length * 31 + taps)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors: Tensors = {"x": randn(batch, length, WIDTH), "weight": randn(WIDTH, taps)}
    if bias:
        tensors["bias"] = randn(WIDTH)
    if states is not None:
        tensors["initial_states"] = randn(states, WIDTH, taps - 1)
    return tensors


def compare(tensors: Tensors, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    compare_with_oracle(causal_conv1d, causal_conv1d_ref, tensors, dtype, **options)


def test_oracle_is_conv1d() -> None:
    tensors = make(dtype=torch.float64)
    expected = torch.nn.functional.conv1d(
        tensors["x"].transpose(1, 2), tensors["weight"][:, None], tensors["bias"], padding=3, groups=WIDTH
    )[..., :-3]
    y = causal_conv1d_ref(**tensors)
    torch.testing.assert_close(y.transpose(1, 2), expected)
    y = causal_conv1d_ref(**tensors, activation="silu")
    torch.testing.assert_close(y.transpose(1, 2), torch.nn.functional.silu(expected))


@pytest.mark.parametrize("length", [0, *LENGTHS])
@pytest.mark.parametrize("taps", [1, 4], ids=lambda w: f"W{w}")
def test_lengths(length: int, taps: int) -> None:
    tensors = make(length=length, taps=taps, states=2)
    compare(tensors, activation="silu", return_final_states=True)


@pytest.mark.parametrize("final", [False, True], ids=["y", "y+states"])
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("activation", [None, "silu", "swish"], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7], ids=lambda w: f"W{w}")
def test_options(taps: int, bias: bool, activation: str | None, initial: bool, final: bool) -> None:
    tensors = make(taps=taps, bias=bias, states=2 if initial else None)
    compare(tensors, activation=activation, return_final_states=final)


@pytest.mark.parametrize("elements", [1, 300], ids=["blocks of 16", "blocks of 30"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch, packed: bool, elements: int) -> None:
    monkeypatch.setattr(conv_eager, "BLOCK_ELEMENTS", elements)
    seq_idx = torch.arange(100).expand(2, 100) // 17 if packed else None
    compare(make(length=100, states=2), activation="silu", seq_idx=seq_idx, return_final_states=True)


def test_blocks_shorter_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_eager, "BLOCK_ELEMENTS", 1)
    compare(make(length=70, taps=40, states=2), activation="silu", return_final_states=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    tensors = make(length=100, states=2, dtype=dtype)
    compare(tensors, dtype, activation="silu", return_final_states=True)
    y, states = causal_conv1d(**tensors, return_final_states=True)
    assert y.dtype == states.dtype == dtype
    # states are inputs, to the bit
    assert torch.equal(states, tensors["x"][:, -3:].transpose(1, 2))


def test_fp32_parameters_over_half_precision_input() -> None:
    tensors = make(length=100, states=2)
    tensors["x"] = tensors["x"].bfloat16()
    compare(tensors, torch.bfloat16, activation="silu", return_final_states=True)


def test_strided_views() -> None:
    tensors = make(length=30, states=2)
    # a slice of a wider projection, channel-first memory, a reversed weight layout, a cache with room to spare
    tensors["x"] = torch.randn(2, 30, 3 * WIDTH)[..., WIDTH : 2 * WIDTH]
    tensors["weight"] = torch.randn(4, WIDTH).t()
    tensors["initial_states"] = torch.randn(2, WIDTH, 6)[..., 3:]
    compare(tensors, activation="silu")
    tensors["x"] = torch.randn(2, WIDTH, 30).transpose(1, 2)
    compare(tensors, activation="silu")
    tensors["x"] = torch.randn(1, 30, WIDTH).expand(2, -1, -1)
    compare(tensors, activation="silu")


SEQ_IDX = {
    "two": [[0] * 10 + [1] * 10, [0] * 19 + [1]],
    "short ones": [[i // 2 for i in range(20)], list(range(20))],
    "returning numbers": [[i // 2 % 2 for i in range(20)], [0] * 5 + [1] + [0] * 14],
    "right padding": [[0] * 15 + [-1] * 5, [0] * 2 + [-1] * 18],
    "left padding": [[-1] * 5 + [0] * 15, [-1] * 19 + [4]],
    "padding inside": [[0] * 3 + [-1] + [0] * 6 + [-1] * 2 + [1] * 8, [5] * 17 + [-1] + [5] * 2],
    "all padding": [[-1] * 20, [0] * 20],
}


@pytest.mark.parametrize("name", SEQ_IDX)
@pytest.mark.parametrize("states", [None, 2], ids=["zeros", "initial"])
@pytest.mark.parametrize("taps", [1, 4, 7], ids=lambda w: f"W{w}")
def test_seq_idx(name: str, states: int | None, taps: int) -> None:
    seq_idx = torch.tensor(SEQ_IDX[name], dtype=torch.int32)
    compare(make(taps=taps, states=states), activation="silu", seq_idx=seq_idx, return_final_states=True)


def test_seq_idx_shorter_than_the_window() -> None:
    for numbers in ([[0, -1]], [[-1, 0]], [[0, 1]], [[0, 0]]):
        compare(make(batch=1, length=2, taps=6, states=1), seq_idx=torch.tensor(numbers), return_final_states=True)
    compare(make(length=0, states=2), seq_idx=torch.zeros(2, 0).int(), return_final_states=True)


CU_SEQLENS = {
    "one": [0, 20],
    "several": [0, 1, 3, 10, 20],
    "empty ones": [0, 0, 2, 2, 12, 20, 20],
    "all empty": [0, 0, 0],
}


@pytest.mark.parametrize("name", CU_SEQLENS)
@pytest.mark.parametrize("initial", [False, True], ids=["zeros", "initial"])
@pytest.mark.parametrize("taps", [1, 4, 7], ids=lambda w: f"W{w}")
def test_cu_seqlens(name: str, initial: bool, taps: int) -> None:
    bounds = CU_SEQLENS[name]
    tensors = make(batch=1, length=bounds[-1], taps=taps, states=len(bounds) - 1 if initial else None)
    compare(tensors, activation="silu", cu_seqlens=torch.tensor(bounds).int(), return_final_states=True)


@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_equals_alone(how: str) -> None:
    bounds = [0, 9, 11, 30]
    tensors = make(batch=1, length=30, dtype=torch.float64)
    packing = (
        {"cu_seqlens": torch.tensor(bounds)}
        if how == "cu_seqlens"
        else {"seq_idx": torch.repeat_interleave(torch.arange(3), torch.tensor(bounds).diff())[None]}
    )

    def alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([causal_conv1d(x[:, a:b], weight, bias, "silu") for a, b in pairwise(bounds)], dim=1)

    packed = outputs_and_gradients(causal_conv1d, tensors, activation="silu", **packing)
    expected = outputs_and_gradients(alone, tensors)
    for name, value in packed.items():
        assert_matches(value, expected[name], torch.float64, name)


def test_continuation_by_initial_states() -> None:
    tensors = make(length=30, dtype=torch.float64)

    def chunked(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ys, state = [], None
        for a, b in ((0, 1), (1, 3), (3, 3), (3, 10), (10, 30)):
            y, state = causal_conv1d(x[:, a:b], weight, bias, "silu", state, return_final_states=True)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    whole = outputs_and_gradients(causal_conv1d, tensors, activation="silu", return_final_states=True)
    pieces = outputs_and_gradients(chunked, tensors)
    for name, value in pieces.items():
        assert_matches(value, whole[name], torch.float64, name)


def test_right_padding_continues_like_the_real_tokens() -> None:
    tensors = make(length=12, dtype=torch.float64, states=2)
    real = {**tensors, "x": tensors["x"][:, :7]}
    seq_idx = torch.tensor([[0] * 7 + [-1] * 5] * 2)
    _, states = causal_conv1d(**tensors, seq_idx=seq_idx, return_final_states=True)
    assert torch.equal(states, causal_conv1d(**real, return_final_states=True)[1])


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_gradcheck(packing: str) -> None:
    tensors = make(batch=1, length=6, taps=3, states=2 if packing == "cu_seqlens" else 1, dtype=torch.float64)
    kwargs: dict[str, Any] = {"return_final_states": True, "activation": "silu"}
    if packing == "seq_idx":
        kwargs["seq_idx"] = torch.tensor([[0, 0, -1, 1, 1, -1]])
    if packing == "cu_seqlens":
        kwargs["cu_seqlens"] = torch.tensor([0, 1, 6])
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *v: causal_conv1d(**dict(zip(tensors, v, strict=True)), **kwargs), leaves)


def test_padding_may_hold_anything() -> None:
    tensors = make(length=20)
    seq_idx = torch.tensor(SEQ_IDX["padding inside"])
    clean = outputs_and_gradients(causal_conv1d, tensors, seq_idx=seq_idx, activation="silu", return_final_states=True)
    tensors["x"][seq_idx < 0] = math.nan
    found = outputs_and_gradients(causal_conv1d, tensors, seq_idx=seq_idx, activation="silu", return_final_states=True)
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name
    assert (found["output 0"][seq_idx < 0] == 0).all()
    assert (found["gradient of x"][seq_idx < 0] == 0).all()


def test_saved_memory_is_the_input() -> None:
    for length in (512, 1024):
        tensors = make(length=length)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        assert saved_bytes(causal_conv1d, tensors, activation="silu") <= 1.1 * total


@pytest.mark.parametrize("packing", ["none", "seq_idx", "cu_seqlens"])
def test_compile_fullgraph(packing: str) -> None:
    batch = 1 if packing == "cu_seqlens" else 2
    tensors = make(batch=batch, states=2)
    kwargs: dict[str, Any] = {"return_final_states": True, "activation": "silu"}
    if packing == "seq_idx":
        kwargs["seq_idx"] = torch.tensor(SEQ_IDX["padding inside"])
    if packing == "cu_seqlens":
        kwargs["cu_seqlens"] = torch.tensor([0, 3, 20])
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(causal_conv1d, tensors, **kwargs)
    for name, value in outputs_and_gradients(compiled, tensors, **kwargs).items():
        assert_matches(value, expected[name], torch.float64, name)


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = make(states=2)
    expected = causal_conv1d(**tensors, activation="silu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(causal_conv1d(**tensors, activation="silu"), expected)


def test_second_derivative_raises() -> None:
    tensors = {name: t.requires_grad_() for name, t in make().items()}
    y = causal_conv1d(**tensors, activation="silu")
    (gradient,) = torch.autograd.grad(y.sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d can be differentiated only once"):
        gradient.square().sum().backward()


def test_backend_choice() -> None:
    tensors = make()
    with backend("reference"):
        assert torch.equal(causal_conv1d(**tensors), causal_conv1d_ref(**tensors))
    with backend("eager"):
        assert torch.equal(causal_conv1d(**tensors), causal_conv1d_eager(**tensors))


def _replace(**changes: Any) -> dict[str, Any]:
    return {**make(), **changes}


ERRORS = {
    "no tensor": (_replace(x=None), TypeError, "`x` must be a torch.Tensor, got NoneType"),
    "integer x": (_replace(x=torch.ones(2, 20, 5).int()), TypeError, "`x` must have dtype .* got int32"),
    "2-D x": (_replace(x=torch.ones(20, 5)), ValueError, r"`x` must have shape \(B, L, D\)"),
    "3-D weight": (
        _replace(weight=torch.ones(5, 1, 4)),
        ValueError,
        r"`weight` must have shape \(D, W\) = \(5, any\)",
    ),
    "no taps": (_replace(weight=torch.ones(5, 0)), ValueError, "`weight` must have at least one tap"),
    "bias": (_replace(bias=torch.ones(4)), ValueError, r"`bias` must have shape \(D,\) = \(5\), got \(4,\)"),
    "activation": (
        _replace(activation="gelu"),
        ValueError,
        "`activation` must be None, 'silu' or 'swish', got 'gelu'",
    ),
    "initial_states": (
        _replace(initial_states=torch.ones(2, 5, 4)),
        ValueError,
        r"`initial_states` must have shape \(B, D, W - 1\) = \(2, 5, 3\), got \(2, 5, 4\)",
    ),
    "seq_idx": (_replace(seq_idx=torch.zeros(2, 19).int()), ValueError, r"`seq_idx` must have shape \(B, L\)"),
    "float seq_idx": (_replace(seq_idx=torch.zeros(2, 20)), TypeError, "`seq_idx` must have dtype int32, int64"),
    "cu_seqlens": (
        {**make(batch=1), "cu_seqlens": torch.tensor([0, 21])},
        ValueError,
        "`cu_seqlens` must rise from 0 to the length 20",
    ),
    "device": (_replace(bias=torch.ones(5, device="meta")), ValueError, "`bias` is on meta but `x` is on cpu"),
}


def test_docstring_examples() -> None:
    failed, attempted = doctest.testmod(importlib.import_module("mamba_kernels.causal_conv1d.interface"))
    assert attempted and not failed


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        causal_conv1d(**arguments)
