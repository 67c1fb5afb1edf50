"""The authors' own modules as oracles: tiny llm-random and BlackMamba checkpoints with recorded outputs."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_mamba import MoeMambaConfig, MoeMambaForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"

LLM_RANDOM_FRAME = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 4, "moe_intermediate_size": 96}


def load(name: str) -> dict:
    return torch.load(FIXTURES / name, weights_only=True)


def from_llm_random(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two residual layers of ours for each of their blocks; their experts are stored (E, in, out)."""
    state = {
        "backbone.embeddings.weight": source["embedding_layer.layers.0.weight"],
        "lm_head.weight": source["head.weight"],
    }
    suffixes = {
        "feedforward.gating.gate": ("moe.router.weight", True),
        "feedforward.expert_inner_function.lin1_weight": ("moe.experts.up_proj", True),
        "feedforward.expert_inner_function.lin2_weight": ("moe.experts.down_proj", True),
        "feedforward.logging_ff_pre_relu.weight": ("mlp.up_proj.weight", False),
        "feedforward.logging_ff_pre_relu.bias": ("mlp.up_proj.bias", False),
        "feedforward.logging_ff_post_relu.weight": ("mlp.down_proj.weight", False),
        "feedforward.logging_ff_post_relu.bias": ("mlp.down_proj.bias", False),
    }
    for key, value in source.items():
        match = re.fullmatch(r"encoder\.blocks\.block_(\d+)\.block\.residual_(mamba|feedforward)\.layer\.(.*)", key)
        if match is None:
            continue
        layer = 2 * int(match[1]) + (match[2] == "feedforward")
        name, transposed = suffixes.get(match[3], (match[3], False))
        name = name.replace("pre_norm.", "norm.").replace("mamba.", "mixer.")
        state[f"backbone.layers.{layer}.{name}"] = value.transpose(-1, -2).contiguous() if transposed else value
    return state


def from_blackmamba(source: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Their experts' matrices stacked, the norm of the decoder at the end, and an embedding that is the head as well."""
    embedding = source["embedding.word_embeddings.weight"]
    state = {"backbone.embeddings.weight": embedding, "lm_head.weight": embedding}
    for key, value in source.items():
        name = key.replace("decoder.layers.", "backbone.layers.").replace("decoder.final_layernorm", "backbone.norm_f")
        if not key.startswith("decoder.") or "local_experts" in key:
            continue
        state[name.replace("mixer.router", "moe.router")] = value
    for key in [key for key in source if "local_experts.0." in key]:
        prefix, matrix = re.fullmatch(r"decoder\.(.*)\.mixer\.local_experts\.0\.(linear_fc[12])\.weight", key).groups()
        name = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}[matrix]
        parts = [source[key.replace("experts.0", f"experts.{expert}")] for expert in range(num_experts)]
        state[f"backbone.{prefix}.moe.experts.{name}"] = torch.stack(parts)
    return state


def build(config: MoeMambaConfig, state: dict[str, Tensor]) -> MoeMambaForCausalLM:
    model = MoeMambaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def llm_random() -> tuple[MoeMambaForCausalLM, dict]:
    config = MoeMambaConfig(**LLM_RANDOM_FRAME, num_experts=4)
    state = from_llm_random(load("llmrandom_moe_mamba_current.ckpt.pt")["model"])
    return build(config, state), load("llmrandom_moe_mamba_current.golden.pt")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_llm_random_moe_logits(llm_random, implementation: str) -> None:
    model, golden = llm_random
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert (logits - golden["logits_capacity_factor_4"]).abs().max().item() <= 1e-6


def test_llm_random_balancing_losses(llm_random) -> None:
    """Theirs are one value for each block, with the coefficient 0.01; ours is the sum without it."""
    model, golden = llm_random
    with torch.no_grad():
        outputs = model(golden["input_ids"], output_router_logits=True)
    expected = golden["aux_losses_cf_4"]
    assert abs(0.01 * outputs.aux_loss.item() - expected.sum().item()) <= 1e-8
    counts = [torch.bincount(logits.argmax(dim=-1), minlength=4).tolist() for logits in outputs.router_logits]
    assert counts == [[8, 6, 3, 7], [4, 5, 3, 12]]


def test_llm_random_capacity_keeps_as_many_tokens(llm_random) -> None:
    """With capacity 6 of 24, block 0 keeps 21 tokens; theirs and ours differ in which ones, so only the counts compare."""
    model, golden = llm_random
    config = MoeMambaConfig(**LLM_RANDOM_FRAME, num_experts=4, capacity_factor=1.0)
    limited = build(config, model.state_dict()).train()
    dropped = []
    for index in (1, 3):
        experts = limited.backbone.layers[index].moe.experts
        experts.register_forward_pre_hook(lambda _, args: dropped.append((args[2] == 0).sum().item()))
    outputs = limited(golden["input_ids"], output_router_logits=True)
    assert dropped[0] == 24 - 21
    # the first block's routing does not depend on what was dropped
    first = torch.bincount(outputs.router_logits[0].argmax(dim=-1), minlength=4)
    assert first.tolist() == [8, 6, 3, 7]
    # in evaluation the limit has no effect
    with torch.no_grad():
        logits = limited.eval()(golden["input_ids"]).logits
    assert (logits - golden["logits_capacity_factor_4"]).abs().max().item() <= 1e-6


def test_llm_random_mamba_mlp_logits() -> None:
    config = MoeMambaConfig(
        **LLM_RANDOM_FRAME, layers_block_type=["mamba", "mlp", "mamba", "mlp"], mlp_intermediate_size=96
    )
    model = build(config, from_llm_random(load("llmrandom_mamba_mlp.ckpt.pt")["model"]))
    golden = load("llmrandom_mamba_mlp.golden.pt")
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert (logits - golden["logits_capacity_factor_4"]).abs().max().item() <= 1e-6


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_blackmamba_logits(implementation: str) -> None:
    published = json.loads((FIXTURES / "blackmamba_published_style.config.json").read_text())
    config = MoeMambaConfig(
        vocab_size=published["vocab_size"],
        hidden_size=published["hidden_size"],
        state_size=published["state_size"],
        conv_kernel=published["conv_dimension"],
        expand=published["expansion_factor"],
        layers_block_type=["mamba" if code == "r" else "moe" for code in published["mamba_moe_layers"]],
        num_experts=8,
        moe_intermediate_size=published["ffn_hidden_size"],
        moe_gated=published["swiglu"],
        moe_hidden_act="gelu",
        router_scoring="sigmoid",
        router_bias=True,
        norm_type="rmsnorm",
        final_norm=True,
        final_norm_type="layernorm",
        tie_word_embeddings=True,
    )
    model = build(
        config, from_blackmamba(load("blackmamba_published_style.pytorch_model.bin")["model"], num_experts=8)
    )
    model.set_experts_implementation(implementation)
    golden = load("blackmamba_published_style.golden.pt")
    with torch.no_grad():
        outputs = model(golden["input_ids"], output_router_logits=True)
    assert (outputs.logits - golden["logits"]).abs().max().item() <= 1e-6
    counts = [torch.bincount(logits.argmax(dim=-1), minlength=8).tolist() for logits in outputs.router_logits]
    assert counts == [[5, 1, 8, 3, 1, 3, 3, 2], [1, 6, 3, 4, 1, 3, 4, 4]]
