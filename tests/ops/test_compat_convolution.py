"""The convolutions of causal_conv1d, against formulas written out here in fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from mamba_kernels.compat import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)

from .comparison import assert_matches
from .oracle import Tensors, compare_with_oracle, randn

BATCH, WIDTH, LENGTH = 2, 6, 20


def conv_oracle(x: Tensor, weight: Tensor, bias: Tensor, initial_states: Tensor) -> tuple[Tensor, Tensor]:
    full = torch.cat([initial_states, x], dim=-1)
    return silu(conv1d(full, weight[:, None], bias, groups=x.shape[1])), full[..., -(weight.shape[1] - 1) :]


def conv_tensors() -> Tensors:
    return {
        "x": randn(BATCH, WIDTH, LENGTH),
        "weight": randn(WIDTH, 4),
        "bias": randn(WIDTH),
        "initial_states": randn(BATCH, WIDTH, 3),
    }


def test_causal_conv1d_fn() -> None:
    def run(**arguments: Tensor) -> Any:
        return causal_conv1d_fn(**arguments, activation="silu", return_final_states=True)

    compare_with_oracle(run, conv_oracle, conv_tensors(), torch.float32)


def test_causal_conv1d_fn_layouts_and_final_states_out() -> None:
    tensors = conv_tensors()
    room = torch.full((BATCH, WIDTH, 3), math.nan)
    out, final = causal_conv1d_fn(**tensors, return_final_states=True, final_states_out=room)
    assert final is room and torch.equal(room, tensors["x"][..., -3:])
    assert out.is_contiguous()
    tensors["x"] = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(causal_conv1d_fn(**tensors), out)
    assert causal_conv1d_fn(**tensors).transpose(1, 2).is_contiguous()


def test_causal_conv1d_fn_seq_idx() -> None:
    tensors = conv_tensors()
    seq_idx = torch.tensor([[0] * 8 + [1] * 12, [0] * 15 + [-1] * 5])
    out = causal_conv1d_fn(**tensors, seq_idx=seq_idx, activation="swish")
    alone = {**tensors, "x": tensors["x"][:1, :, 8:], "initial_states": torch.zeros(1, WIDTH, 3)}
    torch.testing.assert_close(out[:1, :, 8:], conv_oracle(**alone)[0])
    assert not out[1, :, 15:].any()


def test_causal_conv1d_fn_errors() -> None:
    tensors = conv_tensors()
    for changes, message in (
        (
            {"final_states_out": torch.empty(BATCH, WIDTH, 3)},
            "`final_states_out` is written only with return_final_states",
        ),
        ({"return_final_states": True, "final_states_out": torch.empty(1)}, "`final_states_out` must have shape"),
        ({"weight": torch.ones(LENGTH, 4)}, r"`weight` must have shape \(D, W\) = \(6, any\)"),
        ({"activation": "relu"}, "`activation` must be None, 'silu' or 'swish'"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv1d_fn(**(tensors | changes))


@pytest.mark.parametrize("size", [3, 5], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("steps", [None, 1, 2, 7], ids=lambda t: f"T {t}")
@pytest.mark.parametrize("rows", [None, [4, -1]], ids=["all rows", "indices"])
@pytest.mark.parametrize("circular", [False, True], ids=["shift", "circular"])
def test_causal_conv1d_update(circular: bool, rows: list[int] | None, steps: int | None, size: int) -> None:
    weight, bias = randn(WIDTH, 4), randn(WIDTH)
    x = randn(BATCH, WIDTH) if steps is None else randn(BATCH, WIDTH, steps)
    new = x[..., None] if steps is None else x
    pool = randn(BATCH if rows is None else 5, WIDTH, size)
    before = pool.clone()
    indices = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    seen = torch.tensor([11, 2], dtype=torch.int32) if circular else None
    out = causal_conv1d_update(x, pool, weight, bias, "silu", seen, indices)
    assert out.shape == x.shape
    for b, row in enumerate(rows or range(BATCH)):
        if row < 0:
            assert not out[b].any()
            continue
        # the inputs so far from old to new
        shift = int(seen[b]) % size if seen is not None else 0
        history = torch.cat([torch.roll(before[row], -shift, dims=-1), new[b]], dim=-1)
        expected, _ = conv_oracle(
            new[b : b + 1].double(), weight.double(), bias.double(), history[None, :, size - 3 : size].double()
        )
        assert_matches(out[b].reshape(WIDTH, -1), expected[0])
        shift = (shift + new.shape[-1]) % size if seen is not None else 0
        assert torch.equal(pool[row], torch.roll(history[:, -size:], shift, dims=-1))
    for row in set(range(len(pool))) - set(rows or range(BATCH)):
        assert torch.equal(pool[row], before[row])


def test_causal_conv1d_update_errors() -> None:
    x, state, weight = randn(BATCH, WIDTH), randn(BATCH, WIDTH, 3), randn(WIDTH, 4)
    seen = torch.zeros(BATCH).int()
    for arguments, error, message in (
        ((x[0], state, weight), ValueError, r"`x` must have shape \(B, D\) or \(B, D, T\)"),
        ((x, state, weight, None, "gelu"), ValueError, "`activation` must be"),
        ((x, state[..., 1:], weight, None, None, seen), ValueError, "must hold at least W - 1 = 3"),
        ((x, state, weight, None, None, seen.float()), TypeError, "`cache_seqlens` must have dtype int32, int64"),
        ((x, state, weight, None, None, seen[:1]), ValueError, r"`cache_seqlens` must have shape \(B,\) = \(2\)"),
        ((x, state, weight.clone().requires_grad_(), None, None, seen), RuntimeError, "`weight` requires one"),
    ):
        with pytest.raises(error, match=message):
            causal_conv1d_update(*arguments)


@pytest.mark.parametrize("state_len", [0, 1, 4])
@pytest.mark.parametrize("bounds", [[0, 10], [0, 2, 2, 9, 10], [0, 0]], ids=str)
def test_causal_conv1d_varlen_states(bounds: list[int], state_len: int) -> None:
    x = randn(bounds[-1], WIDTH)
    states = causal_conv1d_varlen_states(x, torch.tensor(bounds), state_len)
    assert states.shape == (len(bounds) - 1, WIDTH, state_len)
    for state, a, b in zip(states, bounds, bounds[1:], strict=False):
        assert torch.equal(state, pad(x[a:b].t(), (state_len, 0))[:, b - a : b - a + state_len])


def test_causal_conv1d_varlen_states_errors() -> None:
    with pytest.raises(ValueError, match="`state_len` must not be negative, got -1"):
        causal_conv1d_varlen_states(randn(4, 2), torch.tensor([0, 4]), -1)
    with pytest.raises(ValueError, match="`cu_seqlens` must rise from 0 to the length 4"):
        causal_conv1d_varlen_states(randn(4, 2), torch.tensor([0, 5]), 1)
