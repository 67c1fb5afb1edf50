"""Uploading and loading again: with hf_mamba, without it, with `trust_remote_code`; pipelines, adapters, Trainer."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_mamba
from hf_mamba.integrations.card_rules import validate_card
from hf_mamba.integrations.cards import CardFacts
from hf_mamba.integrations.hub import push_model
from hf_mamba.integrations.trainer_card import TrainerCard

from ..loopback_hub import Hub
from ..models.builders import make_model, make_native
from .examples import IDS, logits, run_python

FAMILIES = pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])


@FAMILIES
def test_model_and_tokenizer_come_back_and_generate(kind: str, hub: Hub, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(kind)
    model.push_to_hub("me/tiny", license="apache-2.0")
    tokenizer.push_to_hub("me/tiny")
    names = set(hub.repositories["me/tiny"])
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    again = AutoModelForCausalLM.from_pretrained("me/tiny")
    assert type(again).__module__.startswith("hf_mamba.") and torch.equal(logits(again), logits(model))
    words = pipeline("text-generation", model="me/tiny")(
        "w5 w9", max_new_tokens=4, do_sample=False, return_full_text=False
    )
    direct = model.generate(torch.tensor([[5, 9]]), max_new_tokens=4, do_sample=False)[0, 2:]
    assert words[0]["generated_text"] == AutoTokenizer.from_pretrained("me/tiny").decode(
        direct, skip_special_tokens=True
    )
    # the tokenizer's upload left the model's card as it was
    card = ModelCard.load("me/tiny")
    assert card.data.license == "apache-2.0" and "# tiny" in card.text and 'model="me/tiny"' in card.text


def test_without_hf_mamba(hub: Hub, tmp_path: Path) -> None:
    """transformers loads what it has classes for; for MoE-Mamba the shim's import makes it say what to install."""
    expected = {}
    for kind in ("mamba", "mamba2", "falcon_mamba"):
        model = make_model(kind)
        model.push_to_hub(f"me/{kind}", license="mit", max_shard_size="20KB")
        assert "model.safetensors.index.json" in hub.repositories[f"me/{kind}"]
        expected[f"me/{kind}"] = logits(model)
    make_model("moe_mamba").push_to_hub("me/experts", license="mit")
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for name, logits in torch.load({str(tmp_path / "expected.pt")!r}).items():
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    with torch.no_grad():
        error = (model(torch.tensor({IDS.tolist()})).logits - logits).abs().max().item()
    print(type(model).__module__.split(".")[0], error < 1e-4)
assert "hf_mamba" not in sys.modules
AutoModelForCausalLM.from_pretrained("me/experts", trust_remote_code=True)
"""
    done = run_python(code, hub, tmp_path / "home", without="hf_mamba")
    assert done.stdout.split("\n")[:-1] == ["transformers True"] * 3, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "pip install hf_mamba" in last


def test_one_line_of_remote_code_loads_moe_mamba(hub: Hub, tmp_path: Path) -> None:
    """A process that never mentions hf_mamba; what it saves again is complete too."""
    model = make_model("moe_mamba")
    model.push_to_hub("me/experts", license="mit")
    shim = hub.repositories["me/experts"]["modeling_hf_mamba.py"].decode()
    assert re.fullmatch(r"from hf_mamba import [\w, ]+  # pip install hf-mamba\n", shim)
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/experts", trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.tensor({IDS.tolist()})).logits
model.save_pretrained({str(tmp_path / "again")!r})
print(type(model).__module__, torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r})))
"""
    done = run_python(code, hub, tmp_path / "home")
    assert done.stdout.split() == ["hf_mamba.models.moe_mamba.modeling_moe_mamba", "True"], done.stderr
    written = {file.name for file in (tmp_path / "again").iterdir()}
    assert written == set(hub.repositories["me/experts"])
    mapped = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert mapped == json.loads(hub.repositories["me/experts"]["config.json"])["auto_map"]


def test_an_adapter_is_pushed_and_loads_over_its_base(hub: Hub) -> None:
    make_model("mamba2").push_to_hub("me/base", license="mit")
    base = AutoModelForCausalLM.from_pretrained("me/base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    push_model(adapted, "me/adapter", license="mit")
    assert set(hub.repositories["me/adapter"]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    again = AutoPeftModelForCausalLM.from_pretrained("me/adapter")
    assert torch.equal(logits(again), logits(adapted))
    card = ModelCard.load("me/adapter")
    assert (card.data.library_name, card.data.base_model, card.data.pipeline_tag) == (
        "peft",
        "me/base",
        "text-generation",
    )
    assert "| rank | 8 |" in card.text

    # PEFT's own method does the same, with the licence of the base model's card
    adapted.push_to_hub("me/other", commit_message="Mine")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("me/other")), logits(adapted))
    again_card = ModelCard.load("me/other")
    assert again_card.data.license == "mit" and "| rank | 8 |" in again_card.text


def test_peft_pushes_other_models_as_before(hub: Hub) -> None:
    base = make_native(make_model("mamba2"))
    get_peft_model(base, LoraConfig(target_modules=["in_proj"])).push_to_hub("me/theirs")
    assert b"More Information Needed" in hub.repositories["me/theirs"]["README.md"]


