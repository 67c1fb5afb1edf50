"""IBM's MoE dialect of mamba_ssm: three generations of expert tensors, every router option, the order of layers."""

import json
from pathlib import Path

import pytest
import torch

from hf_mamba_conversion.errors import ConversionError, UnsupportedFormatError
from hf_mamba_conversion.formats.mamba_ssm_moe import MambaSsmMoeFormat
from hf_mamba_conversion.source import CheckpointSource

from .moe_checkpoints import Tensors, assert_equal_logits, make_plan

FORM = MambaSsmMoeFormat()
GENERATIONS = ("per-expert", "fc1_weights", "stacked")
V, D_MODEL, F, E = 45, 24, 20, 6
# the gated MLP of the other layers has its width rounded up to a multiple of 128
DENSE, DENSE_ROUNDED = 100, 128


def make_config(layers: int = 2, moe_layers: tuple[int, ...] = (1,), moe_cfg: dict | None = None, **changes) -> dict:
    """The keys of the fork's MambaConfig."""
    moe = {
        "n_routed_experts": E,
        "n_activated_experts": 2,
        "n_shared_experts": 0,
        "d_intermediate": F,
        "n_expert_groups": 1,
        "n_limited_groups": 1,
        "score_func": "softmax",
        "route_scale": 1.0,
        "moe_impl": "torch",
    }
    config = {
        "d_model": D_MODEL,
        "d_intermediate": DENSE,
        "n_layer": layers,
        "vocab_size": V,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "chunk_size": 16},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "moe_layer_idx": list(moe_layers),
        "moe_cfg": {**moe, **(moe_cfg or {})},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }
    return {**config, **changes}


