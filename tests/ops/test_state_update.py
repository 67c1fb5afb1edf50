"""The state updates against their oracles and against the parallel ops that they continue."""

import doctest
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_kernels import (
    backend,
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_state_update,
    ssd_chunk_scan,
    ssd_state_update,
)
from mamba_kernels.state_update import (
    causal_conv1d_update_eager,
    causal_conv1d_update_ref,
    selective_state_update_eager,
    selective_state_update_ref,
    ssd_state_update_eager,
    ssd_state_update_ref,
)

from .comparison import assert_matches

BATCH, CHANNELS, SIZE = 3, 8, 5
HEADS, HEAD_DIM = 4, 3
OPTIONS = ("D", "z", "dt_bias")
# None: a single token without a time dimension
TOKENS = [None, 1, 4]
ROWS = {
    "in order": None,
    "picked": [4, 0, 2],
    "padding": [2, -1, 0],
    "padding first": [-1, 0, -1],
    "all padding": [-1, -1, -1],
}
PRECISION = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
Tensors = dict[str, Tensor]


def tokens_id(tokens: int | None) -> str:
    return "single" if tokens is None else f"T{tokens}"


def _randn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return randn


def _rows(name: str) -> dict[str, Tensor]:
    rows = ROWS[name]
    return {} if rows is None else {"state_indices": torch.tensor(rows)}


def selective_inputs(
    tokens: int | None = None,
    groups: int | None = None,
    options: tuple[str, ...] = OPTIONS,
    states: int = BATCH,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    randn = _randn(tokens or 0)
    lead = (BATCH,) if tokens is None else (BATCH, tokens)
    middle = () if groups is None else (groups,)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "state": randn(states, CHANNELS, SIZE, dtype=wide),
        "x": randn(*lead, CHANNELS, dtype=dtype),
        "dt": randn(*lead, CHANNELS, dtype=dtype),
        "A": -randn(CHANNELS, SIZE, dtype=wide).abs(),
        "B": randn(*lead, *middle, SIZE, dtype=dtype),
        "C": randn(*lead, *middle, SIZE, dtype=dtype),
        "D": randn(CHANNELS, dtype=wide),
        "z": randn(*lead, CHANNELS, dtype=dtype),
        "dt_bias": randn(CHANNELS, dtype=wide),
    }
    return {name: value for name, value in inputs.items() if name not in OPTIONS or name in options}


def ssd_inputs(
    tokens: int | None = None,
    groups: int = 2,
    options: tuple[str, ...] = OPTIONS,
    states: int = BATCH,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    randn = _randn(tokens or 0)
    lead = (BATCH,) if tokens is None else (BATCH, tokens)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "state": randn(states, HEADS, HEAD_DIM, SIZE, dtype=wide),
        "x": randn(*lead, HEADS, HEAD_DIM, dtype=dtype),
        "dt": randn(*lead, HEADS, dtype=dtype),
        "A": -randn(HEADS, dtype=wide).abs(),
        "B": randn(*lead, groups, SIZE, dtype=dtype),
        "C": randn(*lead, groups, SIZE, dtype=dtype),
        "D": randn(HEADS, dtype=wide),
        "z": randn(*lead, HEADS, HEAD_DIM, dtype=dtype),
        "dt_bias": randn(HEADS, dtype=wide),
    }
    return {name: value for name, value in inputs.items() if name not in OPTIONS or name in options}


