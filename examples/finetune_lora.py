"""Fine-tune a language model on your own text with LoRA: adapter out, with perplexity and a sample before and after.

    python examples/finetune_lora.py --text LICENSE --output_dir runs/lora             # the demo checkpoint, on any machine
    python examples/finetune_lora.py --model FOLDER_OR_HUB_ID --text a.txt b.txt --output_dir runs/lora
    python examples/finetune_lora.py --model … --dataset FOLDER_OR_HUB_ID --output_dir runs/lora      # needs `datasets`
    accelerate launch examples/finetune_lora.py …                                      # several GPUs

The output folder is an adapter that `AutoModelForCausalLM.from_pretrained` loads together with its base model;
`--merged_dir` saves the base model with the adapter merged into it as well.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
from language_modeling import TrainingWindows, encode, evaluate, read_documents
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_mamba  # registers the model types with the Auto classes

__all__ = ["Arguments", "finetune", "main"]


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Options of finetune_lora.py."""

    output_dir: str = option("runs/lora", "folder for the adapter and its tokenizer")
    merged_dir: str | None = option(None, "folder for the base model with the adapter merged into it")
    model: str | None = option(None, "folder or Hub id of the base model (default: the demo checkpoint)")
    text: list[str] = field(default_factory=list, metadata={"help": "UTF-8 text files to train on"})
    dataset: str | None = option(None, "folder or Hub id of a dataset instead of text files")
    text_column: str = option("text", "column of the dataset")
    held_out: float = option(0.1, "share of the text, its end, that is kept for measuring")

    rank: int = option(16, "rank of the adapter")
    alpha: float = option(32.0, "the adapter counts alpha / rank times")
    dropout: float = option(0.05, "dropout on the input of the adapter")
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "layers that get an adapter: names such as in_proj out_proj, or all-linear"},
    )
    dora: bool = option(False, "DoRA instead of LoRA")
    load_in_4bit: bool = option(False, "QLoRA: the frozen weights in 4 bits; needs bitsandbytes")

    context_length: int = option(128, "tokens in a training window")
    batch_size: int = option(4, "windows in a step on each device")
    gradient_accumulation: int = option(1, "passes over batch_size windows in a step")
    steps: int = option(60, "optimiser steps")
    learning_rate: float = option(2e-3, "peak learning rate")
    bf16: bool | None = option(None, "mixed precision in bfloat16 (default: on a GPU that has it)")
    gradient_checkpointing: bool = option(False, "compute blocks again in backward: less memory, a third slower")
    prompt: str = option("Subject to the terms", "beginning of the samples")
    sample_tokens: int = option(40, "new tokens in a sample")
    seed: int = option(0, "seed of the adapter and of the order of the text")

    def __post_init__(self) -> None:
        if bool(self.text) == (self.dataset is not None):
            raise ValueError("give either --text FILE … or --dataset NAME.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, got {self.held_out}.")
        for name in ("rank", "context_length", "batch_size", "gradient_accumulation", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be a positive number, got {getattr(self, name)}.")


def load_text(arguments: Arguments) -> tuple[list[str], list[str]]:
    """The documents to train on and those held out: the end of the text, cut at a line.

    Raises:
        ValueError: a file or a column that does not exist, or a text too short to be cut.
        ImportError: a dataset is asked for without the `datasets` package.
    """
    if arguments.dataset is not None:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError("--dataset needs the datasets package: pip install datasets.") from None
        dataset = load_dataset(arguments.dataset, split="train")
        if arguments.text_column not in dataset.column_names:
            raise ValueError(
                f"--text_column: {arguments.dataset} has no column {arguments.text_column!r}, but "
                f"{', '.join(dataset.column_names)}."
            )
        documents = list(dataset[arguments.text_column])
    else:
        documents = [document for path in arguments.text for document in read_documents(path)]
    if len(documents) > 1 / arguments.held_out:
        count = round(len(documents) * arguments.held_out)
        return documents[:-count], documents[-count:]
    lines = "\n\n".join(documents).splitlines(keepends=True)
    count = max(1, round(len(lines) * arguments.held_out))
    if len(lines) - count < 1:
        raise ValueError("the text has too few lines to hold some out; give more text.")
    return ["".join(lines[:-count])], ["".join(lines[-count:])]


def load_model(arguments: Arguments) -> torch.nn.Module:
    """The base model with a new adapter."""
    options: dict[str, Any] = {}
    if arguments.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    base = AutoModelForCausalLM.from_pretrained(arguments.model or hf_mamba.demo_checkpoint(), **options)
    # the loss alone is needed: the logits of the whole batch are never computed at once
    base.skip_logits = True
    targets = arguments.target_modules
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.dropout,
        use_dora=arguments.dora,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def sample(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> str:
    """The greedy continuation of the prompt."""
    model.eval()
    generator = cast(Any, model)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(generator.device)
    generated = generator.generate(**inputs, max_new_tokens=arguments.sample_tokens, do_sample=False)
    return cast(str, tokenizer.decode(generated[0], skip_special_tokens=True))


def finetune(arguments: Arguments) -> dict[str, Any]:
    """Train, save the adapter, and return what was measured before and after.

    In a run on several GPUs every process measures, and the first one saves and prints.
    """
    set_seed(arguments.seed)
    train_documents, held_out = load_text(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or hf_mamba.demo_checkpoint())
    model = load_model(arguments)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    options = TrainingArguments(
        output_dir=f"{arguments.output_dir.rstrip('/')}-checkpoints",
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 20),
        gradient_checkpointing=arguments.gradient_checkpointing,
        bf16=has_bf16 if arguments.bf16 is None else arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        train_sampling_strategy="sequential",  # TrainingWindows has its own order
        save_strategy="no",
        logging_steps=max(1, arguments.steps // 6),
        report_to="none",
        seed=arguments.seed,
    )
    windows_per_step = options.train_batch_size * options.gradient_accumulation_steps * options.world_size
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=TrainingWindows(
            encode(tokenizer, train_documents),
            arguments.context_length,
            arguments.steps * windows_per_step,
            arguments.seed,
        ),
        processing_class=tokenizer,
    )

    def measured() -> dict[str, Any]:
        figures = evaluate(cast(Any, model), tokenizer, held_out, arguments.context_length, arguments.batch_size)
        return {"perplexity": figures["perplexity"], "sample": sample(model, tokenizer, arguments)}

    report: dict[str, Any] = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
        "before": measured(),
    }
    start = time.monotonic()
    trainer.train()
    report["seconds"] = round(time.monotonic() - start, 1)
    report["after"] = measured()
    if trainer.is_world_process_zero():
        trainer.save_model(arguments.output_dir)
        text = json.dumps({"arguments": asdict(arguments), **report}, indent=2)
        (Path(arguments.output_dir) / "report.json").write_text(text + "\n", encoding="utf-8")
        if arguments.merged_dir is not None:
            cast(Any, model).merge_and_unload().save_pretrained(arguments.merged_dir)
            tokenizer.save_pretrained(arguments.merged_dir)
    return report


def main() -> None:
    """Command line."""
    parser = HfArgumentParser(cast(Any, Arguments))
    try:
        (arguments,) = parser.parse_args_into_dataclasses()
        report = finetune(arguments)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"finetune_lora.py: error: {error}\n")
    if not accelerate.PartialState().is_main_process:
        return
    print(
        f"{report['trainable']:,} of {report['parameters']:,} parameters trained for {arguments.steps} steps in "
        f"{report['seconds']} s"
    )
    for name in ("before", "after"):
        print(f"{name}: perplexity of the held-out text {report[name]['perplexity']:.2f}")
        print(f"  {report[name]['sample']!r}")
    print(f"adapter: {arguments.output_dir}")


if __name__ == "__main__":
    main()
