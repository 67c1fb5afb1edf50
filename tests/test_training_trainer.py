"""transformers' Trainer on the CPU: accumulation, mixed precision, resumed runs, packing, adapters, offloaded weights."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from .models.builders import make_model, random_ids

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "moe_mamba"])


def rows(count: int = 24, length: int = 16) -> list[dict]:
    """Sequences of which ever more tokens are no target, so that micro-batches differ in the number of targets."""
    data = []
    for index in range(count):
        ids = random_ids(length, seed=index)
        labels = ids.clone()
        labels[: index % 8 + 1] = -100
        data.append({"input_ids": ids, "labels": labels})
    return data


def run(model: nn.Module, folder: Path, resume: bool = False, data: list | None = None, collator=None, **options):
    """Train without shuffling; returns the losses of the steps, as logged."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    arguments = TrainingArguments(**(defaults | options))
    trainer = Trainer(model=model, args=arguments, train_dataset=data or rows(), data_collator=collator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make(kind: str, adapter: bool = False) -> nn.Module:
    """A small model whose loss is a plain sum over targets: routers' losses are means over a micro-batch."""
    model = make_model(kind, **({"router_aux_loss_coef": 0.0} if kind == "moe_mamba" else {}))
    if adapter:
        torch.manual_seed(1)
        return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1))
    return model


def assert_same_weights(first: nn.Module, second: nn.Module, tolerance: float = 0.0) -> None:
    others = dict(second.named_parameters())
    for name, weight in first.named_parameters():
        assert (weight - others[name]).abs().max() <= tolerance, name


@KINDS
def test_accumulated_steps_are_steps_on_the_whole_batch(kind: str, tmp_path) -> None:
    """Every target counts the same, in whichever micro-batch it stands; without logits too."""
    whole, parts, lean = (make(kind) for _ in range(3))
    expected = run(whole, tmp_path, optim="sgd", learning_rate=0.1)
    split = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert run(parts, tmp_path, **split) == pytest.approx(expected, rel=1e-5)
    assert_same_weights(parts, whole, tolerance=1e-5)
    lean.skip_logits = True
    assert run(lean, tmp_path, **split) == pytest.approx(expected, rel=1e-5)
    assert_same_weights(lean, whole, tolerance=1e-5)


@KINDS
def test_mixed_precision(kind: str, tmp_path) -> None:
    """bf16 by autocast: weights and optimiser stay in fp32, the losses follow those of fp32."""
    exact, mixed = make(kind), make(kind)
    expected = run(exact, tmp_path)
    assert run(mixed, tmp_path, bf16=True) == pytest.approx(expected, rel=0.02)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(adapter: bool, tmp_path) -> None:
    """Bit by bit, dropout in the adapter included."""
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    }
    whole, killed = make("mamba2", adapter), make("mamba2", adapter)
    expected = run(whole, tmp_path, **options)
    # what a run leaves behind that is killed between its third and sixth step
    shutil.rmtree(tmp_path / "checkpoint-6")
    losses = run(killed, tmp_path, resume=True, **options)
    assert len(expected) == 6 and losses == expected
    assert_same_weights(killed, whole)


@KINDS
def test_packed_batches_train_like_padded_ones(kind: str, tmp_path) -> None:
    """`DataCollatorWithFlattening`: one row without padding, the same loss and the same step."""
    data = [{key: value[: 16 - index % 5] for key, value in row.items()} for index, row in enumerate(rows(8))]

    def pad(batch: list[dict]) -> dict[str, torch.Tensor]:
        def padded(key: str, value: int) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence([row[key] for row in batch], batch_first=True, padding_value=value)

        ids = padded("input_ids", 0)
        return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}

    flat, square = make(kind), make(kind)
    options = {"max_steps": 2, "optim": "sgd"}
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    lists = [{key: value.tolist() for key, value in row.items()} for row in data]
    losses = run(flat, tmp_path, data=lists, collator=collator, **options)
    assert losses == pytest.approx(run(square, tmp_path, data=data, collator=pad, **options), rel=1e-5)
    assert_same_weights(flat, square, tolerance=1e-6)


def test_generating_with_weights_that_do_not_fit(tmp_path) -> None:
    """`device_map="auto"` with little memory: the rest stays on disk and is read when needed."""
    model = make_model("mamba2", num_hidden_layers=4, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    block = sum(p.numel() * p.element_size() for p in model.backbone.layers[0].parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 3 * block},
        offload_folder=tmp_path / "offload",
    )
    assert {"cpu", "disk"} == set(loaded.hf_device_map.values())
    ids = random_ids(2, 9)
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
