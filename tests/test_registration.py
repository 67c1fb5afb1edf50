"""Auto classes give our models after `import hf_mamba`, transformers' own after `unregister()`."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_mamba
from hf_mamba.registration import MODEL_TYPES

from .models.builders import CLASSES, NATIVE, VOCAB, make_model, random_ids

AUTO_CLASSES = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
TYPES = pytest.mark.parametrize("model_type", list(CLASSES))
NATIVE_TYPES = pytest.mark.parametrize("model_type", list(NATIVE))
HEADS = pytest.mark.parametrize("head", list(AUTO_CLASSES))


@pytest.fixture
def unregistered():
    hf_mamba.unregister()
    yield
    hf_mamba.register()


def ours(model_type: str, suffix: str) -> type:
    return getattr(hf_mamba, CLASSES[model_type] + suffix)


def run_python(code: str, **environment: str) -> str:
    """The last line that `code` prints in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@TYPES
@HEADS
def test_from_pretrained_gives_our_class(model_type: str, head: str, tmp_path) -> None:
    make_model(model_type, head).save_pretrained(tmp_path)
    model, info = AUTO_CLASSES[head].from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is ours(model_type, head)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == model_type and saved["architectures"] == [CLASSES[model_type] + head]
    assert type(AutoConfig.from_pretrained(tmp_path)) is ours(model_type, "Config")


@TYPES
@HEADS
def test_from_config_gives_our_class(model_type: str, head: str) -> None:
    config = make_model(model_type).config
    assert type(AUTO_CLASSES[head].from_config(config)) is ours(model_type, head)
    assert type(AutoConfig.for_model(model_type)) is ours(model_type, "Config")


@NATIVE_TYPES
@HEADS
def test_from_config_with_a_native_configuration(model_type: str, head: str) -> None:
    model = make_model(model_type)
    values = model.config.to_dict()
    values.pop("model_type")
    config = NATIVE[model_type][0](**values)
    assert type(config).__module__.startswith("transformers.")
    made = AUTO_CLASSES[head].from_config(config)
    assert type(made) is ours(model_type, head)
    with torch.no_grad():
        assert torch.isfinite(made(random_ids(1, 5))[0]).all()


@TYPES
def test_classifiers_load_a_language_model(model_type: str, tmp_path) -> None:
    """The backbone of a language model under a new classification head."""
    model = make_model(model_type)
    model.save_pretrained(tmp_path)
    made, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert made.score.weight.shape == (3, 32) and made.config.num_labels == 3
    for name, value in made.backbone.state_dict().items():
        assert torch.equal(value, model.backbone.state_dict()[name]), name
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        ids = random_ids(1, 6)
        assert torch.equal(backbone.eval()(ids)[0], model.backbone(ids)[0])


def test_unregister_gives_the_native_classes_back(unregistered, tmp_path) -> None:
    for model_type, (config_class, model_class) in NATIVE.items():
        assert not hf_mamba.is_registered(model_type)
        config = AutoConfig.for_model(model_type)
        assert type(config) is config_class
        # one of our models, saved and loaded by transformers
        model = make_model(model_type)
        model.save_pretrained(tmp_path / model_type)
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / model_type)) is model_class
        assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / model_type))) is model_class
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForSequenceClassification.from_config(config)
    assert not hf_mamba.is_registered("moe_mamba") and "moe_mamba" not in CONFIG_MAPPING


def test_register_and_unregister_may_be_called_again() -> None:
    contents = [dict(auto_class._model_mapping._extra_content) for auto_class in AUTO_CLASSES.values()]
    configs = dict(CONFIG_MAPPING._extra_content)
    for _ in range(2):
        hf_mamba.register()
    assert all(hf_mamba.is_registered(name) for name in MODEL_TYPES)
    for _ in range(2):
        hf_mamba.unregister()
    assert not any(hf_mamba.is_registered(name) for name in MODEL_TYPES)
    for auto_class in AUTO_CLASSES.values():
        assert not [
            v for v in auto_class._model_mapping._extra_content.values() if v.__module__.startswith("hf_mamba")
        ]
    hf_mamba.register()
    for before, auto_class in zip(contents, AUTO_CLASSES.values(), strict=True):
        assert dict(auto_class._model_mapping._extra_content).keys() == before.keys()
    assert dict(CONFIG_MAPPING._extra_content) == configs
    assert not hf_mamba.is_registered("llama")


