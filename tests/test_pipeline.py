"""transformers' pipelines on our models, given the path of a saved folder."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

import hf_mamba

from .models.builders import CLASSES, VOCAB, make_model
from .models.oracles import greedy_loop, make_talker

TYPES = pytest.mark.parametrize("model_type", list(CLASSES))
TEXTS = ["w5 w6 w7 w8 w9 w10", "w11", "w12 w13 w14"]
LABELS = {0: "bad", 1: "fair", 2: "good"}
NUMBERS = {label: number for number, label in LABELS.items()}


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([int(word[1:]) for word in text.split()])


def save(model, folder, padding_side: str = "left") -> str:
    """The model and a tokenizer in which token n is the word "wn", but for the special ones."""
    vocabulary = {"[pad]": 0, "[bos]": 1, "[eos]": 2} | {f"w{n}": n for n in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[pad]", bos_token="[bos]", eos_token="[eos]", padding_side=padding_side
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@TYPES
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation(model_type: str, padding_side: str, batch_size: int, tmp_path) -> None:
    model = make_talker(model_type)
    generate = pipeline("text-generation", model=save(model, tmp_path, padding_side), device="cpu")
    assert type(generate.model) is getattr(hf_mamba, CLASSES[model_type] + "ForCausalLM")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_full_text": False}
    outputs = generate(TEXTS, batch_size=batch_size, clean_up_tokenization_spaces=False, **options)
    for text, output in zip(TEXTS, outputs, strict=True):
        # the pipeline leaves out special tokens
        expected = [f"w{n}" for n in greedy_loop(model, ids_of(text), 6)[0].tolist() if n > 2]
        assert output[0]["generated_text"].split() == expected
    single = generate(TEXTS[0], **(options | {"return_full_text": True}))[0]["generated_text"]
    assert single.startswith(TEXTS[0])
    assert single.removeprefix(TEXTS[0]).split() == outputs[0][0]["generated_text"].split()


@TYPES
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_text_classification(model_type: str, padding_side: str, tmp_path) -> None:
    """Scores are those of each text alone, whatever it is batched with."""
    model = make_model(model_type, "ForSequenceClassification", id2label=LABELS, label2id=NUMBERS)
    classify = pipeline("text-classification", model=save(model, tmp_path, padding_side), device="cpu", top_k=None)
    assert type(classify.model) is getattr(hf_mamba, CLASSES[model_type] + "ForSequenceClassification")
    for batch_size in (1, 3):
        for text, scores in zip(TEXTS, classify(TEXTS, batch_size=batch_size, padding=True), strict=True):
            with torch.no_grad():
                expected = model(ids_of(text)[None]).logits[0].softmax(dim=-1)
            assert {entry["label"] for entry in scores} == set(LABELS.values())
            for entry in scores:
                assert entry["score"] == pytest.approx(expected[NUMBERS[entry["label"]]].item(), abs=1e-5)


@TYPES
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_token_classification(model_type: str, padding_side: str, tmp_path) -> None:
    model = make_model(model_type, "ForTokenClassification", id2label=LABELS, label2id=NUMBERS)
    tag = pipeline("token-classification", model=save(model, tmp_path, padding_side), device="cpu")
    assert type(tag.model) is getattr(hf_mamba, CLASSES[model_type] + "ForTokenClassification")
    for batch_size in (1, 3):
        for text, entities in zip(TEXTS, tag(TEXTS, batch_size=batch_size), strict=True):
            with torch.no_grad():
                scores = model(ids_of(text)[None]).logits[0].softmax(dim=-1)
            assert [entity["word"] for entity in entities] == text.split()
            for entity, expected in zip(entities, scores, strict=True):
                assert entity["entity"] == LABELS[int(expected.argmax())]
                assert entity["score"] == pytest.approx(expected.max().item(), abs=1e-5)


def test_embeddings_of_a_text(tmp_path) -> None:
    model = make_model("mamba2", "Model")
    features = pipeline("feature-extraction", model=save(model, tmp_path), device="cpu")(TEXTS[2])
    with torch.no_grad():
        expected = model(ids_of(TEXTS[2])[None]).last_hidden_state
    assert torch.allclose(torch.tensor(features), expected, atol=1e-5)
