"""Train a small Mamba language model on plain text with transformers' Trainer.

    python examples/prepare_text.py                                   # writes .data/train.txt, valid.txt, test.txt
    python examples/train_language_model.py --output_dir runs/mine    # CPU, one GPU
    python examples/train_language_model.py options.json --output_dir runs/mine    # options from a file, then others
    accelerate launch examples/train_language_model.py …              # several GPUs

The output folder then holds everything that `from_pretrained` and `push_to_hub` need, a model card with the measured
figures included. Checkpoints go to another folder, from which `--resume` goes on.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from language_modeling import (
    EvaluationWindows,
    LanguageModelTrainer,
    TimeBudget,
    TrainingWindows,
    check_round_trip,
    drop_residual_updates,
    encode,
    evaluate,
    read_documents,
    save_in,
    train_tokenizer,
)
from model_card import write_model_card
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_mamba  # registers the model types with the Auto classes
from hf_mamba.integrations.router_health import RouterHealth

__all__ = ["Arguments", "build_config", "main", "train"]

MODEL_TYPES = ("mamba", "mamba2", "falcon_mamba", "moe_mamba")
# options that only some model types have, with the value taken where the option is not given
ONLY_FOR: dict[str, dict[str, int]] = {"mamba2": {"head_dim": 64, "n_groups": 1, "chunk_size": 64}}

PROMPTS = ("It is a truth universally acknowledged", "And the LORD said unto Moses,", "My dear", "The love of God")


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    """Options of train_language_model.py."""

    output_dir: str = option("runs/language_model", "folder for the finished model, its tokenizer and its card")
    checkpoint_dir: str | None = option(None, "folder for checkpoints (default: <output_dir>-checkpoints)")
    data_dir: str = option(".data", "folder with train.txt, valid.txt and test.txt, as prepare_text.py writes it")
    tokenizer: str | None = option(None, "a saved tokenizer to use (default: train one on train.txt)")
    resume: bool = option(False, "go on from the newest checkpoint in checkpoint_dir")
    overwrite: bool = option(False, "start anew although checkpoint_dir holds checkpoints, which are then replaced")

    model_type: str = option("mamba2", f"one of {', '.join(MODEL_TYPES)}")
    hidden_size: int = option(256, "width of the residual stream")
    num_hidden_layers: int = option(6, "number of layers")
    state_size: int = option(64, "size N of the recurrent state (mamba: usually 16)")
    expand: int = option(2, "inner width of a layer, in multiples of hidden_size")
    conv_kernel: int = option(4, "width of the causal convolution")
    head_dim: int | None = option(None, "mamba2: width of a head (default 64)")
    n_groups: int | None = option(None, "mamba2: groups of heads that share B and C (default 1)")
    chunk_size: int | None = option(None, "mamba2: chunk of the parallel scan (default 64)")
    vocab_size: int = option(4096, "size of the tokenizer that is trained")
    config_overrides: str = option("{}", "further fields of the configuration as JSON, e.g. '{\"use_bias\": true}'")

    context_length: int = option(512, "tokens in a training window")
    batch_size: int = option(32, "windows in a step on each device")
    gradient_accumulation: int = option(1, "passes over batch_size windows in a step")
    steps: int = option(6000, "optimiser steps")
    max_minutes: float | None = option(None, "end after this time; the learning rate reaches zero then")
    learning_rate: float = option(3e-3, "peak learning rate")
    warmup_steps: int = option(200, "steps of linear warm-up")
    weight_decay: float = option(0.1, "decay of matrices; never of A_log, D, dt_bias, norms and biases")
    dropout: float = option(
        0.0, "in training, fraction of what each layer adds to the residual stream that is set to zero"
    )
    grad_clip: float = option(1.0, "largest norm of the gradient")
    bf16: bool | None = option(None, "mixed precision in bfloat16 (default: on a GPU that has it)")
    torch_compile: bool = option(False, "compile the model with torch.compile")
    evaluate: bool = option(True, "evaluate and describe the finished model; without it only the curves are written")
    eval_steps: int = option(250, "steps between evaluations on valid.txt, each with a checkpoint")
    seed: int = option(0, "seed of the weights, of the order of the text and of the samples")

    weights_dtype: str = option("bfloat16", "dtype of the weights in the saved file: bfloat16 or float32")
    prompts: list[str] = field(
        default_factory=lambda: list(PROMPTS), metadata={"help": "beginnings that the finished model continues"}
    )
    sample_tokens: int = option(80, "new tokens in a sample")
    model_name: str | None = option(None, "name in the card (default: the name of output_dir)")
    card_model: str | None = option(None, "Python expression in the card's example (default: the path output_dir)")
    card_note: str = option("", "a sentence to add to the card's training section")

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"--model_type must be one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}.")
        if self.weights_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"--weights_dtype must be bfloat16 or float32, got {self.weights_dtype!r}.")
        for name in ("context_length", "batch_size", "gradient_accumulation", "steps", "eval_steps"):
            if getattr(self, name) < (2 if name == "context_length" else 1):
                raise ValueError(f"--{name} must be a positive number, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must lie between 0 and 1, got {self.dropout}.")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"--max_minutes must be positive, got {self.max_minutes}.")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on and --overwrite starts anew: give one of them.")
        self.checkpoint_dir = self.checkpoint_dir or f"{self.output_dir.rstrip('/')}-checkpoints"
        self.model_name = self.model_name or Path(self.output_dir).resolve().name
        self.card_model = self.card_model or json.dumps(self.output_dir)


def build_config(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ValueError: an option that the model type does not have, malformed overrides, or sizes that do not fit together.
    """
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "state_size": arguments.state_size,
        "expand": arguments.expand,
        "conv_kernel": arguments.conv_kernel,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for model_type, options in ONLY_FOR.items():
        for name, default in options.items():
            given = getattr(arguments, name)
            if arguments.model_type == model_type:
                sizes[name] = default if given is None else given
            elif given is not None:
                raise ValueError(f"--{name} is an option of {model_type}; {arguments.model_type} does not have it.")
    if arguments.model_type == "mamba2":
        inner = arguments.hidden_size * arguments.expand
        if inner % sizes["head_dim"]:
            raise ValueError(
                f"--head_dim {sizes['head_dim']} does not divide hidden_size * expand = {inner}; "
                f"choose a divisor, for example {math.gcd(inner, 64)}."
            )
        sizes["num_heads"] = inner // sizes["head_dim"]
    try:
        overrides = json.loads(arguments.config_overrides)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config_overrides is not JSON ({error}): {arguments.config_overrides!r}.") from None
    if not isinstance(overrides, dict):
        raise ValueError(f"--config_overrides must be a JSON object, got {arguments.config_overrides!r}.")
    config = AutoConfig.for_model(arguments.model_type, **sizes)
    for name in overrides:
        if not hasattr(config, name):
            raise ValueError(f"--config_overrides: {type(config).__name__} has no field {name!r}.")
    return AutoConfig.for_model(arguments.model_type, **(sizes | overrides))


