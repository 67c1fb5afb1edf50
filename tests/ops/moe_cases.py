"""Calls of the routed experts' ops and how they are compared with their fp64 oracles.

Symbols: N tokens, d model width, E experts, k experts per token, F expert width.
"""

from typing import Any

import torch
from torch import Tensor

import mamba_kernels
from mamba_kernels.moe import experts_step, reference, route, routed_experts

FP32 = torch.float32

TOY_CASES: dict[str, dict[str, Any]] = {
    "route": {"op": "route"},
    "route-top2-normalised": {"op": "route", "top_k": 2, "normalize": True, "scale": 2.5},
    "route-sigmoid-bias": {"op": "route", "top_k": 3, "scoring": "sigmoid", "bias": True},
    "route-sigmoid-normalised": {"op": "route", "top_k": 2, "scoring": "sigmoid", "normalize": True, "channels": 70},
    "route-one-expert": {"op": "route", "experts": 1},
    "route-many-experts": {"op": "route", "experts": 37, "tokens": 33, "top_k": 4},
    "experts": {"op": "experts"},
    "experts-strided-choice": {"op": "experts", "strided": True},
    "experts-gated": {"op": "experts", "gated": True, "activation": "silu", "top_k": 2},
    "experts-gelu-biases": {"op": "experts", "gated": True, "activation": "gelu", "bias": True, "top_k": 3},
    "experts-biases": {"op": "experts", "activation": "silu", "bias": True},
    "experts-elsewhere": {"op": "experts", "missing": 2, "top_k": 2, "bias": True},
    "experts-of-one-token": {"op": "experts", "tokens": 1, "gated": True},
    "experts-of-many-tokens": {"op": "experts", "tokens": 1100, "experts": 3, "channels": 4, "inner": 4},
    "one-expert": {"op": "experts", "experts": 1},
    "products": {"op": "products"},
    "products-gated": {"op": "products", "gated": True, "activation": "gelu", "top_k": 2, "channels": 40, "inner": 24},
    "products-of-missing": {"op": "products", "missing": 2, "gated": True, "top_k": 2, "tokens": 60, "experts": 2},
    "products-alone": {"op": "products", "activation": "none", "channels": 20},
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
    top_k: int = 1,
    activation: str = "relu",
    gated: bool = False,
    missing: int = 0,
    strided: bool = False,
    **sizes: Any,
) -> dict[str, float]:
    """`missing`: so many numbers of experts that do not exist are among the choices; `strided`: the choices lie apart."""
    operands = make_operands(gated=gated, **sizes)
    x, up = operands["x"], operands["up"]
    assert x is not None and up is not None
    scores = torch.rand(x.shape[0], up.shape[0] + missing, device=x.device)
    weights, indices = scores.topk(top_k)
    indices = indices.clamp(max=up.shape[0])
    if strided:
        indices = torch.stack([indices, indices + 1], dim=-1)[..., 0]
    operands = {"x": x, "weights": weights, **{name: v for name, v in operands.items() if name != "x"}}

    def call(fn: Any) -> Any:
        return lambda x, weights, **rest: (fn(x, indices, weights, **rest, activation=activation, gated=gated),)

    return compare(call(routed_experts), call(reference.routed_experts_ref), operands, ["result"])


@torch.no_grad()
def errors_of_products(
    top_k: int = 1,
    activation: str = "relu",
    gated: bool = False,
    missing: int = 0,
    tuning: tuple[int, ...] | None = (16, 16, 16, 1, 1),
    **sizes: Any,
) -> dict[str, float]:
    """The Triton product of rows with their experts' matrices, of gathered tokens and with an activation."""
    from mamba_kernels.moe import triton_grouped, triton_plan

    operands = make_operands(gated=gated, **sizes)
    x, up = operands["x"], operands["up"]
    assert x is not None and up is not None
    indices = torch.rand(x.shape[0], up.shape[0] + missing, device=x.device).topk(top_k).indices
    plan = triton_plan.make_plan(indices, up.shape[0])
    order = indices.clamp(max=up.shape[0]).flatten().sort(stable=True)
    rows = triton_plan.gather(x, plan, x.dtype)
    errors = {"plan": 0.0 if torch.equal(plan.slot_of_row.long(), order.indices) else float("inf")}
    found = [
        triton_grouped.grouped_rows(x, plan, up, activation, gated, keep=True, gather=True, tuning=tuning),
        triton_grouped.grouped_rows(rows, plan, up, activation, gated, keep=True, tuning=tuning),
    ]
    count = int((order.values < up.shape[0]).sum())
    experts = order.values[:count]
    h = torch.einsum("sd,sfd->sf", x.double()[order.indices[:count] // top_k], up.double()[experts])
    inner = h.chunk(2, dim=1)[0] if gated else h
    a = inner if activation == "none" else reference.activation_ref(inner, activation)
    if gated:
        a = a * h.chunk(2, dim=1)[1]
    for name, (kept, result) in zip(("gathered", "rows"), found, strict=True):
        assert kept is not None
        errors |= {f"h, {name}": relative(kept[:count], h), f"a, {name}": relative(result[:count], a)}
    return errors


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
    actual = experts_step(**operands, **choice, **options)
    expected = reference.experts_step_ref(**operands, **choice, **options)
    errors = {
        name: relative(a, e) for name, a, e in zip(("result", "indices", "weights"), actual, expected, strict=True)
    }
    dtype = torch.promote_types(up.dtype, FP32) if residual else up.dtype
    return errors | {"dtype": 0.0 if actual[0].dtype == dtype else float("inf")}


def errors_of_case(op: str, implementation: str = "triton", **case: Any) -> dict[str, float]:
    """RMS-relative errors of results and gradients against the oracle; infinite where something is not finite."""
    with mamba_kernels.backend(implementation):
        ops = {
            "route": errors_of_route,
            "experts": errors_of_experts,
            "step": errors_of_step,
            "products": errors_of_products,
        }
        return ops[op](**case)
