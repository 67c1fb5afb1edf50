"""PEFT on every projection: what an adapter does is compared with weights that were computed by hand.

`test_native_defects_loading.py` holds what native classes get wrong; here stand targets, methods, files and switching.
"""

import copy
import warnings

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
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
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_mamba
from hf_mamba.integrations.peft import DEFAULT_TARGETS

from .builders import make_model, make_native, random_ids

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])
TARGETS = {
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"],
    "mamba2": ["in_proj", "out_proj", "embeddings", "lm_head"],
    "falcon_mamba": ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"],
    "moe_mamba": ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"],
}
TOLERANCE = 1e-5
IDS = random_ids(2, 17)


@torch.no_grad()
def randomise_adapter(model, seed: int = 5, std: float = 0.1) -> None:
    """Move whatever is trainable away from its start, where most adapters do nothing."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(std * torch.randn_like(parameter))


def adapt(model, config, seed: int = 5, std: float = 0.1):
    """An adapted model in eval mode, with a random adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    randomise_adapter(adapted, seed, std)
    return adapted.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Maximum error in units of the largest value, or of 1 if all are smaller."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def assert_gradients_reach_everything_trainable(adapted) -> None:
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    adapted.zero_grad()
    adapted.eval()


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


# --- tied embeddings --------------------------------------------------------------------------------------------------

TIED = {
    "embedding": {"target_modules": ["embeddings"]},
    "head": {"target_modules": ["lm_head"]},
    "both apart": {"target_modules": ["embeddings", "lm_head", "in_proj"]},
    "both together": {"target_modules": ["embeddings", "in_proj"], "ensure_weight_tying": True},
    "whole embedding": {"modules_to_save": ["embeddings"]},
    "whole and together": {"modules_to_save": ["embeddings"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": {"embeddings": [3, 4, 5]}},
}


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("targets", TIED)
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`"
)
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_merging_with_tied_embeddings(kind: str, targets: str, tmp_path) -> None:
    """Native models come out of it with errors of 8 to 60: a change of the one weight counts for both layers."""
    model = make_model(kind, tie_word_embeddings=True)
    adapted = adapt(copy.deepcopy(model), LoraConfig(r=2, **TIED[targets]))
    assert_gradients_reach_everything_trainable(adapted)
    result = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), result)

    adapted.merge_adapter()
    assert relative_error(logits(adapted), result) <= TOLERANCE
    adapted.unmerge_adapter()
    assert relative_error(logits(adapted), result) <= TOLERANCE
    merged = adapted.merge_and_unload()
    assert relative_error(logits(merged), result) <= TOLERANCE
    merged.save_pretrained(tmp_path / "merged")
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), result) <= TOLERANCE
    tied = merged.lm_head.weight is merged.backbone.embeddings.weight
    assert merged.config.tie_word_embeddings == tied


def test_merging_mixed_adapters_with_tied_embeddings() -> None:
    """Adapters of several methods in one model, which PEFT merges in a way of its own."""
    model = make_model("mamba2", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixed = get_peft_model(
            model, LoraConfig(r=2, target_modules=["embeddings", "in_proj"]), adapter_name="lora", mixed=True
        )
        mixed.add_adapter("loha", LoHaConfig(r=2, target_modules=["out_proj"]))
    mixed.set_adapter(["lora", "loha"])
    randomise_adapter(mixed)
    result = logits(mixed.eval())
    merged = mixed.merge_and_unload()
    assert relative_error(logits(merged), result) <= TOLERANCE
    assert not merged.config.tie_word_embeddings


# --- files, several adapters, switching -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A base model on disk, two adapters on disk beside it, and the logits of the three."""
    model = make_model("mamba2")
    model.save_pretrained(tmp_path / "base")
    results = {"base": logits(model)}
    for seed, (name, targets) in enumerate({"first": ["in_proj"], "second": ["in_proj", "out_proj"]}.items()):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = adapt(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"), seed=seed)
        adapted.save_pretrained(tmp_path / name)
        results[name] = logits(adapted)
    return tmp_path, results


def test_auto_classes_load_an_adapter_folder(saved) -> None:
    folder, results = saved
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(folder / "second").eval()
        assert any(type(module).__module__.startswith("hf_mamba.") for module in loaded.modules())
        assert torch.equal(logits(loaded), results["second"])
    half = AutoPeftModelForCausalLM.from_pretrained(folder / "second", dtype=torch.bfloat16)
    assert half.get_base_model().backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert (logits(half) - results["second"]).abs().max() < 0.3


def test_several_adapters_are_switched_and_combined(saved) -> None:
    folder, results = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "first", "first")
    model.load_adapter(folder / "second", "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), results[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), results["base"])
    model.set_adapter("second")
    model.delete_adapter("first")
    assert torch.equal(logits(model), results["second"])


def test_an_adapter_for_each_row_of_a_batch(saved) -> None:
    folder, results = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "first", "first")
    model.load_adapter(folder / "second", "second")
    with torch.no_grad():
        rows = model.eval()(input_ids=IDS, adapter_names=["second", "__base__"]).logits
    assert relative_error(rows[0], results["second"][0]) <= TOLERANCE
    assert relative_error(rows[1], results["base"][1]) <= TOLERANCE


def test_hot_swapping_puts_other_weights_into_the_same_layers(saved, tmp_path) -> None:
    folder, results = saved
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    other = adapt(base, LoraConfig(r=2, target_modules=["in_proj", "out_proj"], task_type="CAUSAL_LM"), seed=9)
    hotswap_adapter(other, str(folder / "second"), adapter_name="default")
    assert torch.equal(logits(other), results["second"])


def test_transformers_own_adapter_methods(saved) -> None:
    folder, results = saved
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model.load_adapter(str(folder / "second"), adapter_name="second")
    assert torch.equal(logits(model), results["second"])
    try:
        model.disable_adapters()
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    assert torch.equal(logits(model), results["base"])
    model.enable_adapters()
    assert torch.equal(logits(model), results["second"])


@KINDS
def test_generating_with_an_adapter_and_after_merging_it(kind: str) -> None:
    adapted = adapt(make_model(kind), LoraConfig(r=2, target_modules="all-linear"))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    generated = adapted.generate(input_ids=IDS, attention_mask=mask, **options)
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=generated).logits[:, 16:-1].argmax(-1), generated[:, 17:])
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=IDS, attention_mask=mask, **options), generated)


@KINDS
def test_classifier_with_an_adapter_keeps_its_new_head(kind: str, tmp_path) -> None:
    make_model(kind).save_pretrained(tmp_path / "base")
    head = {"num_labels": 3, "pad_token_id": 0}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **head)
    adapted = adapt(base, LoraConfig(r=2, task_type="SEQ_CLS"))
    adapted.train()(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    result = logits(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", **head)
    assert torch.equal(logits(reloaded.eval()), result)


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
