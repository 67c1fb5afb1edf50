"""The parts of a language-model training run: tokenizer, data, evaluation, time budget, trainer.

Shapes: B batch, L context length, V vocabulary.
"""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepare_text import SEPARATOR
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

__all__ = [
    "EvaluationWindows",
    "LanguageModelTrainer",
    "TimeBudget",
    "TrainingWindows",
    "drop_residual_updates",
    "encode",
    "evaluate",
    "read_documents",
    "save_in",
    "train_tokenizer",
]

PAD = "<|pad|>"
# the parameters of the recurrence: decaying them would move every time constant towards one value
NEVER_DECAYED = ("A_log", "D", "dt_bias", "dt_proj.bias")


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file written by prepare_text.py; a file without separators is one document.

    Raises:
        ValueError: the file does not exist or holds no text.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run `python examples/prepare_text.py` first, or name another file.")
    text = path.read_text(encoding="utf-8")
    documents = [part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n")]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{path} holds no text.")
    return documents


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded and comes back unchanged.

    `<|endoftext|>` begins and ends a text; padding has a token of its own, so that a collator that masks padding in the
    labels does not also mask the end of a text.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the 2 special tokens.
        RuntimeError: the tokenizer does not give its training text back.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes and 2 special tokens), got {vocab_size}.")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATOR, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    inner.train_from_iterator(documents, trainer=trainer, length=len(documents))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    check_round_trip(tokenizer, documents)
    return tokenizer