def compare(
    op: Callable[..., Any],
    oracle: Callable[..., Any],
    inputs: Tensors,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Outputs and the state left behind, against the oracle on the same values in fp64."""
    state = "conv_state" if "conv_state" in inputs else "state"
    ours = {name: value.clone() for name, value in inputs.items()}
    theirs = {name: value.double() for name, value in inputs.items()}
    theirs[state] = inputs[state].double().clone()
    # a state in fp64 is no more exact than the arithmetic
    state_dtype = min(inputs[state].dtype, max(dtype, torch.float32, key=PRECISION.index), key=PRECISION.index)
    found, expected = op(**ours, **options), oracle(**theirs, **options)
    if isinstance(found, tuple):
        assert found[1].dtype == ours[state].dtype
        assert_matches(found[1], expected[1], state_dtype, "step states")
        found, expected = found[0], expected[0]
    assert found.dtype == inputs["x"].dtype
    assert_matches(found, expected, dtype)
    assert_matches(ours[state], theirs[state], state_dtype, "state")
    for name, value in inputs.items():
        assert name == state or torch.equal(ours[name], value), f"{name} was changed"


@pytest.mark.parametrize("tokens", TOKENS, ids=tokens_id)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("steps", [False, True], ids=["y", "y+step states"])
def test_rows_of_the_state(rows: str, tokens: int | None, steps: bool) -> None:
    options = {**_rows(rows), "return_step_states": steps}
    states = BATCH if rows == "in order" else 5
    compare(selective_state_update, selective_state_update_ref, selective_inputs(tokens, states=states), **options)
    compare(ssd_state_update, ssd_state_update_ref, ssd_inputs(tokens, states=states), **options)


@pytest.mark.parametrize("tokens", TOKENS, ids=tokens_id)
@pytest.mark.parametrize("options", [(), *((name,) for name in OPTIONS), OPTIONS], ids="+".join)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_options(softplus: bool, options: tuple[str, ...], tokens: int | None) -> None:
    for groups in (None, 1, 2):
        inputs = selective_inputs(tokens, groups, options)
        compare(selective_state_update, selective_state_update_ref, inputs, dt_softplus=softplus)
    for groups, limit in product((1, 2, 4), ((0.0, math.inf), (0.3, 0.9), (-math.inf, math.inf))):
        inputs = ssd_inputs(tokens, groups, options)
        compare(ssd_state_update, ssd_state_update_ref, inputs, dt_softplus=softplus, dt_limit=limit)


def test_skip_weight_per_channel_of_a_head() -> None:
    inputs = ssd_inputs(4)
    inputs["D"] = torch.randn(HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    compare(ssd_state_update, ssd_state_update_ref, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    compare(selective_state_update, selective_state_update_ref, selective_inputs(3, dtype=dtype), dtype)
    compare(ssd_state_update, ssd_state_update_ref, ssd_inputs(3, dtype=dtype), dtype)
    # the state in low precision, the inputs not
    for op, oracle, inputs in (
        (selective_state_update, selective_state_update_ref, selective_inputs()),
        (ssd_state_update, ssd_state_update_ref, ssd_inputs()),
    ):
        inputs["state"] = inputs["state"].to(dtype)
        compare(op, oracle, inputs)
        compare(
            op,
            oracle,
            {**inputs, "state": inputs["state"].repeat(2, *(1,) * (inputs["state"].dim() - 1))},
            **_rows("picked"),
        )


def test_strided_state_and_inputs() -> None:
    for op, oracle, inputs in (
        (selective_state_update, selective_state_update_ref, selective_inputs(2, 2)),
        (ssd_state_update, ssd_state_update_ref, ssd_inputs(2)),
    ):
        strided = {name: value.unsqueeze(-1).expand(*value.shape, 2)[..., 0] for name, value in inputs.items()}
        strided["state"] = inputs["state"]
        expected_state, found_state = inputs["state"].clone(), inputs["state"].mT.contiguous().mT
        expected = oracle(**{**inputs, "state": expected_state})
        assert not found_state.is_contiguous()
        assert_matches(op(**{**strided, "state": found_state}), expected)
        assert_matches(found_state, expected_state)
        row_major = torch.zeros(BATCH + 2, 2, *inputs["state"].shape[1:])
        view = row_major[1:-1, 1]
        view.copy_(inputs["state"])
        op(**{**strided, "state": view})
        assert_matches(view, expected_state)
        assert (row_major[:, 0] == 0).all() and (row_major[[0, -1]] == 0).all()


@pytest.mark.parametrize("dt", [-20.0, 20.0])
def test_extreme_steps(dt: float) -> None:
    inputs = selective_inputs(4, options=("D",))
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    inputs["A"] = -torch.tensor([0.01, 0.3, 1.0, 4.0, 16.0]).expand(CHANNELS, SIZE)
    compare(selective_state_update, selective_state_update_ref, inputs)
    inputs = ssd_inputs(4, options=("D",))
    inputs["dt"] = torch.full_like(inputs["dt"], dt)
    inputs["A"] = -torch.tensor([0.01, 1.0, 4.0, 16.0])
    compare(ssd_state_update, ssd_state_update_ref, inputs)


@pytest.mark.parametrize("groups", [None, 2], ids=lambda g: f"G{g}")
def test_steps_equal_the_selective_scan(groups: int | None) -> None:
    inputs = selective_inputs(9, groups)
    per_token = ("x", "dt", "B", "C", "z")
    arguments = {name: value for name, value in inputs.items() if name != "state"}
    y, final = selective_scan(**arguments, initial_states=inputs["state"], return_final_states=True)
    for cut in (range(1, 9), [4], []):
        state, outputs = inputs["state"].clone(), []
        for a, b in zip([0, *cut], [*cut, 9], strict=True):
            part = {name: value[:, a:b] if name in per_token else value for name, value in arguments.items()}
            outputs.append(selective_state_update(state, **part))
        assert_matches(torch.cat(outputs, dim=1), y)
        assert_matches(state, final)
    state, outputs = inputs["state"].clone(), []
    for t in range(9):
        part = {name: value[:, t] if name in per_token else value for name, value in arguments.items()}
        outputs.append(selective_state_update(state, **part))
    assert_matches(torch.stack(outputs, dim=1), y)


def test_steps_equal_the_chunk_scan() -> None:
    inputs = ssd_inputs(9)
    per_token = ("x", "dt", "B", "C", "z")
    arguments = {name: value for name, value in inputs.items() if name != "state"}
    limit = (0.01, 1.5)
    y, final = ssd_chunk_scan(**arguments, initial_states=inputs["state"], dt_limit=limit, return_final_states=True)
    state, outputs = inputs["state"].clone(), []
    for a, b in ((0, 1), (1, 2), (2, 6), (6, 9)):
        part = {name: value[:, a:b] if name in per_token else value for name, value in arguments.items()}
        outputs.append(ssd_state_update(state, **part, dt_limit=limit))
    assert_matches(torch.cat(outputs, dim=1), y)
    assert_matches(state, final)


def test_step_states_continue_exactly() -> None:
    inputs = selective_inputs(5)
    state = inputs["state"].clone()
    _, steps = selective_state_update(**{**inputs, "state": state}, return_step_states=True)
    assert torch.equal(steps[:, -1], state)
    state = inputs["state"].clone()
    short = {k: v[:, :2] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    selective_state_update(**{**short, "state": state})
    # not the same bits: the last elements of a buffer, which a vectorised softplus rounds otherwise, are others
    torch.testing.assert_close(steps[:, 1], state, rtol=1e-6, atol=1e-6)


def conv_inputs(
    tokens: int | None,
    width: int = 4,
    kept: int = 4,
    bias: bool = True,
    states: int = BATCH,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    randn = _randn(width)
    lead = (BATCH,) if tokens is None else (BATCH, tokens)
    inputs = {
        "x": randn(*lead, CHANNELS, dtype=dtype),
        "conv_state": randn(states, CHANNELS, kept, dtype=dtype),
        "weight": randn(CHANNELS, width, dtype=dtype),
    }
    return {**inputs, "bias": randn(CHANNELS, dtype=dtype)} if bias else inputs


@pytest.mark.parametrize("tokens", [*TOKENS, 9], ids=tokens_id)
@pytest.mark.parametrize(("width", "kept"), [(4, 3), (4, 4), (4, 7), (2, 1), (1, 0), (1, 3)], ids=lambda n: str(n))
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_convolution(activation: str | None, width: int, kept: int, tokens: int | None) -> None:
    for bias in (False, True):
        inputs = conv_inputs(tokens, width, kept, bias)
        compare(causal_conv1d_update, causal_conv1d_update_ref, inputs, activation=activation)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tokens", TOKENS, ids=tokens_id)
def test_convolution_rows(rows: str, tokens: int | None) -> None:
    inputs = conv_inputs(tokens, states=BATCH if rows == "in order" else 5)
    compare(causal_conv1d_update, causal_conv1d_update_ref, inputs, activation="silu", **_rows(rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_convolution_dtypes(dtype: torch.dtype) -> None:
    inputs = conv_inputs(3, dtype=dtype)
    compare(causal_conv1d_update, causal_conv1d_update_ref, inputs, dtype, activation="silu")
    state = inputs["conv_state"].clone()
    causal_conv1d_update(**{**inputs, "conv_state": state})
    assert torch.equal(state[..., 1:], inputs["x"].mT) and torch.equal(state[..., 0], inputs["conv_state"][..., 3])


def test_convolution_steps_equal_the_parallel_op() -> None:
    inputs = conv_inputs(9, kept=3)
    weight, bias = inputs["weight"], inputs["bias"]
    y, final = causal_conv1d(
        inputs["x"],
        weight,
        bias,
        activation="silu",
        initial_states=inputs["conv_state"],
        return_final_states=True,
    )
    state, outputs = inputs["conv_state"].clone(), []
    for a, b in ((0, 1), (1, 2), (2, 6), (6, 9)):
        outputs.append(causal_conv1d_update(inputs["x"][:, a:b], state, weight, bias, "silu"))
    assert_matches(torch.cat(outputs, dim=1), y)
    assert torch.equal(state, final)


def test_padding_may_hold_anything() -> None:
    rows = torch.tensor([3, -1, 0])
    for op, inputs in (
        (selective_state_update, selective_inputs(2, states=5)),
        (ssd_state_update, ssd_inputs(2, states=5)),
        (causal_conv1d_update, conv_inputs(2, states=5)),
    ):
        name = "conv_state" if "conv_state" in inputs else "state"
        clean = {key: value.clone() for key, value in inputs.items()}
        expected = op(**clean, state_indices=rows)
        poisoned = {key: value.clone() for key, value in inputs.items()}
        poisoned["x"][1] = math.nan
        found = op(**poisoned, state_indices=rows)
        assert torch.equal(found, expected) and (found[1] == 0).all()
        assert torch.equal(poisoned[name], clean[name])
        assert torch.equal(clean[name][[1, 2, 4]], inputs[name][[1, 2, 4]])


def test_autocast_does_not_lower_the_precision() -> None:
    for op, inputs in (
        (selective_state_update, selective_inputs(2)),
        (ssd_state_update, ssd_inputs(2)),
        (causal_conv1d_update, conv_inputs(2)),
    ):
        name = "conv_state" if "conv_state" in inputs else "state"
        expected = op(**{**inputs, name: inputs[name].clone()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(op(**{**inputs, name: inputs[name].clone()}), expected)


@pytest.mark.parametrize("rows", ["in order", "padding"])
def test_compile_fullgraph(rows: str) -> None:
    states = BATCH if rows == "in order" else 5
    for op, inputs in (
        (selective_state_update, selective_inputs(states=states)),
        (ssd_state_update, ssd_inputs(states=states)),
        (causal_conv1d_update, conv_inputs(None, states=states)),
    ):
        name = "conv_state" if "conv_state" in inputs else "state"
        torch._dynamo.reset()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        states_left = []
        for function in (op, compiled):
            state = inputs[name].clone()
            states_left.append((function(**{**inputs, name: state}, **_rows(rows)), state))
        for found, expected in zip(states_left[1], states_left[0], strict=True):
            assert_matches(found, expected)


def test_backend_choice() -> None:
    for op, eager, reference, inputs in (
        (selective_state_update, selective_state_update_eager, selective_state_update_ref, selective_inputs()),
        (ssd_state_update, ssd_state_update_eager, ssd_state_update_ref, ssd_inputs()),
        (causal_conv1d_update, causal_conv1d_update_eager, causal_conv1d_update_ref, conv_inputs(None)),
    ):
        for name, implementation in (("eager", eager), ("reference", reference)):
            with backend(name):
                found = op(**{key: value.clone() for key, value in inputs.items()})
            assert torch.equal(found, implementation(**{key: value.clone() for key, value in inputs.items()}))


@pytest.mark.parametrize(
    "op", [selective_state_update, ssd_state_update, causal_conv1d_update], ids=lambda f: f.__name__
)
def test_docstring_examples(op: Callable[..., Any]) -> None:
    (example,) = doctest.DocTestFinder().find(op, op.__name__, globs={})
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=len(example.examples))


def test_gradients_are_refused() -> None:
    for op, parallel, inputs, name in (
        (selective_state_update, "selective_scan", selective_inputs(), "A"),
        (ssd_state_update, "ssd_chunk_scan", ssd_inputs(), "state"),
        (causal_conv1d_update, "causal_conv1d", conv_inputs(None), "weight"),
    ):
        inputs[name].requires_grad_()
        message = f"`{name}` requires one; run it under torch.no_grad.*or use {parallel} with initial_states"
        with pytest.raises(RuntimeError, match=message):
            op(**inputs)
        with torch.no_grad():
            op(**inputs)


ONE = torch.ones
SELECTIVE_ERRORS = {
    "no tensor": ({"x": 1.0}, TypeError, "`x` must be a torch.Tensor, got float"),
    "missing A": ({"A": None}, TypeError, "`A` must be a torch.Tensor, got NoneType"),
    "integer state": ({"state": ONE(3, 8, 5).int()}, TypeError, "`state` must have dtype"),
    "1-D x": ({"x": ONE(8)}, ValueError, r"`x` must have shape \(B, D\), or \(B, T, D\) with T >= 1, got \(8,\)"),
    "no tokens": ({"x": ONE(3, 0, 8)}, ValueError, "with T >= 1"),
    "dt": ({"dt": ONE(3, 1)}, ValueError, r"`dt` must have shape \(B, D\) = \(3, 8\)"),
    "A": ({"A": ONE(5, 8)}, ValueError, r"`A` must have shape \(D, N\)"),
    "state": ({"state": ONE(3, 5, 8)}, ValueError, r"`state` must have shape \(S, D, N\) = \(any, 8, 5\)"),
    "B": ({"B": ONE(3, 4)}, ValueError, r"`B` must have shape \(B, N\) = \(3, 5\)"),
    "C": ({"C": ONE(3, 2, 5)}, ValueError, r"`C` must have shape \(B, N\)"),
    "C's groups": (
        {"B": ONE(3, 2, 5), "C": ONE(3, 1, 5)},
        ValueError,
        r"`C` must have shape \(B, G, N\) = \(3, 2, 5\)",
    ),
    "groups": ({"B": ONE(3, 3, 5), "C": ONE(3, 3, 5)}, ValueError, "the 3 groups of `B` must divide the 8 channels"),
    "D": ({"D": ONE(5)}, ValueError, r"`D` must have shape \(D,\) = \(8\)"),
    "dt_bias": ({"dt_bias": ONE(5)}, ValueError, r"`dt_bias` must have shape \(D,\)"),
    "z": ({"z": ONE(3, 1, 8)}, ValueError, r"`z` must have shape \(B, D\)"),
    "z's dtype": ({"z": ONE(3, 8).half()}, TypeError, "`z` must have dtype float32, got float16"),
    "rows": ({"state": ONE(4, 8, 5)}, ValueError, "one row for each of the 3 batch entries, got 4"),
    "indices' dtype": ({"state_indices": ONE(3)}, TypeError, "`state_indices` must have dtype int32, int64"),
    "indices' shape": ({"state_indices": ONE(2).int()}, ValueError, r"`state_indices` must have shape \(B,\) = \(3\)"),
    "device": ({"D": ONE(8, device="meta")}, ValueError, "`D` is on meta but `x` is on cpu"),
}
SSD_ERRORS = {
    "x": ({"x": ONE(3, 12)}, ValueError, r"`x` must have shape \(B, H, P\), or \(B, T, H, P\)"),
    "dt": ({"dt": ONE(3, 4, 3)}, ValueError, r"`dt` must have shape \(B, H\) = \(3, 4\)"),
    "A": ({"A": ONE(4, 5)}, ValueError, r"`A` must have shape \(H,\) = \(4\)"),
    "state": ({"state": ONE(3, 12, 5)}, ValueError, r"`state` must have shape \(S, H, P, N\)"),
    "B": ({"B": ONE(3, 5)}, ValueError, r"`B` must have shape \(B, G, N\)"),
    "C": ({"C": ONE(3, 1, 5)}, ValueError, r"`C` must have shape \(B, G, N\) = \(3, 2, 5\)"),
    "groups": ({"B": ONE(3, 3, 5), "C": ONE(3, 3, 5)}, ValueError, "the 3 groups of `B` must divide the 4 channels"),
    "D": ({"D": ONE(3)}, ValueError, r"`D` must have shape \(H,\) = \(4\)"),
    "2-D D": ({"D": ONE(3, 4)}, ValueError, r"`D` must have shape \(H, P\) = \(4, 3\)"),
    "dt_bias": ({"dt_bias": ONE(12)}, ValueError, r"`dt_bias` must have shape \(H,\)"),
    "z": ({"z": ONE(3, 12)}, ValueError, r"`z` must have shape \(B, H, P\)"),
    "dt_limit": ({"dt_limit": (1.0, 0.5)}, ValueError, r"`dt_limit` must be .* got \(1.0, 0.5\)"),
}
CONV_ERRORS = {
    "x": ({"x": ONE(8)}, ValueError, r"`x` must have shape \(B, D\), or \(B, T, D\)"),
    "weight": ({"weight": ONE(8, 1, 4)}, ValueError, r"`weight` must have shape \(D, W\)"),
    "no taps": ({"weight": ONE(8, 0)}, ValueError, r"`weight` must have shape \(D, W\) with W >= 1"),
    "conv_state": ({"conv_state": ONE(3, 4, 8)}, ValueError, r"`conv_state` must have shape \(S, D, K\)"),
    "short state": ({"conv_state": ONE(3, 8, 2)}, ValueError, "must keep at least W - 1 = 3 tokens, got 2"),
    "rows": ({"conv_state": ONE(4, 8, 4)}, ValueError, "`conv_state` must have one row for each of the 3"),
    "bias": ({"bias": ONE(4)}, ValueError, r"`bias` must have shape \(D,\)"),
    "activation": ({"activation": "gelu"}, ValueError, "`activation` must be None, 'silu' or 'swish', got 'gelu'"),
}
ERRORS = [
    pytest.param(op, {**inputs, **changes}, error, message, id=f"{op.__name__}: {name}")
    for op, inputs, cases in (
        (selective_state_update, selective_inputs(), SELECTIVE_ERRORS),
        (ssd_state_update, ssd_inputs(), SSD_ERRORS),
        (causal_conv1d_update, conv_inputs(None), CONV_ERRORS),
    )
    for name, (changes, error, message) in cases.items()
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), ERRORS)
def test_errors(op: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op(**arguments)