def example_of(card: ModelCard) -> dict:
    """What the card's example leaves behind when it is run."""
    namespace: dict = {}
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(code, namespace)
    return namespace


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ForCausalLM", "CAUSAL_LM"),
        ("ForCausalLM", None),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("Model", "FEATURE_EXTRACTION"),
    ],
)
def test_the_example_in_an_adapters_card_loads_it(head: str, task: str | None, hub: Hub) -> None:
    make_model("mamba").push_to_hub("me/base", license="mit")
    auto_class = getattr(hf_mamba, f"Mamba{head}")
    options = {"num_labels": 3, "pad_token_id": 0} if "Classification" in head else {}
    adapted = get_peft_model(auto_class.from_pretrained("me/base", **options), LoraConfig(task_type=task)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.push_to_hub("me/adapter")
    model = example_of(ModelCard.load("me/adapter"))["model"].eval()
    model.config.pad_token_id = 0
    with torch.no_grad():
        for actual, expected in zip(model(IDS).to_tuple(), adapted(IDS).to_tuple(), strict=True):
            if isinstance(actual, torch.Tensor):
                assert torch.equal(actual, expected)


def make_trainer(model, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Trainer:
    data = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        push_to_hub=True,
        hub_model_id=f"me/{folder.name}",
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_trainer_pushes_at_the_end(hub: Hub, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model("moe_mamba")
    trainer = make_trainer(model, tmp_path / "run", tokenizer)
    trainer.train()
    trainer.push_to_hub()
    names = set(hub.repositories["me/run"])
    assert {
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "modeling_hf_mamba.py",
        "README.md",
    } <= names
    again = AutoModelForCausalLM.from_pretrained("me/run")
    assert torch.equal(logits(again), logits(model))


def test_trainer_with_a_card_of_ours(hub: Hub, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """It holds what the run measured, and the Trainer's own draft is gone."""
    trainer = make_trainer(make_model("mamba2"), tmp_path / "run", tokenizer)
    with pytest.raises(ValueError, match="`license` is missing"):
        TrainerCard(CardFacts()).attach(trainer)
    TrainerCard(CardFacts(license="mit", datasets=("someone/words",))).attach(trainer)
    trainer.train()
    trainer.push_to_hub(language="en")
    card = ModelCard.load("me/run")
    validate_card(card)
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en"], ["someone/words"])
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("loss", measured)]
    assert "## Architecture" in card.text and "1 steps" in card.text and "learning_rate" in card.text
    sent = dict(hub.repositories["me/run"])
    with pytest.raises(ValueError, match="`base_model` must be an id"):
        trainer.push_to_hub(finetuned_from="/home/me/base")
    assert hub.repositories["me/run"] == sent


def test_revisions_and_shards_of_an_earlier_upload(hub: Hub) -> None:
    first, second = make_model("mamba", seed=0), make_model("mamba", seed=1)
    before = first.push_to_hub("me/tiny", license="mit").oid
    second.push_to_hub("me/tiny", max_shard_size="20KB")
    # the licence is known from the card, and no file of the first upload can be loaded instead of the second's
    assert "model.safetensors" not in hub.repositories["me/tiny"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(second))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny", revision=before)), logits(first))
    first.push_to_hub("me/tiny", revision="older")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny", revision="older")), logits(first))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(second))
    assert {branch.name for branch in HfApi().list_repo_refs("me/tiny").branches} == {"main", "older"}


def test_an_adapter_leaves_its_base_model_in_the_repository(hub: Hub) -> None:
    """And a model takes an adapter's place, which would be loaded instead of it."""
    model = make_model("mamba")
    model.push_to_hub("me/tiny", license="mit")
    hub.repositories["me/tiny"]["older/model.safetensors.index.json"] = b"{}"
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("me/tiny"), LoraConfig(task_type="CAUSAL_LM"))
    adapted.push_to_hub("me/tiny")
    assert {"model.safetensors", "adapter_model.safetensors"} <= set(hub.repositories["me/tiny"])
    other = make_model("mamba", seed=1)
    other.push_to_hub("me/tiny")
    assert not any("adapter" in name for name in hub.repositories["me/tiny"])
    assert "older/model.safetensors.index.json" in hub.repositories["me/tiny"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/tiny")), logits(other))


def test_private_repositories_need_the_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mamba")
    model.push_to_hub("secret", license="mit", private=True)
    assert hub.private == {"me/secret"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/secret")), logits(model))
    for token in ("hf_wrong", ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match="me/secret"):
            AutoModelForCausalLM.from_pretrained("me/secret", cache_dir=tmp_path / "other")


def test_save_pretrained_can_push(hub: Hub, tmp_path: Path) -> None:
    model = make_model("mamba2")
    facts = CardFacts(license="mit", language=("en",), datasets=("someone/words",))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", facts=facts, commit_message="First")
    assert torch.equal(logits(hf_mamba.Mamba2ForCausalLM.from_pretrained("me/mine")), logits(model))
    assert ModelCard.load("me/mine").data.datasets == ["someone/words"]

    other = make_model("mamba2", seed=1)
    model.save_pretrained(tmp_path / "mine", state_dict=other.state_dict(), push_to_hub=True, repo_id="me/mine")
    for name in (tmp_path / "mine", "me/mine"):
        assert torch.equal(logits(hf_mamba.Mamba2ForCausalLM.from_pretrained(name)), logits(other))


def test_nothing_of_this_machine_is_in_what_is_saved(
    hub: Hub, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    make_model("moe_mamba").save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    again.push_to_hub("me/clean", license="mit")
    AutoTokenizer.from_pretrained(tmp_path / "first").push_to_hub("me/clean")
    folder = Path(snapshot_download("me/clean"))
    for file in folder.iterdir():
        content = file.read_bytes()
        for trace in (str(tmp_path), str(Path.home()) + "/", "hf_test"):
            assert trace.encode() not in content, f"{file.name} holds {trace}"
