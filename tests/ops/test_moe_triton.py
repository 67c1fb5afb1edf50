"""Routed experts in Triton against the fp64 oracles.

Tests marked `gpu` run the compiled kernels. The others run the same kernels under Triton's interpreter, at toy sizes.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_kernels
from mamba_kernels.early import early_launches
from mamba_kernels.moe import experts_step, route, routed_experts

from .comparison import TOLERANCES
from .interpreter import Errors, errors_under_interpreter, print_errors
from .moe_cases import TOY_CASES, differentiate, errors_of_case, make_operands

pytest.importorskip("triton")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


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
    # enough rows for the large tiles of half precision; widths that they do not divide
    "experts-many-tokens": {
        "op": "experts",
        "tokens": 1500,
        "channels": 200,
        "inner": 264,
        "gated": True,
        "activation": "silu",
        "experts": 9,
        "missing": 1,
    },
    "products": {
        "op": "products",
        "tokens": 100,
        "channels": 96,
        "inner": 80,
        "tuning": None,
        "top_k": 2,
        "missing": 2,
    },
    "products-gated": {"op": "products", "tokens": 300, "channels": 512, "inner": 192, "gated": True, "tuning": None},
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
@DTYPES
def test_steps_and_layers_are_captured_on_gpu(dtype: torch.dtype) -> None:
    """A graph that was captured with one choice of experts computes another one; nothing waits for the host."""
    operands = make_operands(64, 128, 8, 192, gated=True, dtype=dtype, device="cuda")
    x, weights = operands.pop("x"), torch.randn(8, 128, device="cuda")
    assert x is not None

    def layer(tokens: Tensor) -> Tensor:
        _, w, indices = route(tokens, weights)
        return routed_experts(tokens, indices, w, **operands, gated=True)

    def step(tokens: Tensor) -> Tensor:
        logits = mamba_kernels.fused_linear(tokens[:2], weights)
        return experts_step(tokens[:2], **operands, gated=True, router_logits=logits)[0]

    def told(tokens: Tensor) -> Tensor:
        # behind a node of a graph that is no kernel
        weights = torch.ones(2, 1, device="cuda")
        indices = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
        return experts_step(tokens[:2], **operands, gated=True, indices=indices, weights=weights)[0]

    for run in (layer, step, told):
        static = x.clone()
        run(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(static)
        for _ in range(3):
            static.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(out, run(static.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not-asked"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "logits"])
def test_which_launches_of_a_step_start_early(monkeypatch: pytest.MonkeyPatch, asked: bool, told: bool) -> None:
    """The second always where the GPU can; the first where it is asked for, and behind a router only."""
    from mamba_kernels import early
    from mamba_kernels.moe import triton_step

    launched: list[dict[str, Any]] = []
    for module in (early, triton_step):
        monkeypatch.setattr(module, "knows_early_launches", lambda *_: True)
    monkeypatch.setattr(triton_step, "launch", lambda *_, **meta: launched.append(meta))
    operands = make_operands(2)
    choice: dict[str, Tensor] = {"router_logits": torch.randn(2, 5)}
    if told:
        choice = {"indices": torch.zeros(2, 1, dtype=torch.int64), "weights": torch.ones(2, 1)}
    with early_launches(asked) as used:
        triton_step.experts_step_triton(**operands, **choice, activation="relu", gated=False)
    first, second = launched
    assert used.used == first["EARLY"] == first.get("launch_pdl", False) == (asked and not told)
    assert first["NEXT_EARLY"] and second["EARLY"] and second["launch_pdl"]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("captured", [True, False], ids=["graph", "stream"])
@DTYPES
def test_early_launches_have_the_same_bits_on_gpu(captured: bool, dtype: torch.dtype) -> None:
    """A chain of routed layers, of which each reads what the launches in front of it have only just written."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs launches that start early")
    layers, channels, inner, experts, rounds = 8, 512, 640, 16, 5
    torch.manual_seed(0)
    weights = [
        make_operands(1, channels, experts, inner, gated=True, dtype=dtype, device="cuda") for _ in range(layers)
    ]
    for operands in weights:
        del operands["x"]
    routers = [torch.randn(experts, channels, device="cuda") for _ in range(layers)]
    norm = {"norm_weight": torch.rand(channels, device="cuda").to(dtype) + 0.5, "eps": 1e-5}
    projection = (torch.randn(channels, channels, device="cuda") * channels**-0.5).to(dtype)

    def run(x: Tensor) -> list[Tensor]:
        """What every layer adds to and chooses."""
        found = []
        for layer, (router, operands) in enumerate(zip(routers, weights, strict=True)):
            options: dict[str, Any] = {"activation": "silu", "gated": True, "residual": x, **norm}
            logits = mamba_kernels.fused_linear(x, router, **norm)
            x, indices, chosen = experts_step(
                x, **operands, **options, router_logits=logits, top_k=1 + layer % 2, normalize=layer % 4 < 2
            )
            found += [x, logits, indices, chosen]
            if layer % 3 == 0:
                # a choice that is told, by a kernel in front
                options["residual"] = x = mamba_kernels.fused_linear(x, projection, residual=x, **norm)
                x, *_ = experts_step(x, **operands, **options, indices=indices.flip(0), weights=chosen)
                found.append(x)
        return found

    for rows in (1, 2, 4):
        inputs = [torch.randn(rows, channels, device="cuda").to(dtype) for _ in range(rounds)]
        expected = [run(x) for x in inputs]
        with early_launches() as asked:
            if captured:
                run(inputs[0])
                static, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    # behind a kernel of torch
                    out = run(static * 1)
                found = []
                for x in inputs:
                    static.copy_(x)
                    graph.replay()
                    found.append([value.clone() for value in out])
            else:
                found = [run(x) for x in inputs]
        assert asked.used
        for actual, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True)), rows
        # the layers and rounds do not all choose the same expert
        assert len({int(index) for results in expected for index in results[2].flatten()}) > 1


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
