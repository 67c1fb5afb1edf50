"""The Switch layer against an oracle that walks over the tokens one by one, in fp64.

Symbols: B batch, L length, N tokens = B·L, d model width, E experts, k experts per token, F expert width.
"""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_mamba import MoeMambaConfig
from hf_mamba.layers import LayerNorm, RMSNorm
from hf_mamba.layers.switch import TopKRouter, load_balancing_loss, router_z_loss, within_capacity
from hf_mamba.models.moe_mamba.fused import fused_block_step
from hf_mamba.models.moe_mamba.modeling_moe_mamba import MoeMambaMLP, MoeMambaSparseMoe
from mamba_kernels.dispatch import select

BACKENDS = ("eager", "batched_mm", "grouped_mm", "fused")
SIZES = {"hidden_size": 8, "num_experts": 5, "moe_intermediate_size": 12}
LAYERS = {
    "switch": {},
    "top2": {"num_experts_per_tok": 2},
    "top3-normalised": {"num_experts_per_tok": 3, "norm_topk_prob": True, "moe_hidden_act": "silu"},
    "sigmoid-gated": {"router_scoring": "sigmoid", "router_bias": True, "moe_gated": True, "moe_hidden_act": "gelu"},
    "biases": {"moe_bias": True, "num_experts_per_tok": 2, "num_shared_experts": 1},
    "gated-biases": {"moe_bias": True, "moe_gated": True, "num_experts_per_tok": 5, "moe_hidden_act": "silu"},
    "shared": {"num_shared_experts": 2, "shared_expert_intermediate_size": 3, "moe_gated": True},
    "one-expert": {"num_experts": 1},
    "scaled": {"num_experts_per_tok": 2, "norm_topk_prob": True, "router_scaling_factor": 2.5, "moe_gated": True},
    "selection-bias": {"router_scoring": "sigmoid", "router_selection_bias": True, "num_experts_per_tok": 2},
    "groups": {"num_experts": 6, "num_experts_per_tok": 2, "router_num_groups": 3, "router_topk_groups": 2},
    "groups-selection-bias": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "router_scoring": "sigmoid",
        "router_selection_bias": True,
        "router_num_groups": 2,
        "norm_topk_prob": True,
    },
    "capacity": {"capacity_factor": 1.0},
    "capacity-top2": {"capacity_factor": 0.7, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "capacity-sigmoid": {"capacity_factor": 1.3, "router_scoring": "sigmoid"},
}
ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
}