def make_tensors(config: dict, generation: str = "stacked", gate_bias: bool = False) -> Tensors:
    tensors = Tensors()
    vocabulary = -(-config["vocab_size"] // 8) * 8
    names = ("weight",) if config["rms_norm"] else ("weight", "bias")
    moe = config["moe_cfg"]
    experts = moe.get("n_routed_experts", E)
    tensors.add("backbone.embedding.weight", vocabulary, D_MODEL, std=0.1)
    for index in range(config["n_layer"]):
        prefix = f"backbone.layers.{index}."
        tensors.norm(prefix + "norm.", D_MODEL, names)
        if config["ssm_cfg"].get("layer", "Mamba1") == "Mamba2":
            tensors.mamba2(prefix + "mixer.", D_MODEL, 2 * D_MODEL, 8, 6, 2)
        else:
            tensors.mamba1(prefix + "mixer.", D_MODEL, 2 * D_MODEL, 16, 2)
        if not config["d_intermediate"]:
            continue
        tensors.norm(prefix + "norm2.", D_MODEL, names)
        mlp = prefix + "mlp."
        if index not in config["moe_layer_idx"]:
            tensors.add(mlp + "fc1.weight", 2 * DENSE_ROUNDED, D_MODEL)
            tensors.add(mlp + "fc2.weight", D_MODEL, DENSE_ROUNDED)
            continue
        tensors.add(mlp + "gate.lin.weight", experts, D_MODEL, std=0.6)
        if gate_bias:
            tensors.add(mlp + "gate.bias", experts, std=0.3)
        fc1 = torch.randn(experts, 2 * F, D_MODEL, generator=tensors.generator) * 0.2
        fc2 = torch.randn(experts, D_MODEL, F, generator=tensors.generator) * 0.2
        if generation == "per-expert":
            for expert in range(experts):
                tensors[f"{mlp}experts.{expert}.fc1.weight"] = fc1[expert].clone()
                tensors[f"{mlp}experts.{expert}.fc2.weight"] = fc2[expert].clone()
        elif generation == "fc1_weights":
            tensors |= {mlp + "experts.fc1_weights": fc1, mlp + "experts.fc2_weights": fc2}
        else:
            tensors |= {mlp + "experts.fc1.weight": fc1, mlp + "experts.fc2.weight": fc2}
        shared = moe.get("n_shared_experts", 0) * F
        if shared:
            tensors.add(mlp + "shared_experts.fc1.weight", 2 * shared, D_MODEL)
            tensors.add(mlp + "shared_experts.fc2.weight", D_MODEL, shared)
    tensors.norm("backbone.norm_f.", D_MODEL, names)
    if config["tie_embeddings"]:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    else:
        tensors.add("lm_head.weight", vocabulary, D_MODEL, std=0.1)
    return tensors


def write(folder: Path, config: dict, tensors: Tensors | None = None, container: str | None = None) -> Path:
    state = (make_tensors(config) if tensors is None else tensors).plain()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state if container is None else {container: state}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("shared", [0, 2], ids=["routed", "shared"])
def test_generations(tmp_path: Path, generation: str, shared: int) -> None:
    config = make_config(moe_cfg={"n_shared_experts": shared})
    plan, _ = assert_equal_logits(FORM, write(tmp_path, config, make_tensors(config, generation)))
    assert plan.config.layers_block_type == ["mamba", "mlp", "mamba", "moe"]
    assert (plan.config.num_experts, plan.config.moe_intermediate_size) == (E, F)
    assert plan.config.num_shared_experts == shared and plan.config.vocab_size == 48
    assert plan.derivable == {"lm_head.weight": "backbone.embedding.weight"}


ROUTERS = {
    "softmax": {},
    "sigmoid": {"score_func": "sigmoid"},
    "scaled": {"score_func": "sigmoid", "route_scale": 2.5},
    "softmax-scaled": {"route_scale": 1.7},
    "groups": {"n_expert_groups": 3, "n_limited_groups": 1},
    "sigmoid-groups": {"score_func": "sigmoid", "n_expert_groups": 3, "n_limited_groups": 2},
    "limit-without-groups": {"n_limited_groups": 2},
}


@pytest.mark.parametrize("gate_bias", [False, True], ids=["no-bias", "gate-bias"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers(tmp_path: Path, router: str, gate_bias: bool) -> None:
    config = make_config(moe_cfg=ROUTERS[router], ssm_cfg={})
    plan, _ = assert_equal_logits(FORM, write(tmp_path, config, make_tensors(config, gate_bias=gate_bias)))
    assert plan.config.router_selection_bias == gate_bias
    assert plan.config.norm_topk_prob == (plan.config.router_scoring == "sigmoid")


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm": False}, {"tie_embeddings": False}, {"moe_layer_idx": [0, 1]}],
    ids=["layernorm", "untied", "experts-throughout"],
)
def test_frames(tmp_path: Path, changes: dict) -> None:
    assert_equal_logits(FORM, write(tmp_path, make_config(**changes)))


def test_file_of_the_training_program(tmp_path: Path) -> None:
    assert_equal_logits(FORM, write(tmp_path, make_config(), container="model_state"))


def test_first_generation_names_the_width_otherwise(tmp_path: Path) -> None:
    config = make_config()
    config["moe_cfg"] = {"n_routed_experts": E, "n_activated_experts": 1, "n_shared_experts": 1, "hidden_features": F}
    plan, _ = assert_equal_logits(FORM, write(tmp_path, config, make_tensors(config, "per-expert")))
    assert plan.config.num_experts_per_tok == 1


def test_twelve_layers_in_both_orders(tmp_path: Path) -> None:
    """The fork runs layer 10 after layer 1; it makes a difference, and a warning says so."""
    folder = write(tmp_path, make_config(layers=12, moe_layers=(3, 10), ssm_cfg={}))
    plan, by_string = assert_equal_logits(FORM, folder)
    kinds = plan.config.layers_block_type[1::2]
    # 0, 1, 10, 11, 2, 3, …
    assert [index for index, kind in enumerate(kinds) if kind == "moe"] == [2, 5]
    assert any("layer_order=numeric" in note for note in plan.notes)
    plan, by_number = assert_equal_logits(FORM, folder, {"layer_order": "numeric"})
    kinds = plan.config.layers_block_type[1::2]
    assert [index for index, kind in enumerate(kinds) if kind == "moe"] == [3, 10]
    assert (by_string - by_number).abs().max() > 1e-2


def test_without_width_there_are_no_feed_forward_layers(tmp_path: Path) -> None:
    config = make_config(d_intermediate=0)
    with CheckpointSource(write(tmp_path, config)) as source:
        plan = make_plan(FORM, source)
    assert plan.config.model_type == "mamba2"
    assert any("no effect" in note for note in plan.notes)


BAD = {
    "unknown-argument": ({"moe_cfg": {"n_groups": 2}}, "'n_groups'"),
    "scoring": ({"moe_cfg": {"score_func": "relu"}}, "softmax or sigmoid"),
    "width": ({"moe_cfg": {"d_intermediate": F + 1}}, f"width {F}.*says {F + 1}"),
    "gate-bias": ({"moe_cfg": {"gate_bias": True}}, "gate.bias is not there"),
    "out-of-range": ({"moe_layer_idx": [7]}, "from 0 to 1, got 7"),
    "not-listed": ({"moe_layer_idx": []}, "layer 1 has a router but is not listed"),
    "no-router": ({"moe_layer_idx": [0, 1]}, "layer 0 is listed but has no router"),
    "attention": ({"attn_layer_idx": [0]}, "attention"),
    "mamba3": ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba-3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(tmp_path: Path, case: str) -> None:
    changes, message = dict(BAD[case][0]), BAD[case][1]
    good = make_config()
    changed = {**good, **changes, "moe_cfg": {**good["moe_cfg"], **changes.get("moe_cfg", {})}}
    folder = write(tmp_path, changed, make_tensors(good))
    refused = UnsupportedFormatError if case in ("attention", "mamba3") else ConversionError
    with CheckpointSource(folder) as source, pytest.raises(refused, match=message):
        make_plan(FORM, source)


def test_without_moe_cfg(tmp_path: Path) -> None:
    config = make_config()
    tensors = make_tensors(config)
    del config["moe_cfg"], config["moe_layer_idx"]
    with CheckpointSource(write(tmp_path, config, tensors)) as source, pytest.raises(ConversionError, match="moe_cfg"):
        make_plan(FORM, source)