def check_round_trip(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> None:
    """Raise RuntimeError unless texts survive encoding and decoding."""
    awkward = "Runs of   spaces,\n\n“quotes” — naïve café, 東京, 🙂\tend "
    for text in [awkward, documents[0], documents[-1]]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        if not ids or tokenizer.decode(ids) != text:
            raise RuntimeError(f"the tokenizer does not give back {text[:60]!r}; train a new one.")


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> np.ndarray:
    """One int32 stream of tokens: an end-of-text token before every document and after the last."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token); name a tokenizer that has one.")
    stream = [end]
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, end]
    return np.array(stream, dtype=np.int32)


class TrainingWindows(Dataset):
    """`total` windows of `context` tokens: pass after pass over the stream, each in an order and at an offset of its own.

    The shifting offset means that a token is met at another place of its window in every pass. Window i depends on
    (seed, i) alone, so a resumed run sees the windows that it would have seen.

    Raises:
        ValueError: the stream is shorter than two windows.
    """

    def __init__(self, tokens: np.ndarray, context: int, total: int, seed: int) -> None:
        self.per_pass = len(tokens) // context - 1
        if self.per_pass < 1:
            raise ValueError(
                f"the training text has {len(tokens)} tokens, too few for windows of {context}: "
                "give more text or a smaller --context_length."
            )
        self.tokens, self.context, self.total, self.seed = tokens, context, total, seed
        self._pass = -1
        self._starts = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, position = divmod(index, self.per_pass)
        if number != self._pass:
            generator = np.random.default_rng((self.seed, number))
            self._starts = generator.permutation(self.per_pass) * self.context + generator.integers(self.context)
            self._pass = number
        start = self._starts[position]
        window = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        return {"input_ids": window, "labels": window}


class EvaluationWindows(Dataset):
    """Windows of `context` tokens that overlap by one, so that every token but the first is predicted exactly once.

    A last, shorter window is left out here; `evaluate` counts it.
    """

    def __init__(self, tokens: np.ndarray, context: int) -> None:
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // (self.context - 1))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self.context - 1)
        window = torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))
        return {"input_ids": window, "labels": window}


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str], context: int, batch_size: int
) -> dict[str, float]:
    """Perplexity per token and bits per byte of `documents`, in windows of `context` tokens, fp32.

    Every token of the stream but its first is predicted once, from at most `context` - 1 tokens before it; the
    end-of-text tokens count as tokens but not as bytes. Bits per byte can be compared between tokenizers.
    """
    tokens = encode(tokenizer, documents)
    windows = EvaluationWindows(tokens, context)
    batches = [
        torch.stack([windows[i]["input_ids"] for i in range(start, min(start + batch_size, len(windows)))])
        for start in range(0, len(windows), batch_size)
    ]
    rest = tokens[len(windows) * (context - 1) :]
    if len(rest) > 1:
        batches.append(torch.from_numpy(rest.astype(np.int64))[None])
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    total = 0.0
    try:
        for batch in batches:
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # (B, L - 1, V)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total += loss.double().sum().item()
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)
    predicted = len(tokens) - 1
    size = sum(len(document.encode()) for document in documents)
    return {
        "perplexity": math.exp(total / predicted),
        "bits_per_byte": total / math.log(2) / size,
        "tokens": predicted,
        "bytes": size,
    }


class TimeBudget(TrainerCallback):
    """Ends training when its time is used up, and says which fraction of the run is over.

    The learning rate follows `fraction`, the larger of the fraction of the steps and the fraction of the time, so that
    its schedule ends with the run whichever ends first. Time spent before a resume counts.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.seconds = 0.0
        self._start: float | None = None

    def fraction(self, step: int, max_steps: int) -> float:
        """The fraction of the run that is over, 0 to 1."""
        by_time = 0.0 if self.max_seconds is None else self.seconds / self.max_seconds
        return min(1.0, max(step / max_steps, by_time))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before = max((entry.get("elapsed_seconds", 0.0) for entry in state.log_history), default=0.0)
        self.seconds = before
        self._start = time.monotonic() - before

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._start is not None
        self.seconds = time.monotonic() - self._start
        if args.world_size > 1:
            # every process must take the same learning rate and stop at the same step
            shared = torch.tensor(self.seconds, dtype=torch.float64, device=args.device)
            torch.distributed.broadcast(shared, src=0)
            self.seconds = shared.item()
        if self.max_seconds is not None and self.seconds >= self.max_seconds:
            control.should_training_stop = control.should_evaluate = control.should_save = control.should_log = True


class LanguageModelTrainer(Trainer):
    """Trainer with the weight decay and the learning-rate schedule of language-model pretraining."""

    def __init__(self, *args: Any, budget: TimeBudget, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = budget
        self.add_callback(budget)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices and convolutions decay; biases, norms and the parameters of the recurrence do not."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not name.endswith(NEVER_DECAYED)
        ]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, then half a cosine down to zero over the fraction of the run that is over."""
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            over = self.budget.fraction(step, num_training_steps)
            return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * over))

        chosen = self.optimizer if optimizer is None else optimizer
        assert chosen is not None
        self.lr_scheduler = LambdaLR(chosen, factor)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer, with the seconds of training so far."""
        super().log({**logs, "elapsed_seconds": round(self.budget.seconds, 2)}, start_time)


def drop_residual_updates(model: torch.nn.Module, rate: float) -> None:
    """In training, dropout of what mixers, experts and feed-forward layers add to the residual stream.

    It belongs to the run, not to the model: nothing of it is saved.
    """

    def drop(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):  # experts return the router's logits as well
            return torch.nn.functional.dropout(output[0], rate), *output[1:]
        return torch.nn.functional.dropout(output, rate)

    if rate:
        for name, module in model.named_modules():
            if re.search(r"layers\.\d+\.(?:mixer|moe|mlp)$", name):
                module.register_forward_hook(drop)


def save_in(dtype: torch.dtype, model: PreTrainedModel, folder: str | Path) -> None:
    """Save `model` as safetensors with its weights rounded to `dtype`, the parameters of the recurrence in fp32.

    `config.json` keeps the model's own dtype, so that the weights are loaded in it: a small file, and exact, quick
    arithmetic on a CPU.
    """
    state: dict[str, torch.Tensor] = {}
    rounded: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(NEVER_DECAYED) or not tensor.is_floating_point():
            state[name] = tensor
        else:
            # tied weights stay one tensor, so that they are written once
            state[name] = rounded.setdefault(tensor.data_ptr(), tensor.to(dtype))
    model.save_pretrained(folder, state_dict=state)
