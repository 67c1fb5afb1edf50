"""What transformers' native classes get wrong about checkpoints, precision and adapters, right here.

The numbers are those of the list of native defects.
"""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_mamba
from hf_mamba import RecurrentCache
from hf_mamba.layers import SelectiveScanMixer

from .builders import ALL_MODELS, CLASSES, CONFIGS, NATIVE, NATIVE_MODELS, VOCAB, make_model, random_ids

TOLERANCE = 1e-5
FP32_NAMES = ("A_log", "D", "dt_bias")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def assert_fp32_where_it_matters(model, dtype: torch.dtype, reference=None) -> None:
    states = {} if reference is None else reference.state_dict()
    kept = 0
    for name, parameter in model.named_parameters():
        # so do routers: rounding would change the choice of experts
        if name.rsplit(".", 1)[-1] in FP32_NAMES or ".router." in name:
            kept += 1
            assert parameter.dtype == torch.float32, name
            # not merely cast back after rounding
            assert reference is None or torch.equal(parameter, states[name]), name
        else:
            assert parameter.dtype == dtype, name
    assert kept >= 2


@ALL_MODELS
@HALF
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_defect_15_recurrence_parameters_stay_fp32_on_loading(
    kind: str, dtype: torch.dtype, argument: str, tmp_path
) -> None:
    """Native classes round A_log, D and dt_bias to the requested dtype."""
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, **{argument: dtype})
    assert_fp32_where_it_matters(loaded, dtype, reference=model)
    if argument == "dtype":
        by_name = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=str(dtype).removeprefix("torch."))
        assert_fp32_where_it_matters(by_name, dtype, reference=model)


@ALL_MODELS
@HALF
def test_defect_15_recurrence_parameters_stay_fp32_from_config(kind: str, dtype: torch.dtype) -> None:
    config = CONFIGS[kind]()
    assert_fp32_where_it_matters(AutoModelForCausalLM.from_config(config, dtype=dtype), dtype)
    assert_fp32_where_it_matters(
        getattr(hf_mamba, CLASSES[config.model_type] + "ForCausalLM")._from_config(config, dtype=dtype), dtype
    )


@ALL_MODELS
def test_defect_15_a_half_precision_checkpoint_keeps_fp32_through_a_round_trip(kind: str, tmp_path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "fp32")
    half = type(model).from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bf16")
    # dtype="auto" is transformers' default: it is what the checkpoint says
    again = type(model).from_pretrained(tmp_path / "bf16")
    assert_fp32_where_it_matters(again, torch.bfloat16, reference=model)
    ids = random_ids(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, half(ids).logits)


@ALL_MODELS
def test_defect_15_training_equals_evaluation_in_half_precision(kind: str, tmp_path) -> None:
    make_model(kind).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = random_ids(2, 21)
    in_training = model.train()(ids).logits
    assert torch.equal(in_training, model.eval()(ids).logits)
    in_training.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name


@ALL_MODELS
def test_defect_16_classification_heads_through_auto_classes(kind: str, tmp_path) -> None:
    """There are no native heads, and transformers' generic one breaks on the native output."""
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert type(classifier).__name__ == CLASSES[model.config.model_type] + "ForSequenceClassification"
    assert set(info["missing_keys"]) == {"score.weight"}
    logits = classifier(random_ids(2, 7)).logits
    assert logits.shape == (2, 3) and logits.isfinite().all()


class ScaledLinear(nn.Linear):
    """Stands for an adapter or a quantised layer: `weight` alone does not say what the layer does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * nn.functional.linear(x, self.weight, self.bias)


@ALL_MODELS
def test_defect_17_wrapped_linear_layers_take_effect_everywhere(kind: str) -> None:
    """Native code reads `x_proj`, `dt_proj` and `out_proj` weights raw in some of its paths, so wrappers are bypassed."""
    model = make_model(kind, use_bias=True, tie_word_embeddings=False)
    scaled = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        scaled.get_submodule(name).__class__ = ScaledLinear
        linear = model.get_submodule(name)
        with torch.no_grad():
            linear.weight.mul_(1.5)
            if linear.bias is not None:
                linear.bias.mul_(1.5)
    ids = random_ids(2, 14)
    with torch.no_grad():
        expected = model(ids).logits
        scale = expected.abs().max()
        assert (scaled(ids).logits - expected).abs().max() <= 1e-5 * scale
        cache = RecurrentCache(scaled.config)
        parts = [scaled(part, cache=cache).logits for part in ids.split([8, 1, 1, 4], dim=1)]
        assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-5 * scale
    for trained in (model.train(), scaled.train()):
        trained(ids, labels=ids).loss.backward()
    for name in names:
        gradient = scaled.get_submodule(name).weight.grad
        reference = 1.5 * model.get_submodule(name).weight.grad
        assert (gradient - reference).abs().max() <= 1e-4 * reference.abs().max(), name


@ALL_MODELS
def test_defect_17_hooks_on_linear_layers_fire(kind: str) -> None:
    """What accelerate's offloading and interpretability tools rely on."""
    model = make_model(kind)
    ids = random_ids(1, 5)
    called: list[str] = []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: called.append(name))
    with torch.no_grad():
        output = model(ids, use_cache=True)
        assert set(called) == set(names)
        called.clear()
        model(ids[:, :1], cache=output.past_key_values)
    assert set(called) == set(names)


