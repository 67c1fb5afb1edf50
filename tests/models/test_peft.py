"""PEFT on every projection: what an adapter does is compared with weights that were computed by hand.

`test_native_defects_loading.py` holds what native classes get wrong, `test_peft_files.py` files and switching; here stand targets and
methods.
"""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM

import hf_mamba
from hf_mamba.integrations.peft import DEFAULT_TARGETS

from .adapters import (
    IDS,
    KINDS,
    TOLERANCE,
    adapt,
    assert_gradients_reach_everything_trainable,
    logits,
    randomise_adapter,
    relative_error,
)
from .builders import make_model, make_native

TARGETS = {
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"],
    "mamba2": ["in_proj", "out_proj", "embeddings", "lm_head"],
    "falcon_mamba": ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"],
    "moe_mamba": ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"],
}


def change_of_weight(layer) -> torch.Tensor:
    """B A · scale of a LoRA layer, in the shape of its weight."""
    if hasattr(layer, "lora_embedding_A") and layer.lora_embedding_A:
        product = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T
    else:
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return product * layer.scaling["default"]


@torch.no_grad()
def with_explicit_weights(model, adapted, formula):
    """A copy of `model` whose weights are `formula(weight, layer)` wherever `adapted` has an adapter layer."""
    expected = copy.deepcopy(model)
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "base_layer"):
            weight = expected.get_submodule(name).weight
            weight.copy_(formula(weight.clone(), layer))
    return expected


def dora_weight(weight: torch.Tensor, layer) -> torch.Tensor:
    changed = weight + change_of_weight(layer)
    magnitude = layer.lora_magnitude_vector["default"].weight
    return magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)


def adalora_weight(weight: torch.Tensor, layer) -> torch.Tensor:
    product = layer.lora_B["default"] @ (layer.lora_A["default"] * layer.lora_E["default"])
    return weight + product * layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)


def ia3_weight(weight: torch.Tensor, layer) -> torch.Tensor:
    return weight * layer.ia3_l["default"]


METHODS = {
    "lora": (LoraConfig(r=2), lambda weight, layer: weight + change_of_weight(layer)),
    "rslora": (
        LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear"),
        lambda weight, layer: weight + change_of_weight(layer) / layer.scaling["default"] * 1.5,
    ),
    "dora": (LoraConfig(r=2, use_dora=True, target_modules="all-linear"), dora_weight),
    "adalora": (AdaLoraConfig(init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1), adalora_weight),
    "ia3": (IA3Config(), ia3_weight),
}


@KINDS
@pytest.mark.parametrize("method", METHODS)
def test_adapter_is_what_its_paper_says(kind: str, method: str) -> None:
    config, formula = METHODS[method]
    # IA³ scales a bias as well
    model = make_model(kind, use_bias=method != "ia3")
    adapted = adapt(copy.deepcopy(model), copy.deepcopy(config))
    expected = logits(with_explicit_weights(model, adapted, formula))
    assert relative_error(logits(adapted), expected) <= TOLERANCE
    assert (expected - logits(model)).abs().max() > 0.01
    assert_gradients_reach_everything_trainable(adapted)
    assert relative_error(logits(adapted.merge_and_unload()), expected) <= TOLERANCE


@pytest.mark.parametrize(("kind", "target"), [(kind, target) for kind in TARGETS for target in TARGETS[kind]])
def test_lora_on_each_target_alone(kind: str, target: str, tmp_path) -> None:
    """It changes the output as computed by hand, trains, merges, unmerges, and comes back from a file bit by bit."""
    model = make_model(kind, tie_word_embeddings=False)
    before = logits(model)
    adapted = adapt(copy.deepcopy(model), LoraConfig(r=2, target_modules=[target]), std=0.5)
    expected = with_explicit_weights(model, adapted, METHODS["lora"][1])
    result = logits(adapted)
    assert relative_error(result, logits(expected)) <= TOLERANCE
    assert (result - before).abs().max() > 1e-3
    assert_gradients_reach_everything_trainable(adapted)

    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)), result)

    adapted.merge_adapter()
    assert relative_error(logits(adapted), result) <= TOLERANCE
    adapted.unmerge_adapter()
    assert relative_error(logits(adapted), result) <= TOLERANCE
    with torch.no_grad(), adapted.disable_adapter():
        assert relative_error(adapted(input_ids=IDS).logits, before) <= TOLERANCE
    merged = adapted.merge_and_unload()
    for (name, weight), wanted in zip(merged.named_parameters(), expected.parameters(), strict=True):
        assert relative_error(weight, wanted) <= 1e-6, name


