"""Fine-tune a classifier of texts with LoRA: adapter and head out, with accuracy before and after.

    python examples/finetune_classification.py --texts LICENSE docs/performance.md --output_dir runs/classifier
    python examples/finetune_classification.py --model FOLDER_OR_HUB_ID --table data.csv --output_dir runs/classifier

With `--texts` every file is a class and each of its paragraphs an example. A table is CSV, TSV or JSON lines with a column of
texts and one of labels. The output folder loads with `AutoPeftModelForSequenceClassification`.
"""

from __future__ import annotations

import csv
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_mamba  # registers the model types with the Auto classes

__all__ = ["Arguments", "finetune", "main", "read_examples"]

# a shorter paragraph is a heading or a table's rule
SHORTEST_PARAGRAPH = 40


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Options of finetune_classification.py."""

    output_dir: str = option("runs/classifier", "folder for the adapter, the head and the tokenizer")
    model: str | None = option(None, "folder or Hub id of the base model (default: the demo checkpoint)")
    texts: list[str] = field(default_factory=list, metadata={"help": "text files, each of them a class"})
    table: str | None = option(None, "a .csv, .tsv or .jsonl file instead")
    text_column: str = option("text", "column of the texts")
    label_column: str = option("label", "column of the labels")
    held_out: float = option(0.25, "share of the examples that is kept for measuring")

    rank: int = option(8, "rank of the adapter")
    max_length: int = option(128, "tokens of a text that are read")
    batch_size: int = option(8, "texts in a step on each device")
    epochs: float = option(4.0, "passes over the examples")
    learning_rate: float = option(2e-3, "peak learning rate")
    seed: int = option(0, "seed of adapter and head, and of the split")

    def __post_init__(self) -> None:
        if bool(self.texts) == (self.table is not None):
            raise ValueError("give either --texts FILE FILE … or --table FILE.")
        if len(self.texts) == 1:
            raise ValueError("--texts needs a file for each class, so at least two.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, got {self.held_out}.")


def read_examples(arguments: Arguments) -> list[tuple[str, str]]:
    """Texts and their labels, in a random order that the seed decides.

    Raises:
        ValueError: a file or column that does not exist, or fewer than two labels.
    """
    for name in [*arguments.texts, *([arguments.table] if arguments.table else [])]:
        if not Path(name).is_file():
            raise ValueError(f"{name} does not exist.")
    if arguments.table is not None:
        examples = _read_table(Path(arguments.table), arguments.text_column, arguments.label_column)
    else:
        examples = [
            (paragraph.strip(), Path(name).stem)
            for name in arguments.texts
            for paragraph in Path(name).read_text(encoding="utf-8").split("\n\n")
            if len(paragraph.strip()) >= SHORTEST_PARAGRAPH
        ]
    if len({label for _, label in examples}) < 2:
        raise ValueError("the examples have fewer than two labels: there is nothing to tell apart.")
    random.Random(arguments.seed).shuffle(examples)
    return examples


def _read_table(path: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        else:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    for column in (text_column, label_column):
        if not rows or column not in rows[0]:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(rows[0]) if rows else 'no rows'}.")
    return [(str(row[text_column]), str(row[label_column])) for row in rows]


def finetune(arguments: Arguments) -> dict[str, Any]:
    """Train, save adapter and head, and return the accuracy on held-out texts before and after."""
    set_seed(arguments.seed)
    examples = read_examples(arguments)
    labels = sorted({label for _, label in examples})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or hf_mamba.demo_checkpoint())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForSequenceClassification.from_pretrained(
        arguments.model or hf_mamba.demo_checkpoint(),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        pad_token_id=tokenizer.pad_token_id,
    )
    # PEFT trains the new head whole beside the adapter, and saves it with it
    model = get_peft_model(base, LoraConfig(r=arguments.rank, task_type=TaskType.SEQ_CLS))

    def encoded(part: list[tuple[str, str]]) -> list[dict[str, Any]]:
        texts = [text for text, _ in part]
        rows = tokenizer(texts, truncation=True, max_length=arguments.max_length, return_token_type_ids=False)
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": labels.index(label)}
            for ids, mask, (_, label) in zip(rows["input_ids"], rows["attention_mask"], part, strict=True)
        ]

    count = max(1, round(len(examples) * arguments.held_out))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{arguments.output_dir.rstrip('/')}-checkpoints",
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=cast(Any, encoded(examples[count:])),
        eval_dataset=cast(Any, encoded(examples[:count])),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda result: {
            "accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean()),
        },
    )
    report: dict[str, Any] = {"labels": labels, "examples": len(examples), "held_out": count}
    report["before"] = trainer.evaluate()["eval_accuracy"]
    start = time.monotonic()
    trainer.train()
    report["seconds"] = round(time.monotonic() - start, 1)
    report["after"] = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(arguments.output_dir)
    return report


def main() -> None:
    """Command line."""
    parser = HfArgumentParser(cast(Any, Arguments))
    try:
        (arguments,) = parser.parse_args_into_dataclasses()
        report = finetune(arguments)
    except ValueError as error:
        parser.exit(2, f"finetune_classification.py: error: {error}\n")
    print(
        f"classes {', '.join(report['labels'])}; {report['examples']} examples, {report['held_out']} of them held out"
    )
    print(f"accuracy on these before {report['before']:.3f}, after {report['after']:.3f} ({report['seconds']} s)")
    print(f"adapter and head: {arguments.output_dir}")


if __name__ == "__main__":
    main()
