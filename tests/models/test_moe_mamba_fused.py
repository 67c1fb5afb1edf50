"""The experts implementation "fused": when it runs, and that it computes what the others do.

The layer's own tests run again with the kernels under Triton's interpreter; tests marked `gpu` run the compiled ones.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import mamba_kernels
from hf_mamba import MoeMambaForCausalLM
from hf_mamba.models.moe_mamba import experts as experts_module
from hf_mamba.models.moe_mamba import fused
from hf_mamba.models.moe_mamba.fused import FUSED, fused_experts, fused_router, fused_step, kernels_fit

from .builders import make_model, random_ids
from .test_moe_mamba_layer import LAYERS, compare_with_oracle, make_layer

ROOT = Path(__file__).resolve().parents[2]


def test_fused_is_the_default_and_others_can_be_named(tmp_path: Path) -> None:
    model = make_model("moe_mamba")
    assert model.config._experts_implementation == FUSED
    for name in ("eager", "batched_mm", "grouped_mm", FUSED):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
    model.save_pretrained(tmp_path)
    assert MoeMambaForCausalLM.from_pretrained(tmp_path).config._experts_implementation == FUSED
    loaded = MoeMambaForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="fuse"):
        model.set_experts_implementation("fuse")


def test_without_a_gpu_fused_is_grouped_mm() -> None:
    model = make_model("moe_mamba", moe_gated=True, num_experts_per_tok=2)
    ids = random_ids(2, 7)
    model.set_experts_implementation(FUSED)
    fused_logits = model(ids).logits
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(model(ids).logits, fused_logits)


@pytest.mark.parametrize(
    ("overrides", "dtype", "fits"),
    [
        ({}, torch.float32, True),
        ({"moe_hidden_act": "gelu", "moe_gated": True, "moe_bias": True}, torch.bfloat16, True),
        ({"moe_hidden_act": "gelu_pytorch_tanh"}, torch.float32, False),
        ({"moe_hidden_act": "relu2"}, torch.float32, False),
        ({}, torch.float64, False),
        ({"moe_intermediate_size": 7}, torch.float32, False),
    ],
    ids=["plain", "gelu-gated", "tanh", "relu2", "fp64", "width"],
)
def test_what_the_kernels_take(overrides: dict, dtype: torch.dtype, fits: bool) -> None:
    experts = make_layer(FUSED, dtype, **{"moe_intermediate_size": 16} | overrides).experts
    x = torch.randn(3, 8, dtype=dtype)
    assert not kernels_fit(experts, x, dtype)
    with mamba_kernels.backend("triton"):
        assert kernels_fit(experts, x, dtype) == fits


def test_what_the_fused_router_and_step_leave_to_the_modules() -> None:
    x = torch.randn(3, 8)
    with mamba_kernels.backend("triton"), torch.no_grad():
        for overrides in (
            {"router_selection_bias": True, "router_scoring": "sigmoid"},
            {"num_experts": 6, "router_num_groups": 3, "router_topk_groups": 2},
        ):
            layer = make_layer(FUSED, torch.float32, **overrides)
            assert fused_router(layer.router, x, noisy=False) is None
            assert fused_step(layer.router, layer.experts, x) is None
        layer = make_layer(FUSED, torch.float32, router_jitter_noise=0.1)
        assert fused_router(layer.router, x, noisy=True) is None
        assert fused_step(layer.router, layer.experts, torch.randn(mamba_kernels.dispatch.MOST_ROWS + 1, 8)) is None
        handle = layer.experts.register_forward_hook(lambda *_: None)
        assert fused_step(layer.router, layer.experts, x) is None
        handle.remove()
        layer.router.register_forward_hook(lambda *_: None)
        assert fused_router(layer.router, x, noisy=False) is None
    layer = make_layer(FUSED, torch.float32)
    with mamba_kernels.backend("triton"):
        # with gradients
        assert fused_step(layer.router, layer.experts, x) is None


def test_the_short_way_to_the_experts_and_what_it_leaves_to_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(FUSED, torch.float32)
    x, indices, weights = torch.randn(7, 8), torch.zeros(7, 1, dtype=torch.long), torch.ones(7, 1)
    experts, calls = layer.experts, []
    monkeypatch.setattr(fused, "routed_experts", lambda x, *_, **options: (calls.append(options), x)[1])
    # without a GPU the module is called
    assert fused_experts(experts, x, indices, weights) is None
    with mamba_kernels.backend("triton"):
        assert fused_experts(experts, x, indices, weights) is x
        assert calls[0]["down"] is experts.down_proj
        assert fused_experts(experts, x[:0], indices[:0], weights[:0]) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused_experts(experts, x, indices, weights) is None
        for register in (
            experts.register_forward_hook,
            experts.register_forward_pre_hook,
            experts.register_full_backward_hook,
            experts.register_full_backward_pre_hook,
        ):
            handle = register(lambda *_: None)
            assert fused_experts(experts, x, indices, weights) is None
            handle.remove()
        assert fused_experts(experts, x, indices, weights) is x
        experts.is_transposed = True
        assert fused_experts(experts, x, indices, weights) is None


def test_experts_with_a_configuration_of_their_own_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(FUSED, torch.float32).eval()
    x = torch.randn(1, 7, 8)
    monkeypatch.setattr(experts_module, "fused_experts", lambda *_: torch.zeros(7, 8))
    assert not layer(x)[0].any()
    layer.experts.config = copy.deepcopy(layer.config)
    layer.experts.config._experts_implementation = "eager"
    assert layer(x)[0].any()


def test_layer_under_the_interpreter() -> None:
    """The layer's tests of all kinds of routing: outputs, losses and gradients against the token loop, and decoding."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_MAMBA_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", FUSED]
    result = subprocess.run(
        [*command, "tests/models/test_moe_mamba_layer.py"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
    # two tests of every kind, and a few more
    assert int(result.stdout.split(" passed")[0].split()[-1]) > 2 * len(LAYERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels' ops, as they are called."""
    found: list[str] = []
    for name in ("route", "routed_experts", "experts_step"):
        op = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda *args, _op=op, _name=name, **kwargs: (found.append(_name), _op(*args, **kwargs))[1]
        )
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_on_gpu(kind: str, padded: bool, calls: list[str]) -> None:
    compare_with_oracle(kind, FUSED, torch.float32, padded, tolerance=1e-5, device="cuda")
    assert "routed_experts" in calls
    assert ("route" in calls) != ("selection-bias" in kind or "groups" in kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", LAYERS)
def test_decoding_equals_evaluation_on_gpu(kind: str, calls: list[str]) -> None:
    layer = make_layer(FUSED, torch.float32, **LAYERS[kind]).to("cuda").eval()
    x = torch.randn(4, 5, 8, device="cuda")
    together, logits = layer(x)
    with torch.no_grad():
        for rows in (1, 2, 4):
            parts = [layer(part[:, None]) for part in x.flatten(0, 1).split(rows)]
            torch.testing.assert_close(torch.cat([out for out, _ in parts]).view_as(x), together, atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.cat([l for _, l in parts]).view_as(logits), logits, atol=1e-5, rtol=0)
    assert "experts_step" in calls


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_on_gpu(dtype: torch.dtype, calls: list[str]) -> None:
    options = {"moe_gated": True, "moe_hidden_act": "silu", "num_experts_per_tok": 2}
    options |= {"hidden_size": 64, "moe_intermediate_size": 96}
    layers = {name: make_layer(name, torch.float32, **options).to("cuda").eval() for name in (FUSED, "eager")}
    x = torch.randn(2, 300, 64, device="cuda").to(dtype)
    probe = torch.randn(2, 300, 64, device="cuda")
    results = {}
    for name, layer in layers.items():
        layer.experts.to(dtype)
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf)
        (out * probe).sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results[name] = {"out": out, "x": leaf.grad, **gradients}
    assert calls == ["route", "routed_experts"]
    for name, expected in results["eager"].items():
        error = (results[FUSED][name].float() - expected.float()).norm() / expected.float().norm()
        assert error <= 2e-2, (name, error)


@pytest.mark.gpu
def test_mixtral_runs_on_fused_experts_on_gpu(calls: list[str]) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).to("cuda").eval()
    ids = torch.randint(0, 64, (2, 9), device="cuda")
    logits = []
    for name in ("eager", FUSED):
        model.set_experts_implementation(name)
        logits.append(model(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert calls == ["routed_experts"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_generation_equals_the_eager_experts_on_gpu(norm: str) -> None:
    options = {"moe_gated": True, "num_experts_per_tok": 2, "norm_type": norm, "tie_word_embeddings": False}
    model = make_model("moe_mamba", **options).to("cuda")
    ids = random_ids(2, 7).to("cuda")
    texts = []
    for name in ("eager", FUSED):
        model.set_experts_implementation(name)
        texts.append(model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None))
    assert torch.equal(*texts)
