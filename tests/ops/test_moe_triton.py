"""Routed experts in Triton against the fp64 oracles.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.

Symbols: N tokens, d model width, E experts, k experts per token, F expert width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_kernels
from mamba_kernels.moe import experts_step, reference, route, routed_experts

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors

pytest.importorskip("triton")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

TOY_CASES: dict[str, dict[str, Any]] = {
    "route": {"op": "route"},
    "route-top2-normalised": {"op": "route", "top_k": 2, "normalize": True, "scale": 2.5},
    "route-sigmoid-bias": {"op": "route", "top_k": 3, "scoring": "sigmoid", "bias": True},
    "route-sigmoid-normalised": {"op": "route", "top_k": 2, "scoring": "sigmoid", "normalize": True, "channels": 70},
    "route-one-expert": {"op": "route", "experts": 1},
    "route-many-experts": {"op": "route", "experts": 37, "tokens": 33, "top_k": 4},
    "experts": {"op": "experts"},
    "experts-gated": {"op": "experts", "gated": True, "activation": "silu", "top_k": 2},
    "experts-gelu-biases": {"op": "experts", "gated": True, "activation": "gelu", "bias": True, "top_k": 3},
    "experts-biases": {"op": "experts", "activation": "silu", "bias": True},
    "experts-elsewhere": {"op": "experts", "missing": 2, "top_k": 2, "bias": True},
    "experts-of-one-token": {"op": "experts", "tokens": 1, "gated": True},
    "experts-of-many-tokens": {"op": "experts", "tokens": 1100, "experts": 3, "channels": 4, "inner": 4},
    "one-expert": {"op": "experts", "experts": 1},
    "step": {"op": "step"},
    "step-four-tokens": {"op": "step", "tokens": 4, "gated": True, "top_k": 2, "activation": "gelu"},
    "step-five-tokens": {"op": "step", "tokens": 5, "gated": True},
    "step-biases": {"op": "step", "tokens": 2, "gated": True, "bias": True, "activation": "silu", "residual": True},
    "step-norm": {"op": "step", "norm": True, "residual": True, "top_k": 2, "normalize": True, "scale": 1.5},
    "step-sigmoid": {"op": "step", "scoring": "sigmoid", "top_k": 5, "channels": 36, "inner": 20},
    "step-told": {"op": "step", "told": True, "missing": 2, "top_k": 2, "tokens": 3, "bias": True},
}


def make_operands(
    tokens: int = 19,
    channels: int = 8,
    experts: int = 5,
    inner: int = 12,
    gated: bool = False,
    bias: bool = False,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Tokens and weights, of usual size."""

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    width = 2 * inner if gated else inner
    return {
        "x": randn(tokens, channels),
        "up": randn(experts, width, channels, scale=channels**-0.5),
        "down": randn(experts, channels, inner, scale=inner**-0.5),
        "up_bias": randn(experts, width) if bias else None,
        "down_bias": randn(experts, channels) if bias else None,
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(actual).all()) or actual.shape != expected.shape:
        return float("inf")
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp(min=1e-30))