def test_registrations_of_others_survive() -> None:
    class OtherConfig(transformers.PreTrainedConfig):
        model_type = "other_model_of_a_test"

    class OtherModel(transformers.PreTrainedModel):
        config_class = OtherConfig

    AutoConfig.register(OtherConfig.model_type, OtherConfig)
    AutoModel.register(OtherConfig, OtherModel)
    try:
        hf_mamba.unregister()
        assert type(AutoModel.from_config(OtherConfig())) is OtherModel
        hf_mamba.register()
        assert type(AutoModel.from_config(OtherConfig())) is OtherModel
    finally:
        AutoModel._model_mapping._extra_content.pop(OtherConfig)
        CONFIG_MAPPING._extra_content.pop(OtherConfig.model_type)
        hf_mamba.register()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "deepcopy", "pickle"]
)
def test_auto_mappings_can_be_copied(copied) -> None:
    mapping = copied(AutoModelForCausalLM._model_mapping)
    for model_type in CLASSES:
        config_class = ours(model_type, "Config")
        assert config_class in mapping and mapping[config_class] is ours(model_type, "ForCausalLM")
        assert mapping.get(config_class, None) is ours(model_type, "ForCausalLM")


def test_mappings_hold_classes_however_they_are_read() -> None:
    content = AutoModelForTokenClassification._model_mapping._extra_content
    hf_mamba.unregister()
    hf_mamba.register()
    config_class = hf_mamba.MambaConfig
    expected = hf_mamba.MambaForTokenClassification
    for read in (
        lambda: content[config_class],
        lambda: content.get(config_class),
        lambda: dict(content)[config_class],
        lambda: {**content}[config_class],
        lambda: dict(content.items())[config_class],
        lambda: content.copy()[config_class],
        lambda: next(v for v in content.values() if v.__name__ == expected.__name__),
    ):
        hf_mamba.unregister()
        hf_mamba.register()
        assert read() is expected
    assert content.get(int) is None and content.get(int, 3) == 3


def test_tokenizers_are_not_affected(tmp_path) -> None:
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    for model_type in CLASSES:
        folder = tmp_path / model_type
        make_model(model_type).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
        assert again("w5 w6 w60").input_ids == [5, 6, 60] and again.pad_token_id == 0


# in a fresh interpreter


def test_opting_out_and_a_light_import() -> None:
    """transformers' modeling code takes seconds to import, triton needs a GPU: registering touches neither."""
    printed = run_python(
        """
import sys, transformers, hf_mamba
found = [hf_mamba.is_registered("mamba"), type(transformers.AutoConfig.for_model("mamba")).__module__.split(".")[0]]
hf_mamba.register()
heavy = [name for name in ("transformers.modeling_utils", "triton", "peft", "torchvision") if name in sys.modules]
found += [hf_mamba.is_registered("mamba"), type(transformers.AutoConfig.for_model("mamba")).__module__.split(".")[0]]
print(found, heavy)
""",
        HF_MAMBA_REGISTER="0",
    )
    assert printed == "[False, 'transformers', True, 'hf_mamba'] []"


def test_saved_models_load_without_this_package(tmp_path) -> None:
    """A folder saved by us, read by plain transformers in a process that never imports hf_mamba."""
    ids = random_ids(1, 7)
    expected = {}
    for model_type in NATIVE:
        model = make_model(model_type)
        model.save_pretrained(tmp_path / model_type)
        with torch.no_grad():
            expected[model_type] = model(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    run_python(
        f"""
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
folder = Path({str(tmp_path)!r})
ids = torch.load(folder / "ids.pt")
for name in {list(NATIVE)!r}:
    model, info = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
    assert type(model).__module__.startswith("transformers."), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.save(model.eval()(ids).logits.detach(), folder / (name + ".pt"))
assert not [name for name in sys.modules if name.startswith(("hf_mamba", "mamba_kernels"))]
print("done")
"""
    )
    for model_type, logits in expected.items():
        assert (torch.load(tmp_path / f"{model_type}.pt") - logits).abs().max().item() <= 1e-5


def test_models_can_be_pickled_into_another_process(tmp_path) -> None:
    """What a data-parallel launcher does: the class is found by its module, which imports and registers."""
    model = make_model("mamba2")
    torch.save(model, tmp_path / "model.pt")
    printed = run_python(
        f"import torch; m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        "import hf_mamba;"
        "print(type(m).__module__, tuple(m(torch.tensor([[3, 4]])).logits.shape), hf_mamba.is_registered('mamba2'))"
    )
    assert printed == f"hf_mamba.models.mamba2.modeling_mamba2 (1, 2, {VOCAB}) True"