OTHER_METHODS = {
    "loha": LoHaConfig(r=2, target_modules="all-linear"),
    "lokr": LoKrConfig(r=2, target_modules="all-linear"),
    "vera": VeraConfig(r=2),
    "randlora": RandLoraConfig(r=8, randlora_alpha=8),
    "oft": OFTConfig(oft_block_size=8),
    "boft": BOFTConfig(boft_block_size=4),
    "hra": HRAConfig(r=2),
    "fourierft": FourierFTConfig(n_frequency=10, scaling=10.0),
    "ln_tuning": LNTuningConfig(),
}


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "moe_mamba"])
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_train_reload_and_merge(kind: str, method: str, tmp_path) -> None:
    model = make_model(kind)
    before = logits(model)
    adapted = adapt(copy.deepcopy(model), copy.deepcopy(OTHER_METHODS[method]))
    randomise_adapter(adapted, std=0.02)
    assert_gradients_reach_everything_trainable(adapted)
    result = logits(adapted)
    assert (result - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)), result)
    assert relative_error(logits(adapted.merge_and_unload()), result) <= TOLERANCE


# --- which modules ----------------------------------------------------------------------------------------------------


def adapted_names(adapted) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, m in adapted.named_modules() if hasattr(m, "base_layer")}


@KINDS
def test_default_targets(kind: str) -> None:
    adapted = get_peft_model(make_model(kind), LoraConfig(r=2))
    assert adapted_names(adapted) == set(DEFAULT_TARGETS)
    ia3 = get_peft_model(make_model(kind), IA3Config())
    assert adapted_names(ia3) == set(DEFAULT_TARGETS)
    feedforward = {name.rsplit(".", 1)[-1] for name, m in ia3.named_modules() if getattr(m, "is_feedforward", False)}
    assert feedforward == {"out_proj"}