def differentiate(run: Any, leaves: dict[str, Tensor | None], names: list[str]) -> dict[str, Tensor]:
    """Named outputs of `run(**leaves)` and the gradients of the sum of their sines, which differ from output to output."""
    present = {name: value for name, value in leaves.items() if value is not None}
    outputs = dict(zip(names, run(**leaves), strict=True))
    total = sum((factor * output.double().sin()).sum() for factor, output in enumerate(outputs.values(), 1))
    gradients = torch.autograd.grad(total, list(present.values()))
    for (name, leaf), gradient in zip(present.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, name
        outputs[f"gradient of {name}"] = gradient
    return {name: value.detach() for name, value in outputs.items()}


def compare(ours: Any, oracle: Any, operands: dict[str, Tensor | None], names: list[str]) -> dict[str, float]:
    leaves = {name: None if v is None else v.detach().requires_grad_() for name, v in operands.items()}
    exact = {name: None if v is None else v.detach().double().requires_grad_() for name, v in operands.items()}
    with mamba_kernels.backend("triton"):
        actual = differentiate(ours, leaves, names)
    expected = differentiate(oracle, exact, names)
    return {name: relative(actual[name], expected[name]) for name in expected}


def errors_of_route(
    top_k: int = 1,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    tokens: int = 19,
    channels: int = 8,
    experts: int = 5,
    bias: bool = False,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
) -> dict[str, float]:
    options: tuple[Any, ...] = (top_k, scoring, normalize, scale)
    operands: dict[str, Tensor | None] = {
        "x": torch.randn(tokens, channels, device=device).to(dtype),
        "weight": torch.randn(experts, channels, device=device) * channels**-0.5,
        "bias": torch.randn(experts, device=device) if bias else None,
    }
    chosen: list[Tensor] = []

    def ours(**leaves: Any) -> tuple[Tensor, ...]:
        logits, weights, indices = route(*leaves.values(), *options)
        assert logits.dtype == weights.dtype == FP32 and indices.dtype == torch.int64
        chosen.append(indices)
        return logits, weights

    def oracle(**leaves: Any) -> tuple[Tensor, ...]:
        logits, weights, indices = reference.route_ref(*leaves.values(), *options)
        chosen.append(indices)
        return logits, weights

    errors = compare(ours, oracle, operands, ["logits", "weights"])
    return errors | {"choice": 0.0 if torch.equal(*chosen) else float("inf")}


def errors_of_experts(
    top_k: int = 1, activation: str = "relu", gated: bool = False, missing: int = 0, **sizes: Any
) -> dict[str, float]:
    """`missing`: so many numbers of experts that do not exist are among the choices."""
    operands = make_operands(gated=gated, **sizes)
    x, up = operands["x"], operands["up"]
    assert x is not None and up is not None
    scores = torch.rand(x.shape[0], up.shape[0] + missing, device=x.device)
    weights, indices = scores.topk(top_k)
    indices = indices.clamp(max=up.shape[0])
    operands = {"x": x, "weights": weights, **{name: v for name, v in operands.items() if name != "x"}}

    def call(fn: Any) -> Any:
        return lambda x, weights, **rest: (fn(x, indices, weights, **rest, activation=activation, gated=gated),)

    return compare(call(routed_experts), call(reference.routed_experts_ref), operands, ["result"])


@torch.no_grad()
def errors_of_step(
    top_k: int = 1,
    activation: str = "relu",
    gated: bool = False,
    norm: bool = False,
    residual: bool = False,
    told: bool = False,
    missing: int = 0,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    **sizes: Any,
) -> dict[str, float]:
    operands = make_operands(gated=gated, **{"tokens": 1} | sizes)
    x, up = operands["x"], operands["up"]
    assert x is not None and up is not None
    device = x.device
    logits = torch.randn(x.shape[0], up.shape[0] + missing, device=device)
    if told:
        weights, indices = logits.sigmoid().topk(top_k)
        choice = {"weights": weights, "indices": indices.clamp(max=up.shape[0])}
    else:
        choice = {"router_logits": logits}
    options: dict[str, Any] = {"activation": activation, "gated": gated}
    options |= {"top_k": top_k, "scoring": scoring, "normalize": normalize, "scale": scale, "eps": 1e-3}
    options["norm_weight"] = torch.randn(x.shape[1], device=device).to(x.dtype) if norm else None
    options["residual"] = torch.randn(x.shape, device=device) if residual else None
    with mamba_kernels.backend("triton"):
        actual = experts_step(**operands, **choice, **options)
    expected = reference.experts_step_ref(**operands, **choice, **options)
    errors = {
        name: relative(a, e) for name, a, e in zip(("result", "indices", "weights"), actual, expected, strict=True)
    }
    dtype = torch.promote_types(up.dtype, FP32) if residual else up.dtype
    return errors | {"dtype": 0.0 if actual[0].dtype == dtype else float("inf")}


def errors_of_case(op: str, **case: Any) -> dict[str, float]:
    return {"route": errors_of_route, "experts": errors_of_experts, "step": errors_of_step}[op](**case)


@pytest.fixture(scope="module")
def interpreted() -> Errors:
    return errors_under_interpreter(__name__)


@pytest.mark.parametrize("case", TOY_CASES)
def test_under_the_interpreter(interpreted: Errors, case: str) -> None:
    wrong = {name: error for name, error in interpreted[case].items() if not error <= 1e-5}
    assert not wrong


GPU_CASES: dict[str, dict[str, Any]] = {
    "route": {"op": "route", "tokens": 257, "channels": 512, "experts": 42},
    "route-top2": {"op": "route", "tokens": 100, "channels": 96, "experts": 8, "top_k": 2, "normalize": True},
    "route-sigmoid": {"op": "route", "tokens": 65, "channels": 1024, "experts": 64, "top_k": 4, "scoring": "sigmoid"},
    "experts-relu": {"op": "experts", "tokens": 257, "channels": 64, "inner": 96, "experts": 6},
    "experts-gated": {
        "op": "experts",
        "tokens": 200,
        "channels": 96,
        "inner": 64,
        "top_k": 2,
        "gated": True,
        "activation": "silu",
        "experts": 7,
    },
    "experts-biases": {
        "op": "experts",
        "tokens": 100,
        "channels": 64,
        "inner": 128,
        "top_k": 2,
        "gated": True,
        "activation": "gelu",
        "bias": True,
        "missing": 2,
    },
    "step": {"op": "step", "channels": 512, "inner": 1536, "experts": 42},
    "step-gated": {
        "op": "step",
        "tokens": 4,
        "channels": 768,
        "inner": 320,
        "experts": 8,
        "top_k": 2,
        "gated": True,
        "activation": "silu",
        "residual": True,
        "norm": True,
        "normalize": True,
    },
    "step-biases": {"op": "step", "tokens": 3, "channels": 64, "inner": 96, "bias": True, "gated": True, "told": True},
}
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@DTYPES
@pytest.mark.parametrize("case", GPU_CASES)
def test_on_gpu(case: str, dtype: torch.dtype) -> None:
    errors = errors_of_case(**GPU_CASES[case], dtype=dtype, device="cuda")
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCES[dtype]}
    assert not wrong