def load_tokenizer(arguments: Arguments, documents: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, that of the run to resume, or a new one, kept for a later resume.

    In a run on several GPUs the first process trains it while the others wait.
    """
    kept = Path(cast(str, arguments.checkpoint_dir)) / "tokenizer"
    if arguments.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"--tokenizer: {arguments.tokenizer} has no padding token; set one and save it again.")
        check_round_trip(tokenizer, documents)
        return tokenizer
    with accelerate.PartialState().main_process_first():
        if accelerate.PartialState().is_main_process and not arguments.resume:
            train_tokenizer(documents, arguments.vocab_size).save_pretrained(kept)
        return AutoTokenizer.from_pretrained(kept)


def training_arguments(arguments: Arguments) -> TrainingArguments:
    """The Trainer's options."""
    use_bf16 = (
        torch.cuda.is_available() and torch.cuda.is_bf16_supported() if arguments.bf16 is None else arguments.bf16
    )
    return TrainingArguments(
        output_dir=cast(str, arguments.checkpoint_dir),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=arguments.grad_clip,
        use_cpu=not torch.accelerator.is_available(),  # or bf16 would be refused on a CPU
        bf16=use_bf16,
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=arguments.torch_compile,
        train_sampling_strategy="sequential",  # TrainingWindows has its own order
        eval_strategy="steps",
        eval_steps=arguments.eval_steps,
        save_strategy="steps",
        save_steps=arguments.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=min(50, arguments.eval_steps),
        logging_first_step=True,
        report_to="none",
        seed=arguments.seed,
        data_seed=arguments.seed,
    )


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: Arguments) -> list[str]:
    """The model's continuation of each prompt, by the generation settings that are saved with it."""
    model.eval()
    texts = []
    for number, prompt in enumerate(arguments.prompts):
        set_seed(arguments.seed + number)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        generated = cast(Any, model).generate(**inputs, max_new_tokens=arguments.sample_tokens)
        texts.append(cast(str, tokenizer.decode(generated[0], skip_special_tokens=True)))
    return texts