@KINDS
def test_all_linear_means_all_but_the_head(kind: str) -> None:
    overrides = {"num_shared_experts": 1, "moe_gated": True} if kind == "moe_mamba" else {}
    model = make_model(kind, **overrides)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear} - {"lm_head"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert set(adapted.base_model.targeted_module_names) == linear


@KINDS
def test_native_classes_keep_their_refusal(kind: str) -> None:
    """Their fused paths read the weight of `out_proj` without calling the layer."""
    if kind == "moe_mamba":
        pytest.skip("transformers has no such class")
    native = make_native(make_model(kind))
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(native, LoraConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(native, LoraConfig(r=2))


def test_unregister_gives_peft_back_as_it_was() -> None:
    from peft.tuners import tuners_utils

    hf_mamba.unregister()
    try:
        assert tuners_utils._check_lora_target_modules_mamba.__module__ == tuners_utils.__name__
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            get_peft_model(make_model("mamba"), LoraConfig(r=2, target_modules=["out_proj"]))
    finally:
        hf_mamba.register()
    get_peft_model(make_model("mamba"), LoraConfig(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_lora_on_experts(implementation: str, gated: bool, tmp_path) -> None:
    """`target_parameters`: one pair of low-rank factors for each expert."""
    model = make_model("moe_mamba", moe_gated=gated, moe_bias=True, hidden_size=32, moe_intermediate_size=32)
    model.set_experts_implementation(implementation)
    names = ["gate_up_proj" if gated else "up_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=["in_proj"], target_parameters=[f"moe.experts.{name}" for name in names])
    adapted = adapt(copy.deepcopy(model), config)
    result = logits(adapted)
    assert (result - logits(model)).abs().max() > 1e-3
    assert_gradients_reach_everything_trainable(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)), result)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in adapted.get_base_model().named_modules():
            if hasattr(layer, "parameter_name"):
                weights = getattr(expected.get_submodule(name.split(".base_layer")[0]), layer.parameter_name)
                factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
                A, B = factors[0].unflatten(0, (-1, 2)), factors[1].unflatten(1, (2, -1))
                weights += torch.einsum("erd,fre->efd", A, B) * layer.scaling["default"]
            elif hasattr(layer, "base_layer"):
                expected.get_submodule(name).weight += change_of_weight(layer)
    assert relative_error(logits(expected), result) <= TOLERANCE
    assert relative_error(logits(adapted.merge_and_unload()), result) <= TOLERANCE


@KINDS
def test_whole_modules_beside_an_adapter(kind: str, tmp_path) -> None:
    """The convolution is trained whole, and so are the biases of layers."""
    model = make_model(kind)
    before = logits(model)
    adapted = adapt(copy.deepcopy(model), LoraConfig(r=2, modules_to_save=["conv1d"], bias="all"))
    assert_gradients_reach_everything_trainable(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("conv1d.modules_to_save.default.weight" in name for name in trained)
    assert kind == "mamba2" or any(name.endswith("dt_proj.bias") for name in trained)
    result = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)), result)
    merged = adapted.merge_and_unload()
    assert relative_error(logits(merged), result) <= TOLERANCE
    assert (result - before).abs().max() > 1e-2


@KINDS
def test_recurrence_is_trained_whole_beside_an_adapter(kind: str, tmp_path) -> None:
    """`A_log`, `D` and `dt_bias` are parameters and not modules, which PEFT alone could neither train nor save."""
    names = ["A_log", "D"] + (["dt_bias"] if kind == "mamba2" else [])
    model = make_model(kind)
    before = logits(model)
    adapted = adapt(copy.deepcopy(model), LoraConfig(r=2, modules_to_save=names), std=0.3)
    assert_gradients_reach_everything_trainable(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(any(f".{name}." in trainee for trainee in trained) for name in names)
    result = logits(adapted)
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=IDS).logits, before)
    ids = adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert ids.shape[0] == 2

    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), result)
    reloaded.add_adapter("other", LoraConfig(r=2, modules_to_save=names))
    reloaded.set_adapter("other")
    assert relative_error(logits(reloaded), before) <= TOLERANCE
    reloaded.set_adapter("default")
    assert torch.equal(logits(reloaded), result)
    assert logits(reloaded.unload()).equal(before)

    merged = adapted.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in model.named_parameters()}
    mixer = next(layer.mixer for layer in merged.backbone.layers if layer.mixer is not None)
    assert mixer.A_log.dtype == torch.float32 and not torch.equal(
        mixer.D, model.get_parameter("backbone.layers.0.mixer.D")
    )
    assert relative_error(logits(merged), result) <= TOLERANCE
    merged.save_pretrained(tmp_path / "merged")
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), result) <= TOLERANCE


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "moe_mamba"])
def test_low_rank_change_of_A_log(kind: str) -> None:
    model = make_model(kind)
    adapted = adapt(copy.deepcopy(model), LoraConfig(r=2, target_modules=[], target_parameters=["mixer.A_log"]))
    assert_gradients_reach_everything_trainable(adapted)
    result = logits(adapted)
    assert not torch.equal(result, logits(model))
    merged = adapted.merge_and_unload()
    assert relative_error(logits(merged), result) <= TOLERANCE
    assert merged.backbone.layers[0].mixer.A_log.dtype == torch.float32


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["conv1d"]), r"modules_to_save=\['conv1d'\]"),
        (LoHaConfig(target_modules=["in_proj", "conv1d"]), r"modules_to_save=\['conv1d'\]"),
        (LoraConfig(target_modules=["in_proj", "q_proj"]), "`target_modules` names 'q_proj', which Mamba2ForCausalLM"),
        (LoraConfig(modules_to_save=["conv"]), "`modules_to_save` names 'conv'"),
        (LoraConfig(target_modules=["x_proj"]), "not found in the base model"),
        (LoraConfig(target_parameters=["mixer.A_log"]), r"'mixer.A_log', which is a vector of shape \(8,\)"),
    ],
    ids=["convolution", "convolution and another", "unknown", "unknown module", "of another type", "vector"],
)
def test_targets_that_cannot_be_are_refused(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_model("mamba2"), copy.deepcopy(config))


def test_router_is_trained_whole_or_not_at_all() -> None:
    with pytest.raises(ValueError, match=r"modules_to_save=\['router'\]"):
        get_peft_model(make_model("moe_mamba"), LoraConfig(target_parameters=["router.weight"]))
    adapted = adapt(make_model("moe_mamba"), LoraConfig(r=2, modules_to_save=["router"]))
    assert_gradients_reach_everything_trainable(adapted)


def test_adapter_of_another_model_is_refused(tmp_path) -> None:
    adapt(make_model("mamba2"), LoraConfig(r=2)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*in_proj"):
        PeftModel.from_pretrained(make_model("mamba"), tmp_path)
