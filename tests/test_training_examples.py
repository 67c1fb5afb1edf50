"""The fine-tuning examples on a few steps, and the notebook from top to bottom."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_mamba.models.heads import RecurrentForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import finetune_classification  # noqa: E402
import finetune_lora  # noqa: E402
import train_language_model  # noqa: E402

pytestmark = pytest.mark.checkout


def test_lora_example_leaves_a_loadable_adapter_and_a_merged_model(tmp_path) -> None:
    arguments = finetune_lora.Arguments(
        text=[str(ROOT / "LICENSE")],
        output_dir=str(tmp_path / "adapter"),
        merged_dir=str(tmp_path / "merged"),
        steps=3,
        context_length=64,
        batch_size=2,
        rank=4,
        sample_tokens=6,
    )
    report = finetune_lora.finetune(arguments)
    assert report["after"]["perplexity"] < 0.8 * report["before"]["perplexity"]
    assert report["trainable"] < 0.05 * report["parameters"]
    assert json.loads((tmp_path / "adapter/report.json").read_text())["after"] == report["after"]
    for folder in ("adapter", "merged"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert finetune_lora.sample(model, tokenizer, arguments) == report["after"]["sample"]


def test_classification_example_leaves_a_loadable_classifier(tmp_path) -> None:
    rows = [f"{word} {number}\t{label}" for number in range(12) for word, label in (("blood", "red"), ("sky", "blue"))]
    table = tmp_path / "table.tsv"
    table.write_text("\n".join(["words\tcolour", *rows]))
    report = finetune_classification.finetune(
        finetune_classification.Arguments(
            table=str(table),
            text_column="words",
            label_column="colour",
            output_dir=str(tmp_path / "classifier"),
            epochs=3,
        )
    )
    assert report["labels"] == ["blue", "red"] and report["held_out"] == 6
    assert report["after"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "classifier")
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", num_labels=2, pad_token_id=tokenizer.pad_token_id
    ).eval()
    inputs = tokenizer(["blood 3", "sky 3"], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert model(**inputs).logits.argmax(-1).tolist() == [1, 0]


def test_training_example_keeps_no_logits(tmp_path, monkeypatch) -> None:
    """Neither do its steps return any; its evaluations, whose loss is measured on them, do."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"))
    seen: list[tuple[bool, bool]] = []
    make_output = RecurrentForCausalLM.make_output

    def noting(self, outputs, loss, logits):
        seen.append((self.training, logits is not None))
        return make_output(self, outputs, loss, logits)

    monkeypatch.setattr(RecurrentForCausalLM, "make_output", noting)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "head_dim": 8, "vocab_size": 300}
    arguments = train_language_model.Arguments(
        data_dir=str(tmp_path),
        output_dir=str(tmp_path / "model"),
        context_length=32,
        batch_size=2,
        steps=2,
        eval_steps=1,
        warmup_steps=1,
        sample_tokens=2,
        **sizes,
    )
    report = train_language_model.train(arguments, "python")
    assert report is not None and report["steps"] == 2
    assert set(seen) == {(True, False), (False, True)}


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (finetune_lora, {}, "either --text FILE"),
        (finetune_lora, {"text": ["a"], "dataset": "b"}, "either --text FILE"),
        (finetune_lora, {"text": ["a"], "rank": 0}, "--rank must be a positive number"),
        (finetune_lora, {"text": ["a"], "held_out": 1.0}, "--held_out must lie between"),
        (finetune_classification, {}, "either --texts FILE FILE"),
        (finetune_classification, {"texts": ["a"]}, "at least two"),
    ],
    ids=["nothing to read", "two things to read", "rank", "share", "no examples", "one class"],
)
def test_wrong_options_are_refused(script, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script.Arguments(**options)


def test_unreadable_tables_are_refused(tmp_path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("text,label\nonly,one\n")
    with pytest.raises(ValueError, match="fewer than two labels"):
        finetune_classification.read_examples(finetune_classification.Arguments(table=str(table)))
    with pytest.raises(ValueError, match="no column 'body'; it has text, label"):
        finetune_classification.read_examples(finetune_classification.Arguments(table=str(table), text_column="body"))
    with pytest.raises(ValueError, match="does not exist"):
        finetune_classification.read_examples(finetune_classification.Arguments(table=str(tmp_path / "absent.csv")))


@pytest.fixture
def verbosity():
    """What the notebook sets for the whole process is set back."""
    level, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    if progress_bar:
        logging.enable_progress_bar()


def test_notebook_runs_from_top_to_bottom_as_it_shows(monkeypatch, verbosity) -> None:
    """Its cells in one namespace; the perplexities are those that it shows, but for the last digits."""
    monkeypatch.chdir(ROOT)
    notebook = json.loads((ROOT / "examples/finetune_lora.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = "".join("".join(output.get("text", [])) for cell in cells for output in cell["outputs"])
    printed = io.StringIO()
    namespace: dict = {}
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            exec("".join(cell["source"]), namespace)

    def perplexities(text: str) -> list[float]:
        return [float(value) for value in re.findall(r"perplexity ([\d.]+)", text)]

    assert len(perplexities(shown)) == 5
    assert perplexities(printed.getvalue()) == pytest.approx(perplexities(shown), rel=0.05)