def previous_checkpoint(arguments: Arguments) -> str | None:
    """The checkpoint to resume from.

    Raises:
        ValueError: there is none to resume from, or there are some that a new run would replace.
    """
    folder = cast(str, arguments.checkpoint_dir)
    found = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if arguments.resume and found is None:
        raise ValueError(f"--resume: {folder} holds no checkpoint; leave --resume out to start a new run.")
    if found is not None and not arguments.resume and not arguments.overwrite:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run; go on with --resume, replace them with --overwrite, "
            "or name another --checkpoint_dir."
        )
    return found if arguments.resume else None


def train(arguments: Arguments, command: str) -> dict[str, Any] | None:
    """Train, evaluate before and after, save the model with its card, and return the measured figures.

    Processes other than the first of a run on several GPUs return None.
    """
    checkpoint = previous_checkpoint(arguments)
    data = Path(arguments.data_dir)
    documents = {split: read_documents(data / f"{split}.txt") for split in ("train", "valid", "test")}
    tokenizer = load_tokenizer(arguments, documents["train"])
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")

    set_seed(arguments.seed)
    model: Any = AutoModelForCausalLM.from_config(build_config(arguments, tokenizer))
    # the loss alone is needed: the logits of the whole batch are never computed at once
    model.skip_logits = True
    drop_residual_updates(model, arguments.dropout)
    options = training_arguments(arguments)
    tokens = encode(tokenizer, documents["train"])
    # train_batch_size counts every GPU that this process drives, world_size the processes
    windows_per_step = options.train_batch_size * options.gradient_accumulation_steps * options.world_size
    budget = TimeBudget(arguments.max_minutes)
    trainer = LanguageModelTrainer(
        model=model,
        args=options,
        budget=budget,
        train_dataset=TrainingWindows(
            tokens, arguments.context_length, arguments.steps * windows_per_step, arguments.seed
        ),
        eval_dataset=EvaluationWindows(encode(tokenizer, documents["valid"]), arguments.context_length),
        processing_class=tokenizer,
    )

    if arguments.model_type == "moe_mamba":
        RouterHealth().attach(trainer)

    def measured(model: PreTrainedModel, name: str) -> dict[str, float]:
        own = documents[name] if name in documents else read_documents(data / f"{name}.txt")
        return evaluate(model, tokenizer, own, arguments.context_length, arguments.batch_size)

    if trainer.is_world_process_zero():
        print(f"{model.num_parameters():,} parameters, {len(tokens):,} training tokens", flush=True)
    if trainer.is_world_process_zero() and arguments.evaluate:
        before = measured(model, "test")
        print(
            f"before: test perplexity {before['perplexity']:.1f}, {before['bits_per_byte']:.3f} bits/byte", flush=True
        )
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.is_world_process_zero():
        return None

    output = Path(arguments.output_dir)
    if not arguments.evaluate:
        short = {"curves": curves(trainer.state.log_history), "training_seconds": round(budget.seconds, 1)}
        output.mkdir(parents=True, exist_ok=True)
        (output / "training_report.json").write_text(json.dumps(short, indent=1) + "\n", "utf-8")
        return short
    best = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    best.config.use_cache = True
    best.generation_config.update(
        do_sample=True,
        temperature=0.7,
        top_k=50,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,  # the Trainer may have made it a list
    )
    save_in(getattr(torch, arguments.weights_dtype), best, output)
    tokenizer.save_pretrained(output)

    # everything in the card is measured on the saved files
    saved: Any = AutoModelForCausalLM.from_pretrained(output)
    saved.to(options.device)
    splits = ["test", "valid"] + (["excerpt"] if (data / "excerpt.txt").is_file() else [])
    results = {name: measured(saved, name) for name in splits}
    sources_file = data / "sources.json"
    sources = json.loads(sources_file.read_text(encoding="utf-8")) if sources_file.is_file() else None
    if sources is not None:
        owners = [owner for owner, _, _ in sources["test_documents"]]
        for name in sources["sources"]:
            own = [text for owner, text in zip(owners, documents["test"], strict=True) if owner == name]
            if own:
                results[f"test: {name}"] = evaluate(
                    saved, tokenizer, own, arguments.context_length, arguments.batch_size
                )
    texts = samples(saved, tokenizer, arguments)
    best_step = next(
        entry["step"] for entry in trainer.state.log_history if entry.get("eval_loss") == trainer.state.best_metric
    )
    tokens_seen = trainer.state.global_step * windows_per_step * arguments.context_length
    report = {
        "command": command,
        "parameters": saved.num_parameters(),
        "active_parameters": active_parameters(saved),
        "results": results,
        "test_before_training": before,
        "steps": trainer.state.global_step,
        "best_step": best_step,
        "training_tokens": len(tokens),
        "tokens_seen": tokens_seen,
        "passes": tokens_seen / len(tokens),
        "training_seconds": round(budget.seconds, 1),
        "hardware": hardware(options),
        "precision": "bfloat16 mixed precision" if options.bf16 else "float32",
        "versions": versions(),
        "samples": texts,
        "curves": curves(trainer.state.log_history),
    }
    (output / "training_report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_model_card(
        output,
        name=cast(str, arguments.model_name),
        config=saved.config,
        arguments=vars(arguments),
        report=report,
        sources=sources,
    )
    for file in output.iterdir():
        file.chmod(0o644)  # safetensors makes its file readable by the owner alone
    for name, figures in results.items():
        print(f"{name:28} perplexity {figures['perplexity']:8.3f}   {figures['bits_per_byte']:.4f} bits/byte")
    for text in texts:
        print(f"--- {text}")
    print(f"saved in {output}", flush=True)
    return report