def rename_embedding(folder) -> None:
    """Give the checkpoint the key that the original mamba_ssm code writes."""
    weights = load_file(folder / "model.safetensors")
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    assert "lm_head.weight" not in weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@NATIVE_MODELS
def test_defect_19_original_embedding_key(kind: str, tmp_path) -> None:
    """Native from_pretrained does not know `backbone.embedding.weight` and draws embedding and tied head at random."""
    model = make_model(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "original")
    rename_embedding(tmp_path / "original")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "original", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.backbone.embeddings.weight, model.backbone.embeddings.weight)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    # what is saved afterwards has the standard keys, which the native class reads
    loaded.save_pretrained(tmp_path / "standard")
    assert "backbone.embeddings.weight" in load_file(tmp_path / "standard" / "model.safetensors")
    native, info = NATIVE[model.config.model_type][1].from_pretrained(tmp_path / "standard", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(native.backbone.embeddings.weight, model.backbone.embeddings.weight)


@NATIVE_MODELS
def test_defect_19_original_key_into_a_bare_model_and_a_head(kind: str, tmp_path) -> None:
    model = make_model(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rename_embedding(tmp_path)
    for suffix in ("Model", "ForTokenClassification"):
        loaded = getattr(hf_mamba, CLASSES[model.config.model_type] + suffix).from_pretrained(tmp_path)
        assert torch.equal(loaded.get_input_embeddings().weight, model.backbone.embeddings.weight)


@NATIVE_MODELS
def test_defect_24_loaded_weights_are_not_rescaled_again(kind: str, tmp_path) -> None:
    """With `rescale_prenorm_residual` on, native from_pretrained divides every out_proj by sqrt(layers) once more."""
    model = make_model(kind)
    assert model.config.rescale_prenorm_residual
    model.save_pretrained(tmp_path)
    # what we save switches the flag off, so that native classes read the weights as they are
    assert json.loads((tmp_path / "config.json").read_text())["rescale_prenorm_residual"] is False
    assert model.config.rescale_prenorm_residual
    for loaded in (
        NATIVE[model.config.model_type][1].from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path, rescale_prenorm_residual=True),
    ):
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def lora_targets(model) -> list[str]:
    mixers = [name for name, module in model.named_modules() if name.endswith("mixer")]
    selective = isinstance(model.get_submodule(mixers[0]), SelectiveScanMixer)
    return ["in_proj", "x_proj", "dt_proj"] if selective else ["in_proj"]


@ALL_MODELS
def test_defect_23_lora_reaches_every_projection(kind: str) -> None:
    """Native code bypasses adapters on dt_proj always and on x_proj in fused training; merging then changes the outputs."""
    model = make_model(kind, use_bias=True)
    ids = random_ids(2, 17)
    with torch.no_grad():
        plain = model(ids).logits
    torch.manual_seed(3)
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=8, target_modules=lora_targets(model), init_lora_weights=False)
    )
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == set(lora_targets(model))
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert (expected - plain).abs().max() > 0.05
        cache = RecurrentCache(model.config)
        parts = [adapted(input_ids=part, cache=cache).logits for part in ids.split([9, 1, 1, 6], dim=1)]
        assert (torch.cat(parts, dim=1) - expected).abs().max() <= TOLERANCE
        merged = adapted.merge_and_unload()
        assert (merged(ids).logits - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_defect_23_an_adapter_on_one_projection_alone(kind: str) -> None:
    """Native Mamba with LoRA on dt_proj alone raises in backward, since nothing in the graph depends on it."""
    for target in ("x_proj", "dt_proj"):
        adapted = get_peft_model(make_model(kind), LoraConfig(r=2, target_modules=[target]))
        ids = random_ids(1, 9)
        adapted.train()(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
        assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)


@ALL_MODELS
def test_resized_vocabulary_keeps_the_old_rows(kind: str, tmp_path) -> None:
    model = make_model(kind, tie_word_embeddings=False)
    ids = random_ids(1, 6)
    with torch.no_grad():
        expected = model(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert model.config.vocab_size == VOCAB + 3
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :VOCAB], expected)
        model(torch.tensor([[VOCAB + 2]]))
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).lm_head.weight.shape[0] == VOCAB + 3