def make_layer(backend: str = "eager", dtype: torch.dtype = torch.float64, **overrides) -> MoeMambaSparseMoe:
    torch.manual_seed(0)
    config = MoeMambaConfig(**{**SIZES, **overrides})
    config._experts_implementation = backend
    layer = MoeMambaSparseMoe(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    if layer.router.selection_bias is not None:
        torch.nn.init.normal_(layer.router.selection_bias, std=0.6)
    return layer.to(dtype)


def feed_forward(x: Tensor, up: Tensor, up_bias, down: Tensor, down_bias, config: MoeMambaConfig) -> Tensor:
    inner = up @ x + (0 if up_bias is None else up_bias)
    activation = ACTIVATIONS[config.moe_hidden_act]
    if config.moe_gated:
        half = inner.shape[0] // 2
        inner = activation(inner[:half]) * inner[half:]
    else:
        inner = activation(inner)
    return down @ inner + (0 if down_bias is None else down_bias)


def choose(scores: list[float], selection_bias: list[float] | None, config: MoeMambaConfig) -> list[int]:
    """The k experts of one token: the best ones of the best groups."""
    bias = [0.0] * len(scores) if selection_bias is None else selection_bias
    ranking = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = len(scores) // config.router_num_groups
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    counted = 1 if selection_bias is None else 2

    def strength(group: range) -> float:
        return sum(sorted((ranking[expert] for expert in group), reverse=True)[:counted])

    allowed = groups
    if len(groups) > 1:
        allowed = sorted(groups, key=strength, reverse=True)[: config.router_topk_groups]
    candidates = [expert for group in allowed for expert in group]
    return sorted(candidates, key=lambda expert: -ranking[expert])[: config.num_experts_per_tok]


def oracle(x: Tensor, layer: MoeMambaSparseMoe, config: MoeMambaConfig, real: list[bool]):
    """Output (N, d), router logits (N, E), balancing loss and z-loss of tokens x (N, d), with a plain loop over them."""
    parameters = dict(layer.named_parameters())
    up_name = "gate_up_proj" if config.moe_gated else "up_proj"
    experts, k = config.num_experts, config.num_experts_per_tok

    def get(name: str, index: int | None = None):
        value = parameters.get(name)
        return value if value is None or index is None else value[index]

    selection_bias = layer.router.selection_bias
    selection_bias = None if selection_bias is None else selection_bias.tolist()
    capacity = math.inf
    if layer.training and config.capacity_factor is not None:
        capacity = int(config.capacity_factor * sum(real) * k / experts)
    taken, chosen = [0] * experts, [0] * experts
    probability_sums = [x.new_zeros(()) for _ in range(experts)]
    z_sum, outputs, all_logits = x.new_zeros(()), [], []
    for token, is_real in zip(x, real, strict=True):
        logits = parameters["router.weight"] @ token
        if config.router_bias:
            logits = logits + parameters["router.bias"]
        exponentials = logits.exp()
        softmax = config.router_scoring == "softmax"
        scores = exponentials / exponentials.sum() if softmax else exponentials / (1 + exponentials)
        ranked = choose(scores.tolist(), selection_bias, config)
        total = sum(scores[e] for e in ranked) if config.norm_topk_prob else 1.0
        out = torch.zeros_like(token)
        for expert in ranked:
            if is_real:
                chosen[expert] += 1
                taken[expert] += 1
                if taken[expert] > capacity:
                    continue
            out = out + config.router_scaling_factor * scores[expert] / total * feed_forward(
                token,
                get(f"experts.{up_name}", expert),
                get(f"experts.{up_name}_bias", expert),
                get("experts.down_proj", expert),
                get("experts.down_proj_bias", expert),
                config,
            )
        if config.num_shared_experts:
            out = out + feed_forward(
                token,
                get(f"shared_experts.{up_name}.weight"),
                get(f"shared_experts.{up_name}.bias"),
                get("shared_experts.down_proj.weight"),
                get("shared_experts.down_proj.bias"),
                config,
            )
        if is_real:
            for expert in range(experts):
                probability_sums[expert] = probability_sums[expert] + scores[expert] / (1 if softmax else scores.sum())
            z_sum = z_sum + exponentials.sum().log() ** 2
        outputs.append(out)
        all_logits.append(logits)
    count = sum(real)
    balance = experts * sum(chosen[e] / count * probability_sums[e] / count for e in range(experts))
    return torch.stack(outputs), torch.stack(all_logits), balance, z_sum / count


def compare_with_oracle(
    kind: str, backend: str, dtype: torch.dtype, padded: bool, tolerance: float, device: str = "cpu"
) -> None:
    overrides = LAYERS[kind]
    config = MoeMambaConfig(**{**SIZES, **overrides})
    layer, exact = (make_layer(backend, d, **overrides).train() for d in (dtype, torch.float64))
    layer.to(device)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    valid = torch.ones(3, 9, dtype=torch.bool)
    if padded:
        valid[0, 4:], valid[2, 8:] = False, False
    probe = torch.randn(3, 9, 8, dtype=torch.float64) * valid[..., None]

    inputs = x.detach().clone().to(device, dtype).requires_grad_()
    out, router_logits = layer(inputs, valid=valid.to(device) if padded else None)
    flat_logits, flat_valid = (router_logits.flatten(0, 1),), valid.flatten().to(device) if padded else None
    aux = load_balancing_loss(
        flat_logits,
        config.num_experts_per_tok,
        config.router_scoring,
        flat_valid,
        indices=(layer.router.choose(flat_logits[0]),),
    )
    z = router_z_loss(flat_logits, flat_valid)
    ((out * probe.to(device, dtype)).sum() + 3 * aux + 0.5 * z).backward()
    out, flat_logits, aux, z = out.cpu(), (flat_logits[0].cpu(),), aux.cpu(), z.cpu()

    exact_inputs = x.clone().requires_grad_()
    expected = oracle(exact_inputs.flatten(0, 1), exact, config, valid.flatten().tolist())
    ((expected[0].view(3, 9, 8) * probe).sum() + 3 * expected[2] + 0.5 * expected[3]).backward()

    keep = valid.flatten()
    torch.testing.assert_close(out.flatten(0, 1)[keep].double(), expected[0][keep], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(flat_logits[0].double(), expected[1], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(aux.double(), expected[2], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(z.double(), expected[3], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(inputs.grad.cpu().double(), exact_inputs.grad, atol=10 * tolerance, rtol=tolerance)
    for (name, parameter), reference in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert reference.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.cpu().double(), reference.grad, atol=10 * tolerance, rtol=tolerance, msg=name
        )


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_equals_the_token_loop(kind: str, padded: bool) -> None:
    """Outputs, router logits, both losses and every gradient, in training (so with the capacity limit)."""
    compare_with_oracle(kind, "eager", torch.float64, padded, tolerance=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_experts_implementations_in_fp32(kind: str, backend: str) -> None:
    compare_with_oracle(kind, backend, torch.float32, padded=True, tolerance=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_is_dropless(kind: str, backend: str) -> None:
    """In evaluation no capacity counts, so a token alone gives what it gives in a batch, and in any order."""
    dtype, tolerance = (torch.float64, 1e-13) if backend == "eager" else (torch.float32, 1e-5)
    layer = make_layer(backend, dtype, **LAYERS[kind]).eval()
    x = torch.randn(4, 5, 8, dtype=dtype)
    together, _ = layer(x)
    alone = torch.cat([layer(token.view(1, 1, 8))[0] for token in x.flatten(0, 1)])
    torch.testing.assert_close(together.view(-1, 1, 8), alone, atol=tolerance, rtol=0)
    shuffled = torch.randperm(20)
    permuted, _ = layer(x.view(20, 1, 8)[shuffled])
    torch.testing.assert_close(permuted, alone[shuffled], atol=tolerance, rtol=0)


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 1.25, 2.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity_is_exact(factor: float, top_k: int) -> None:
    """The first `int(cf·N·k/E)` real tokens of each expert stay, in sequence order, and nothing else goes."""
    generator = torch.Generator().manual_seed(3)
    experts, tokens = 4, 37
    indices = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    indices[:12, 0] = 2 if top_k == 1 else indices[:12, 0]
    valid = torch.rand(tokens, generator=generator) > 0.25
    for mask in (None, valid):
        kept = within_capacity(indices, experts, factor, mask)
        real = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
        capacity = int(factor * int(real.sum()) * top_k / experts)
        taken = [0] * experts
        for token in range(tokens):
            for slot in range(top_k):
                expert = int(indices[token, slot])
                taken[expert] += bool(real[token])
                assert bool(kept[token, slot]) == (bool(real[token]) and taken[expert] <= capacity)


def test_dropped_tokens_get_zero() -> None:
    """One expert chosen by all: with capacity for 2 of 8 tokens, the first two pass and the others are 0."""
    layer = make_layer(num_experts=4, capacity_factor=1.0).train()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1] = 1.0
    x = torch.rand(2, 4, 8, dtype=torch.float64) + 0.1
    out, _ = layer(x)
    assert (out.view(8, 8)[:2].abs().sum(dim=-1) > 0).all()
    assert (out.view(8, 8)[2:] == 0).all()
    full, _ = layer(x, dropless=True)
    assert (full.view(8, 8).abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_one_expert_is_the_dense_layer_times_its_score(scoring: str) -> None:
    layer = make_layer(num_experts=1, router_scoring=scoring)
    dense = MoeMambaMLP(8, 12, activation="relu", gated=False, bias=False).double()
    dense.load_state_dict({"up_proj.weight": layer.experts.up_proj[0], "down_proj.weight": layer.experts.down_proj[0]})
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    out, logits = layer(x)
    score = torch.ones_like(logits) if scoring == "softmax" else logits.sigmoid()
    torch.testing.assert_close(out, dense(x) * score, atol=1e-14, rtol=0)


def test_pooled_loss_is_that_of_mixtral() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(12, 5, generator=generator) for _ in range(3))
    mask = torch.rand(2, 6, generator=generator) > 0.3
    for top_k in (1, 2):
        for attention_mask, valid in ((None, None), (mask, mask.flatten())):
            expected = load_balancing_loss_func(logits, 5, top_k, attention_mask)
            actual = load_balancing_loss(logits, top_k, valid=valid, reduction="pooled")
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
            # added up instead: the same function, layer by layer
            expected = sum(load_balancing_loss_func((layer,), 5, top_k, attention_mask) for layer in logits)
            torch.testing.assert_close(load_balancing_loss(logits, top_k, valid=valid), expected, atol=1e-6, rtol=0)


def test_even_routing_has_the_least_loss() -> None:
    even, uneven = torch.eye(4).repeat(3, 1) * 1e-3, torch.zeros(12, 4)
    uneven[:, 0] = 1.0
    assert abs(load_balancing_loss((even,), 1).item() - 1.0) <= 1e-6
    assert load_balancing_loss((uneven,), 1).item() > 1.5


def test_router_computes_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    router = TopKRouter(32, 8, 2, bias=True)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(64, 32)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = router(x)
    for value, reference in zip(actual, expected, strict=True):
        assert torch.equal(value, reference)
    # bf16 inputs and weights: the logits are those of the rounded values, not rounded themselves
    logits, weights, _ = router.bfloat16()(x.bfloat16())
    exact = x.bfloat16().double() @ router.weight.double().T + router.bias.double()
    assert logits.dtype == weights.dtype == torch.float32
    assert (logits.double() - exact).abs().max().item() <= 1e-4


def test_jitter_is_for_training_only() -> None:
    layer = make_layer(router_jitter_noise=0.3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    exact = x.view(10, 8) @ layer.router.weight.T
    noisy = layer.train()(x)[1].view(10, 5)
    assert not torch.allclose(noisy, exact)
    # at most 30 % on every product
    bound = 0.3 * (x.view(10, 8).abs() @ layer.router.weight.abs().T)
    assert ((noisy - exact).abs() <= bound + 1e-12).all()
    torch.testing.assert_close(layer(x, dropless=True)[1].view(10, 5), exact)
    torch.testing.assert_close(layer.eval()(x)[1].view(10, 5), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    layer = make_layer(backend, capacity_factor=1.0, num_shared_experts=1).train()
    x = torch.zeros(2, 0, 8, dtype=torch.float64, requires_grad=True)
    out, logits = layer(x)
    assert out.shape == (2, 0, 8) and logits.shape == (2, 0, 5)
    flat = (logits.flatten(0, 1),)
    assert load_balancing_loss(flat, 1).item() == router_z_loss(flat).item() == 0
    (out.sum() + logits.sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_compute_in_the_dtype_of_autocast(backend: str) -> None:
    """fp32 weights, as in mixed-precision training: products in bf16, which torch does not see to for grouped ones."""
    config = {"hidden_size": 16, "moe_intermediate_size": 24, "moe_gated": True, "moe_bias": True}
    layer, exact = make_layer(backend, torch.float32, **config), make_layer("eager", **config)
    x, probe = torch.randn(18, 16), torch.randn(18, 16)
    _, weights, indices = (value.detach() for value in layer.router(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer.experts(x, indices, weights)
    (out * probe).sum().backward()
    expected = exact.experts(x.double(), indices, weights.double())
    (expected * probe.double()).sum().backward()
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    # fp32 products would be a hundred times as close
    assert 1e-4 < error < 2e-2
    for (name, parameter), reference in zip(layer.experts.named_parameters(), exact.experts.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        difference = (parameter.grad - reference.grad).abs().max() / reference.grad.abs().max()
        assert difference < 5e-2, (name, difference)


@pytest.mark.parametrize("overrides", [{"hidden_size": 6}, {"moe_intermediate_size": 7, "moe_gated": True}])
def test_grouped_backend_takes_any_width(overrides: dict) -> None:
    """Widths and dtypes that torch's grouped product refuses run one by one instead of raising."""
    expected_layer = make_layer("eager", torch.float32, **overrides)
    layer = make_layer("grouped_mm", torch.float32, **overrides)
    x = torch.randn(2, 5, layer.experts.hidden_dim)
    torch.testing.assert_close(layer(x)[0], expected_layer(x)[0])
    layer(x)[0].sum().backward()
    layer.double()(x.double())


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@torch.no_grad()
def test_fused_block_step(residual_dtype: torch.dtype) -> None:
    """Norm, routed layer and residual in three launches are what the modules make of them."""
    if select("experts_step", torch.device("cpu")) != "triton":
        pytest.skip("needs the kernels; test_layer_under_the_interpreter runs it")
    layer = make_layer("fused", torch.float32, num_experts_per_tok=2, norm_topk_prob=True, moe_gated=True).eval()
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    for rows in (1, 4):
        x = torch.randn(rows, 1, 8).to(residual_dtype)
        out, logits = fused_block_step(norm, layer, x)
        update, expected_logits = layer(norm(x.float()))
        assert out.dtype == torch.float32 and out.shape == x.shape and logits.shape == expected_logits.shape
        torch.testing.assert_close(out, x.float() + update, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert fused_block_step(LayerNorm(8), layer, x) is None
    assert fused_block_step(norm, layer, torch.randn(5, 1, 8)) is None
    layer.observer = print
    assert fused_block_step(norm, layer, x) is None
