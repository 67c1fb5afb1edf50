"""Adapters on tied embeddings, in files and beside each other: loading, merging, switching."""

import copy
import warnings

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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
from .builders import make_model

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
