"""What the routers do, as the Trainer logs it, against counts made by hand."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_mamba.integrations.router_health import RouterHealth, recorded_routing

from .builders import make_model, random_ids

logger = logging.get_logger("hf_mamba.integrations.router_health")
SCALARS = ("router_entropy", "router_dropped_fraction", "router_max_load", "router_min_load", "router_unused_experts")


class Collected(TrainerCallback):
    """What a reporting integration is shown."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


def make_trainer(model, folder, rows: int = 8, callbacks=(), **options) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in random_ids(rows, 6)]
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        # the routing stays what it is
        "learning_rate": 0.0,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(folder, **{**settings, **options})
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def collapse(model, layer: int, expert: int) -> None:
    """All tokens of a layer to one expert, for a router with a bias."""
    with torch.no_grad():
        model.backbone.layers[layer].moe.router.weight.zero_()
        model.backbone.layers[layer].moe.router.bias.zero_()
        model.backbone.layers[layer].moe.router.bias[expert] = 1.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_entries_are_those_of_the_router_logits(tmp_path, accumulation: int) -> None:
    """Load, dropped fraction and entropy of every layer, over exactly the tokens since the last log."""
    model = make_model("moe_mamba", capacity_factor=0.75)
    trainer = make_trainer(
        model, tmp_path, callbacks=[RouterHealth()], gradient_accumulation_steps=accumulation, logging_steps=2
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    batches = random_ids(8, 6)[: 4 * accumulation].split(2)
    layers = {1: ([], 0, 0.0), 3: ([], 0, 0.0)}
    model.train()
    with torch.no_grad():
        outputs = [model(batch, output_router_logits=True).router_logits for batch in batches]
    for number, index in ((1, 0), (3, 1)):
        counts, dropped, entropy, tokens = [0] * 4, 0, 0.0, 0
        for output in outputs:
            taken = [0] * 4
            for row in output[index].double().softmax(dim=-1):
                expert = int(row.argmax())
                taken[expert] += 1
                # capacity int(0.75 * 12 / 4) = 2
                dropped += taken[expert] > 2
                entropy -= sum(p * math.log(p) for p in row.tolist())
            counts = [a + b for a, b in zip(counts, taken, strict=True)]
            tokens += 12
        layers[number] = ([count / tokens for count in counts], dropped / tokens, entropy / tokens)
    logged = {layer["layer"]: layer for layer in entry["router_layers"]}
    for number, (load, dropped, entropy) in layers.items():
        assert logged[number]["load"] == pytest.approx(load)
        assert logged[number]["dropped_fraction"] == pytest.approx(dropped) and dropped > 0
        assert logged[number]["entropy"] == pytest.approx(entropy, rel=1e-5)
    everything = [4 * share for load, _, _ in layers.values() for share in load]
    assert entry["router_max_load"] == pytest.approx(max(everything))
    assert entry["router_min_load"] == pytest.approx(min(everything))
    assert entry["router_entropy"] == pytest.approx(sum(value[2] for value in layers.values()) / 2, rel=1e-5)
    assert entry["router_dropped_fraction"] == pytest.approx(sum(value[1] for value in layers.values()) / 2)
    assert entry["router_unused_experts"] == everything.count(0)
    json.dumps(trainer.state.log_history)
    assert all(layer.moe is None or layer.moe.observer is None for layer in model.backbone.layers)


def test_padding_does_not_count(tmp_path) -> None:
    model = make_model("moe_mamba", router_bias=True)
    collapse(model, 1, expert=2)
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    data = [{"input_ids": row, "labels": row, "attention_mask": keep} for row, keep in zip(ids, mask, strict=True)]
    trainer = make_trainer(model, tmp_path, callbacks=[RouterHealth()], max_steps=1)
    trainer.train_dataset = data
    with recorded_routing(model) as routing:
        model(ids, attention_mask=mask)
    assert routing[1][0].valid.sum() == 11
    trainer.train()
    layer = trainer.state.log_history[0]["router_layers"][0]
    assert layer["load"] == [0, 0, 1, 0] and layer["dropped_fraction"] == 0


def test_attached_callback_reaches_reports(tmp_path) -> None:
    """`attach` goes before the reporting callbacks; evaluation logs nothing of the routers and counts nothing."""
    model, reports = make_model("moe_mamba"), Collected()
    trainer = make_trainer(model, tmp_path, callbacks=[reports], eval_strategy="steps", eval_steps=1)
    RouterHealth().attach(trainer)
    trainer.train()
    training = [logs for logs in reports.logs if "loss" in logs]
    assert len(training) == 2
    for logs in training:
        assert all(isinstance(logs[name], float | int) for name in SCALARS)
        assert "router_layers" not in logs
    assert not [name for logs in reports.logs if "loss" not in logs for name in logs if name.startswith("router")]
    shares = [
        layer["load"] for entry in trainer.state.log_history if "loss" in entry for layer in entry["router_layers"]
    ]
    assert all(abs(sum(load) - 1) < 1e-6 for load in shares)


def test_gradient_checkpointing_changes_no_fraction(tmp_path) -> None:
    entries = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            make_model("moe_mamba", capacity_factor=1.0),
            tmp_path,
            callbacks=[RouterHealth()],
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        entries.append([entry["router_layers"] for entry in trainer.state.log_history if "loss" in entry])
    for plain, recomputed in zip(*entries, strict=True):
        for one, other in zip(plain, recomputed, strict=True):
            assert other["load"] == pytest.approx(one["load"])
            assert other["dropped_fraction"] == pytest.approx(one["dropped_fraction"])
            assert other["entropy"] == pytest.approx(one["entropy"], rel=1e-5)


def test_one_warning_for_experts_without_tokens(tmp_path) -> None:
    """After exactly 100 steps, once, with layer and expert; not earlier, and not again."""
    model = make_model("moe_mamba", router_bias=True, layers_block_type=["mamba", "moe"], num_hidden_layers=2)
    collapse(model, 1, expert=2)
    trainer = make_trainer(model, tmp_path, callbacks=[RouterHealth()], max_steps=99, logging_steps=10)
    with CaptureLogger(logger) as captured:
        trainer.train()
    assert captured.out == ""
    trainer = make_trainer(model, tmp_path, callbacks=[RouterHealth()], max_steps=130, logging_steps=10)
    with CaptureLogger(logger) as captured:
        trainer.train()
    assert captured.out.count("received no token") == 1
    assert "for 100 training steps or more, at step 100: layer 1: 0, 1, 3." in captured.out


def test_the_end_of_training_warns_too(tmp_path) -> None:
    model = make_model("moe_mamba", router_bias=True)
    collapse(model, 3, expert=0)
    trainer = make_trainer(model, tmp_path, callbacks=[RouterHealth(patience=2)], logging_strategy="no")
    with CaptureLogger(logger) as captured:
        trainer.train()
    assert captured.out.count("received no token") == 1 and "layer 3: 1, 2, 3" in captured.out


def test_no_synchronisation_between_logs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting reads no value back from the device: neither item() nor tolist() nor a conversion to bool or int."""
    model = make_model("moe_mamba", capacity_factor=1.0).train()
    health = RouterHealth()
    trainer = make_trainer(model, tmp_path)
    health.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
    with recorded_routing(model) as routing:
        model(random_ids(2, 6))

    def refuse(*args):
        raise AssertionError("a value was read back from the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    health.on_step_begin(trainer.args, trainer.state, trainer.control)
    for number, layer in ((1, model.backbone.layers[1]), (3, model.backbone.layers[3])):
        layer.moe.observer(routing[number][0])
    monkeypatch.undo()
    assert sum(health._records[1].load.tolist()) == 12


def test_compiles_whole() -> None:
    """`torch.compile(fullgraph=True)` of a training step traces the counting too."""
    model = make_model("moe_mamba", capacity_factor=1.0, num_hidden_layers=2).train()
    model.set_experts_implementation("batched_mm")
    health, state = RouterHealth(), TrainerState()
    health.on_train_begin(None, state, None, model=model)
    ids, compiled = random_ids(2, 8), torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(2):
        state.global_step = step
        health.on_step_begin(None, state, None)
        compiled(input_ids=ids, labels=ids).loss.backward()
    for record in health._records.values():
        assert record.counts[0] == record.load.sum() == 2 * 16
        assert record.last_used.tolist() == [2 if count else 0 for count in record.load.tolist()]
    torch.compiler.reset()


def test_other_models_are_left_alone(tmp_path) -> None:
    trainer = make_trainer(make_model("mamba2"), tmp_path, callbacks=[RouterHealth()])
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("router")]


def test_patience_is_checked() -> None:
    with pytest.raises(ValueError, match="`patience`"):
        RouterHealth(patience=0)
