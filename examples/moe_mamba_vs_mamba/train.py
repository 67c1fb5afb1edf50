"""Train Transformer, Mamba, Mamba-MLP, Transformer-MoE and MoE-Mamba on the same tokens in the same order.

    python examples/prepare_text.py
    python examples/moe_mamba_vs_mamba/train.py --config gpu --output_dir runs/moe       # minutes on one GPU
    python examples/moe_mamba_vs_mamba/side_by_side.py --output_dir runs/moe             # all models at once, by the clock
    python examples/moe_mamba_vs_mamba/train.py --config cpu --output_dir runs/moe-cpu   # a smoke test
    python examples/moe_mamba_vs_mamba/report.py runs/moe

Every run leaves `<model>-seed<seed>.json` in the output folder: sizes, hardware, and all that the Trainer logged. The same
command goes on where it was stopped: finished runs are kept, an unfinished one continues from its checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import train_language_model  # noqa: E402
from architectures import architecture_names, build_model  # noqa: E402
from language_modeling import (  # noqa: E402
    EvaluationWindows,
    LanguageModelTrainer,
    TimeBudget,
    TrainingWindows,
    encode,
    read_documents,
    train_tokenizer,
)

from hf_mamba.integrations.router_health import RouterHealth  # noqa: E402

__all__ = ["Arguments", "main", "train_all"]


@dataclass
class Arguments:
    """Options of train.py."""

    config: str = field(default="gpu", metadata={"help": "gpu, cpu, or the path of a JSON file with the same fields"})
    output_dir: str = field(default="runs/moe_mamba_vs_mamba", metadata={"help": "folder for the results"})
    data_dir: str = field(
        default=".data", metadata={"help": "folder with train.txt and valid.txt, as prepare_text.py writes it"}
    )
    models: list[str] = field(default_factory=list, metadata={"help": "only these, such as mamba moe-mamba-8"})
    checkpoint_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps between checkpoints; 0: none, an interrupted run begins anew (default: five evaluations)"
        },
    )


def read_settings(config: str) -> dict[str, Any]:
    """The fields of a configuration file, by its path or by the name of one in this folder.

    Raises:
        ValueError: there is no such file, or its fields are not those of gpu.json.
    """
    own = HERE / f"{config}.json"
    path = own if own.is_file() else Path(config)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {config!r}; name gpu, cpu or a JSON file.")
    settings = json.loads(path.read_text(encoding="utf-8"))
    expected = json.loads((HERE / "gpu.json").read_text(encoding="utf-8")).keys()
    if settings.keys() != expected:
        raise ValueError(
            f"--config: {path} must have the fields of gpu.json; missing {sorted(expected - settings.keys())}, "
            f"unknown {sorted(settings.keys() - expected)}."
        )
    return settings


def keep_settings(settings: dict[str, Any], output: Path) -> None:
    """Write the settings beside the results.

    Raises:
        ValueError: the folder holds results of other settings.
    """
    file = output / "settings.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"--output_dir: {output} holds results of other settings; name another folder.")
    output.mkdir(parents=True, exist_ok=True)
    # several processes may train into one folder: each of them writes a file of its own and puts it into place
    unfinished = output / f"settings.json.{os.getpid()}"
    unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


def training_options(
    name: str, seed: int, settings: dict[str, Any], folder: Path, checkpoint_steps: int | None = None
) -> TrainingArguments:
    """Those of train_language_model.py; checkpoints are for going on, not for choosing among."""
    rate = settings["learning_rates"]["moe-mamba" if name.startswith("moe-mamba") else name]
    same = ("context_length", "batch_size", "gradient_accumulation", "steps", "eval_steps", "warmup_steps")
    options = train_language_model.training_arguments(
        train_language_model.Arguments(
            checkpoint_dir=str(folder),
            learning_rate=rate,
            seed=seed,
            **{key: settings[key] for key in (*same, "weight_decay", "grad_clip", "max_minutes")},
        )
    )
    options.load_best_model_at_end, options.save_total_limit = False, 1
    # a checkpoint of 32 experts takes longer than 20 steps
    options.save_steps = checkpoint_steps or 5 * settings["eval_steps"]
    if checkpoint_steps == 0:
        options.save_strategy = SaveStrategy.NO
    return options


def train_one(
    name: str,
    seed: int,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tokens: dict[str, np.ndarray],
    output: Path,
    checkpoint_steps: int | None = None,
) -> dict[str, Any]:
    """Train one model, or go on with it, and return what is written about it."""
    folder = output / "checkpoints" / f"{name}-seed{seed}"
    options = training_options(name, seed, settings, folder, checkpoint_steps)
    set_seed(seed)
    model = build_model(
        name, settings, len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    windows = settings["steps"] * settings["batch_size"] * settings["gradient_accumulation"]
    trainer = LanguageModelTrainer(
        model=model,
        args=options,
        budget=TimeBudget(settings["max_minutes"]),
        # the order depends on the seed alone, so all models meet the same windows
        train_dataset=TrainingWindows(tokens["train"], settings["context_length"], windows, seed),
        eval_dataset=EvaluationWindows(tokens["valid"], settings["context_length"]),
    )
    RouterHealth().attach(trainer)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    shutil.rmtree(folder, ignore_errors=True)
    seen = trainer.state.global_step * windows // settings["steps"] * settings["context_length"]
    return {
        "model": name,
        "seed": seed,
        "total_parameters": model.num_parameters(),
        "total_parameters_without_embeddings": _without_ends(model),
        "active_parameters_without_embeddings": model.num_active_parameters(exclude_embeddings=True),
        "steps": trainer.state.global_step,
        "training_tokens": len(tokens["train"]),
        "tokens_seen": seen,
        "hardware": train_language_model.hardware(options),
        "precision": "bfloat16 mixed precision" if options.bf16 else "float32",
        "versions": train_language_model.versions(),
        "log": trainer.state.log_history,
    }


def _without_ends(model: Any) -> int:
    ends = {id(p) for end in (model.get_input_embeddings(), model.lm_head) for p in end.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in ends)


def load_tokenizer(settings: dict[str, Any], documents: list[str], output: Path) -> PreTrainedTokenizerBase:
    """One tokenizer for all models, trained on the training text and kept."""
    folder = output / "tokenizer"
    if not folder.is_dir():
        unfinished = output / f"tokenizer.{os.getpid()}"
        train_tokenizer(documents, settings["vocab_size"]).save_pretrained(unfinished)
        if folder.is_dir():  # another process was faster, with the same result
            shutil.rmtree(unfinished)
        else:
            unfinished.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def train_all(arguments: Arguments) -> list[Path]:
    """Train what is not finished yet; the files of all results."""
    settings = read_settings(arguments.config)
    names = arguments.models or architecture_names(settings)
    unknown = [name for name in names if name not in architecture_names(settings)]
    if unknown:
        raise ValueError(f"--models: {unknown[0]!r} is none of {', '.join(architecture_names(settings))}.")
    output = Path(arguments.output_dir)
    documents = {split: read_documents(Path(arguments.data_dir) / f"{split}.txt") for split in ("train", "valid")}
    keep_settings(settings, output)
    tokenizer = load_tokenizer(settings, documents["train"], output)
    tokens = {split: encode(tokenizer, texts) for split, texts in documents.items()}
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    files = []
    for seed in settings["seeds"]:
        for name in names:
            file = output / f"{name}-seed{seed}.json"
            files.append(file)
            if file.is_file():
                print(f"{name}, seed {seed}: finished before", flush=True)
                continue
            result = train_one(name, seed, settings, tokenizer, tokens, output, arguments.checkpoint_steps)
            unfinished = file.with_suffix(".json.part")
            unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            unfinished.rename(file)
            losses = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
            print(f"{name}, seed {seed}: validation loss {losses[-1]:.4f}, lowest {min(losses):.4f}", flush=True)
    return files


def main() -> None:
    """Entry point of the script."""
    parser = HfArgumentParser(cast(Any, Arguments), description=(__doc__ or "").split("\n")[0])
    try:
        (arguments,) = parser.parse_args_into_dataclasses()
        train_all(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