def active_parameters(model: Any) -> int:
    """Parameters that one token meets: all, but of routed experts only those that are chosen."""
    return model.num_active_parameters() if hasattr(model, "num_active_parameters") else model.num_parameters()


def curves(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What the Trainer logged, one entry for each step at which it did, without its timings."""
    entries: dict[int, dict[str, float]] = {}
    for entry in log:
        kept = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in entry.items()
            if name in ("step", "elapsed_seconds", "loss", "eval_loss")
            or (name.startswith("router_") and name != "router_layers")
        }
        if kept.keys() & {"loss", "eval_loss"}:
            entries.setdefault(entry["step"], {}).update(kept)
    return [entries[step] for step in sorted(entries)]


def hardware(options: TrainingArguments) -> str:
    """What the run ran on, in words."""
    if options.device.type == "cuda":
        return f"{options.world_size} × {torch.cuda.get_device_name(options.device)}"
    if options.device.type == "cpu":
        return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{options.world_size} × {options.device.type}"


def versions() -> dict[str, str]:
    """What the run ran with."""
    return {
        "hf_mamba": hf_mamba.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parse(given: list[str]) -> Arguments:
    """The options of a command line, which may begin with a JSON file of options; those after it take precedence.

    Raises:
        ValueError: the file does not exist, is no JSON object, or names an option that there is not.
    """
    parser = HfArgumentParser(cast(Any, Arguments), description=(__doc__ or "").split("\n")[0])
    if given and given[0].endswith(".json"):
        path, *given = given
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"the options in {path} cannot be read ({error}).") from None
        unknown = (
            set(settings) - {option.name for option in fields(Arguments)} if isinstance(settings, dict) else {path}
        )
        if unknown:
            raise ValueError(f"{path} must be a JSON object of options of this script; unknown: {sorted(unknown)}.")
        parser.set_defaults(**settings)
    (arguments,) = parser.parse_args_into_dataclasses(given)
    return arguments


def main() -> None:
    """Entry point of the script."""
    started = time.monotonic()
    command = shlex.join(["python", *sys.argv])
    try:
        report = train(parse(sys.argv[1:]), command)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if report is not None:
        print(f"whole run: {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