@pytest.mark.gpu
def test_logits_of_bf16_tokens_are_those_of_fp32_on_gpu() -> None:
    x, weight = torch.randn(1000, 1024, device="cuda").to(BF16), torch.randn(32, 1024, device="cuda")
    logits, _, _ = route(x, weight)
    exact = x.double() @ weight.double().T
    assert ((logits - exact).abs().max() / exact.abs().max()).item() <= 1e-6


@pytest.mark.gpu
def test_same_bits_every_time_on_gpu() -> None:
    operands = make_operands(4000, 256, 16, 512, gated=True, bias=True, dtype=BF16, device="cuda")
    leaves = {name: None if v is None else v.requires_grad_() for name, v in operands.items()}
    indices = torch.rand(4000, 16, device="cuda").topk(2).indices
    weights = torch.rand(4000, 2, device="cuda", requires_grad=True)

    def run(x: Tensor, weights: Tensor, **rest: Any) -> tuple[Tensor, ...]:
        return (routed_experts(x, indices, weights, **rest, gated=True),)

    first = differentiate(run, {**leaves, "weights": weights}, ["result"])
    for _ in range(5):
        again = differentiate(run, {**leaves, "weights": weights}, ["result"])
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@torch.no_grad()
def test_steps_and_layers_are_captured_on_gpu() -> None:
    """A graph that was captured with one choice of experts computes another one; nothing waits for the host."""
    operands = make_operands(64, 128, 8, 192, gated=True, dtype=BF16, device="cuda")
    x, weights = operands.pop("x"), torch.randn(8, 128, device="cuda")
    assert x is not None

    def layer(tokens: Tensor) -> Tensor:
        _, w, indices = route(tokens, weights)
        return routed_experts(tokens, indices, w, **operands, gated=True)

    def step(tokens: Tensor) -> Tensor:
        logits = mamba_kernels.fused_linear(tokens[:2], weights)
        return experts_step(tokens[:2], **operands, gated=True, router_logits=logits)[0]

    for run in (layer, step):
        static = x.clone()
        run(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(static)
        for _ in range(3):
            static.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(out, run(static.clone()), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_second_derivative_is_refused_on_gpu() -> None:
    operands = make_operands(8, 64, 4, 64, device="cuda")
    x = operands.pop("x")
    assert x is not None
    x.requires_grad_()
    y = routed_experts(
        x, torch.zeros(8, 1, dtype=torch.int64, device="cuda"), torch.ones(8, 1, device="cuda"), **operands
    )
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        gradient.sum().backward()


if __name__ == "__main__":
    print_errors(errors_of_case, TOY_CASES)
