"""The checkpoints inside the package: size, card, held-out perplexity as stated, and text made of English words."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_mamba
from hf_mamba.demo_checkpoint import DEMO_CHECKPOINTS
from hf_mamba.integrations.cards import state_bytes
from hf_mamba.integrations.router_health import recorded_routing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from language_modeling import evaluate, read_documents  # noqa: E402

PROMPTS = ("It is a truth universally acknowledged", "And the LORD said unto Moses,", "My dear", "The love of God")
CONTEXT_LENGTH = 512


# bits per byte of test.txt of the checkpoint which these three replaced: 43 M tokens and 3.6 M parameters, where these saw 31.5 M
# tokens and have 3.0 to 3.2 M parameters for a token
FIRST_DEMO = 1.2266


@pytest.fixture(scope="module", params=DEMO_CHECKPOINTS)
def folder(request):
    return Path(hf_mamba.demo_checkpoint(request.param))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def card(folder):
    return ModelCard.load(folder / "README.md")


def test_checkpoints_are_known_by_name():
    assert Path(hf_mamba.demo_checkpoint()) == Path(hf_mamba.demo_checkpoint("mamba2"))
    assert [
        AutoConfig.from_pretrained(hf_mamba.demo_checkpoint(name)).model_type for name in DEMO_CHECKPOINTS
    ] == list(DEMO_CHECKPOINTS)
    with pytest.raises(ValueError, match="no demo checkpoint 'rwkv'; choose from mamba, mamba2, moe_mamba"):
        hf_mamba.demo_checkpoint("rwkv")


def test_checkpoints_differ_in_nothing_but_the_architecture():
    """Same tokenizer, data, tokens and schedule; as many parameters for each token, within 6 %."""
    reports = [
        json.loads((Path(hf_mamba.demo_checkpoint(name)) / "training_report.json").read_text())
        for name in DEMO_CHECKPOINTS
    ]
    for key in ("tokens_seen", "steps", "training_tokens"):
        assert len({report[key] for report in reports}) == 1, key
    active = [report["active_parameters"] for report in reports]
    assert max(active) <= 1.06 * min(active)
    tokenizers = {(Path(hf_mamba.demo_checkpoint(name)) / "tokenizer.json").read_bytes() for name in DEMO_CHECKPOINTS}
    assert len(tokenizers) == 1
    sources = {
        ModelCard.load(Path(hf_mamba.demo_checkpoint(n)) / "README.md").text.count("7a40f087")
        for n in DEMO_CHECKPOINTS
    }
    assert sources == {1}


def test_folder_is_complete_and_small(folder):
    names = {file.name for file in folder.iterdir()}
    needed = {"config.json", "generation_config.json", "model.safetensors"}
    assert needed | {"tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000


def test_weights_are_complete_and_loaded_in_float32(folder, model):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
        assert torch.equal(
            file.get_tensor("backbone.embeddings.weight").float(), model.get_input_embeddings().weight.detach()
        )
    assert stored == {name for name, _ in model.named_parameters()}
    assert type(model).__module__.startswith("hf_mamba.")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_tokenizer_belongs_to_the_model(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id
    # Trainer of transformers 5.17 saves a list
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    text = "“Quotes” — 東京,  two spaces\nand a line."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_perplexity_is_that_of_the_card(model, tokenizer, card):
    stated = {(r.dataset_config, r.metric_type): r.metric_value for r in card.data.eval_results}
    documents = read_documents(ROOT / "tests/fixtures/held_out_excerpt.txt")
    measured = evaluate(model, tokenizer, documents, CONTEXT_LENGTH, batch_size=8)
    assert measured["perplexity"] == pytest.approx(stated["excerpt", "perplexity"], rel=2e-3)
    assert measured["bits_per_byte"] == pytest.approx(stated["excerpt", "bits_per_byte"], rel=2e-3)
    # the best that is possible without looking at the context: the entropy of the excerpt's own tokens
    assert stated["test", "bits_per_byte"] < 1.035 * FIRST_DEMO
    counts = torch.bincount(torch.tensor([token for d in documents for token in tokenizer(d)["input_ids"]])).float()
    shares = counts[counts > 0] / counts.sum()
    assert measured["perplexity"] < 0.25 * torch.exp(-(shares * shares.log()).sum()).item()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_made_of_english_words(model, tokenizer, prompt):
    known = set((ROOT / "tests/fixtures/training_words.txt").read_text(encoding="utf-8").split())
    inputs = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(input_ids=inputs["input_ids"], do_sample=False, max_new_tokens=60)
    text = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    words = re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())[:-1]  # the last one may be cut off
    assert len(words) >= 20
    assert sum(word in known for word in words) >= 0.95 * len(words), text


def test_pipeline_continues_the_prompt(folder):
    generate = pipeline("text-generation", model=str(folder))
    torch.manual_seed(0)
    (result,) = generate(PROMPTS[0], max_new_tokens=20)
    assert result["generated_text"].startswith(PROMPTS[0])
    assert len(result["generated_text"]) > len(PROMPTS[0]) + 20


def test_card_is_complete(folder, card, model):
    data = card.data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "text-generation" and model.config.model_type in data.tags
    assert f"{model.num_parameters():,} parameters" in card.text
    assert f"| state of one sequence | {state_bytes(model):,} bytes |" in card.text
    for section in ("## Measured", "## Data", "## Training", "### Curves", "## Samples", "## Limits"):
        assert section in card.text
    assert "python examples/train_language_model.py" in card.text and "public domain" in card.text
    assert f'hf_mamba.demo_checkpoint("{folder.name}")' in card.text
    assert "{{" not in card.content and "{%" not in card.content
    stated = {(r.dataset_config, r.metric_type) for r in data.eval_results}
    assert {("test", "perplexity"), ("test", "bits_per_byte"), ("excerpt", "perplexity")} <= stated


def test_every_expert_is_used_on_held_out_text():
    """An equal share of the tokens would be 1; a collapsed router gives some experts nearly nothing."""
    name = hf_mamba.demo_checkpoint("moe_mamba")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    text = "\n".join(read_documents(ROOT / "tests/fixtures/held_out_excerpt.txt"))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :4096].view(8, 512)
    with recorded_routing(model) as routing, torch.no_grad():
        model(input_ids=ids)
    assert len(routing) == 4
    for layer, (found,) in routing.items():
        loads = torch.bincount(found.indices.flatten(), minlength=model.config.num_experts) / ids.numel()
        loads *= model.config.num_experts
        assert loads.min() > 0.4 and loads.max() < 2.0, (layer, loads)
