"""Model cards: every number is the model's own or was handed over; metadata that the Hub would not take are errors."""

import doctest
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig, get_peft_model

import hf_mamba
from hf_mamba.demo_checkpoint import DEMO_CHECKPOINTS
from hf_mamba.integrations import cards, trainer_card
from hf_mamba.integrations.card_rules import validate_card
from hf_mamba.integrations.cards import (
    CardFacts,
    card_of_folder,
    facts_of_card,
    facts_of_report,
    model_card,
    report_results,
    state_bytes,
)
from hf_mamba.integrations.hub import push_folder, push_model

from ..loopback_hub import Hub
from ..models.builders import ALL_MODELS, make_model
from .examples import IDS

ROOT = Path(__file__).parents[2]
RESULT = EvalResult(
    task_type="text-generation",
    dataset_type="text",
    dataset_name="held-out words",
    dataset_split="test",
    metric_type="perplexity",
    metric_value=12.5,
)
FACTS = CardFacts(
    license="apache-2.0",
    language=("en",),
    base_model="someone/larger",
    datasets=("someone/words", "someone/sentences"),
    tags=("small",),
    training="Two epochs.",
    limits="It knows sixty words.",
    results=(RESULT,),
)


@ALL_MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_size_of_the_state_is_that_of_the_cache(kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind).to(dtype)
    for length in (1, 5):
        cache = hf_mamba.RecurrentCache(model.config)
        with torch.no_grad():
            model(IDS[:, :length], cache=cache)
        assert state_bytes(model) == cache.nbytes


@ALL_MODELS
def test_a_save_writes_a_card_of_the_models_own_numbers(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "tiny")
    card = ModelCard.load(tmp_path / "tiny" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"hf_mamba", model.config.model_type} <= set(card.data.tags) and card.data.license is None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"with {parameters:,} parameters" in card.text and f"{state_bytes(model):,} bytes" in card.text
    assert ("active for a token" in card.text) == (kind == "moe_mamba") == ("trust_remote_code" in card.text)
    for section in ("Use", "Architecture", "Training", "Evaluation", "Limits"):
        assert f"\n## {section}\n" in card.text
    assert "Not measured." in card.text and "None" not in card.text
    # the files alone say the same
    assert str(card_of_folder(tmp_path / "tiny")) == str(card)


@pytest.mark.parametrize(
    ("head", "tag"),
    [
        ("Model", "feature-extraction"),
        ("ForSequenceClassification", "text-classification"),
        ("ForTokenClassification", "token-classification"),
    ],
)
def test_the_head_decides_the_pipeline(head: str, tag: str, tmp_path: Path) -> None:
    make_model("mamba", head).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == tag


def test_facts_go_to_metadata_and_text() -> None:
    card = model_card(make_model("mamba2"), "tiny", FACTS, model_id="me/tiny")
    validate_card(card)
    metadata = yaml.safe_load(str(card).split("---")[1])
    assert metadata["datasets"] == ["someone/words", "someone/sentences"] and "small" in metadata["tags"]
    (model,) = metadata["model-index"]
    assert model["name"] == "tiny" and model["results"][0]["metrics"][0]["value"] == 12.5
    for part in ("| held-out words | test | perplexity | 12.5 |", "Two epochs.", "sixty words", "someone/larger"):
        assert part in card.text
    again = facts_of_card(card)
    assert (again.license, again.base_model, again.datasets) == ("apache-2.0", "someone/larger", FACTS.datasets)
    assert again.results[0].metric_value == 12.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"license": None}, "`license` is missing"),
        ({"license": "my-own"}, "`license` must be one that the Hub knows"),
        ({"license": "other"}, "`license_name`"),
        ({"pipeline_tag": "text-dreaming"}, "`pipeline_tag` must be one that the Hub knows"),
        ({"pipeline_tag": None}, "`pipeline_tag`"),
        ({"library_name": None}, "`library_name` is missing"),
        ({"base_model": "/home/me/model"}, "`base_model` must be an id"),
        ({"datasets": ["a/b/c"]}, "`datasets` must be an id"),
        ({"language": ["English"]}, "ISO 639"),
        ({"tags": ["good", 7]}, "`tags` must hold texts"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__() if isinstance(value, dict) else "",
)
def test_invalid_metadata_are_an_error(change: dict, words: str) -> None:
    card = model_card(make_model("mamba"), "tiny", CardFacts(license="mit"))
    for key, value in change.items():
        card.data[key] = value
    with pytest.raises(ValueError, match=words):
        validate_card(card)


def test_a_result_that_is_no_number_is_an_error() -> None:
    broken = EvalResult(**{**vars(RESULT), "metric_value": float("nan")})
    with pytest.raises(ValueError, match="finite number"):
        validate_card(model_card(make_model("mamba"), "tiny", CardFacts(license="mit", results=(broken,))))


def test_all_problems_are_named_at_once() -> None:
    card = model_card(make_model("mamba"), "tiny", CardFacts(base_model="nowhere/at/all"))
    with pytest.raises(ValueError, match=r"license.*base_model"):
        validate_card(card)


def test_without_a_licence_nothing_is_sent(hub: Hub, tmp_path: Path) -> None:
    model = make_model("mamba")
    with pytest.raises(ValueError, match="`license` is missing"):
        model.push_to_hub("me/tiny")
    with pytest.raises(ValueError, match="`license` must be one"):
        model.push_to_hub("me/tiny", license="do what you want")
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(re.sub("pipeline_tag: .*", "pipeline_tag: dreaming\nlicense: mit", card.read_text()))
    with pytest.raises(ValueError, match="`pipeline_tag`"):
        push_folder(tmp_path, "me/tiny")
    assert hub.repositories == {} and {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_the_licence_of_the_base_model_is_taken_over(hub: Hub, tmp_path: Path) -> None:
    make_model("mamba").push_to_hub("me/base", license="cc-by-4.0")
    again = hf_mamba.MambaForCausalLM.from_pretrained("me/base")
    again.push_to_hub("me/tuned")
    card = ModelCard.load("me/tuned")
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", "me/base")
    # nothing is its own base model
    for name in ("me/base", "base"):
        again.push_to_hub(name)
        assert ModelCard.load("me/base").data.base_model is None


MINE = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# My own words\n"


def test_a_card_that_somebody_wrote_is_kept(hub: Hub, tmp_path: Path) -> None:
    model = make_model("mamba")
    (tmp_path / "README.md").write_text(MINE)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == MINE
    push_folder(tmp_path, "me/tiny")
    assert "# My own words" in hub.repositories["me/tiny"]["README.md"].decode()
    model.push_to_hub("me/tiny", tags=["small"])
    card = ModelCard.load("me/tiny")
    assert "# My own words" in card.text and card.data.tags == ["small"]


def test_a_card_without_content_is_replaced(hub: Hub, tokenizer) -> None:
    """transformers' own, which pushing a tokenizer first leaves behind."""
    tokenizer.push_to_hub("me/tiny")
    assert b"More Information Needed" in hub.repositories["me/tiny"]["README.md"]
    make_model("mamba").push_to_hub("me/tiny", license="mit")
    assert "## Architecture" in ModelCard.load("me/tiny").text


def test_a_card_that_somebody_began_is_kept(hub: Hub, tokenizer) -> None:
    """The libraries' template with one field filled in."""
    tokenizer.push_to_hub("me/tiny")
    begun = hub.repositories["me/tiny"]["README.md"].replace(b"[More Information Needed]", b"Somebody's work", 1)
    hub.repositories["me/tiny"]["README.md"] = begun
    make_model("mamba").push_to_hub("me/tiny", license="mit")
    card = ModelCard.load("me/tiny")
    assert "Somebody's work" in card.text and (card.data.license, card.data.pipeline_tag) == ("mit", "text-generation")


def test_adapters_of_every_name_get_a_base_model_that_others_have(hub: Hub, tmp_path: Path) -> None:
    make_model("mamba").save_pretrained(tmp_path / "base")
    base = hf_mamba.MambaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    adapted.add_adapter("second", LoraConfig(task_type="CAUSAL_LM"))
    push_model(adapted, "me/adapter", license="mit", facts=CardFacts(base_model="me/base"))
    files = hub.repositories["me/adapter"]
    for name in ("adapter_config.json", "second/adapter_config.json"):
        assert json.loads(files[name])["base_model_name_or_path"] == "me/base"


def test_adapters_get_a_card_and_no_path_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    make_model("mamba").save_pretrained(tmp_path / "base")
    base = hf_mamba.MambaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj"]))
    with pytest.raises(ValueError, match="--base-model"):
        push_model(adapted, "me/adapter", license="mit")
    push_model(adapted, "me/adapter", license="mit", facts=CardFacts(base_model="me/base"))
    files = hub.repositories["me/adapter"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert all(str(tmp_path).encode() not in content for content in files.values())
    card = ModelCard.load("me/adapter")
    assert card.data.base_model == "me/base" and "adapter with" in card.text


def test_a_training_report_gives_results_and_procedure() -> None:
    report = json.loads((Path(hf_mamba.demo_checkpoint()) / "training_report.json").read_text())
    facts = facts_of_report(report)
    assert facts.results == tuple(report_results(report, "held-out text"))
    assert f"{report['tokens_seen']:,} tokens" in (facts.training or "")
    with pytest.raises(ValueError, match="not one of"):
        facts_of_report({"results": {}})


@pytest.mark.parametrize("module", [cards, trainer_card], ids=lambda module: module.__name__.split(".")[-1])
def test_examples_in_docstrings(module: ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0 and outcome.failed == 0


@pytest.mark.checkout
def test_the_finished_cards_are_those_of_the_checkpoints_shipped() -> None:
    """And they could be uploaded as they are."""
    for name in DEMO_CHECKPOINTS:
        finished = ROOT / "model_cards" / f"hf-mamba-demo-{name.replace('_', '-')}.md"
        assert finished.read_bytes() == (Path(hf_mamba.demo_checkpoint(name)) / "README.md").read_bytes()
        validate_card(ModelCard.load(finished))
