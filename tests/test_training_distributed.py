"""Two processes, on the CPU or on a GPU each, train as one does, in DDP and in FSDP2, and what they save loads on one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_mamba.models.sharding import HEAD_FSDP_PLAN

from .models.builders import ALL_MODELS, make_model, random_ids
from .training_worker import KINDS, STEPS


def run_two_processes(folder: Path, device: str) -> None:
    """Let `training_worker` fill the folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training_worker", str(rank), str(folder), device],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def assert_same_training(folder: Path, tolerance: float) -> None:
    """The losses of both strategies are those of one process, and what both saved is the same trained model."""
    losses = json.loads((folder / "losses.json").read_text())
    for kind in KINDS:
        alone = torch.tensor(losses[kind]["alone"])
        assert len(alone) == STEPS and alone[-5:].mean() < alone[:5].mean()
        for strategy in ("ddp", "fsdp2"):
            together = torch.tensor(losses[kind][strategy])
            assert (together - alone).abs().max() <= tolerance * alone.max(), (kind, strategy)
        first, second = (AutoModelForCausalLM.from_pretrained(folder / f"{name}-{kind}") for name in ("ddp", "fsdp2"))
        ids = random_ids(2, 9)
        with torch.no_grad():
            logits = first(ids).logits
            assert (logits - second(ids).logits).abs().max() <= 10 * tolerance, kind
            assert (logits - make_model(kind)(ids).logits).abs().max() > 0.01, kind


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_have_the_losses_of_one_and_save_what_one_loads(tmp_path) -> None:
    """One test, so that parallel test processes do not start the two several times."""
    run_two_processes(tmp_path, "cpu")
    assert_same_training(tmp_path, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_losses_of_one_and_save_what_one_loads(tmp_path) -> None:
    """Products of other sizes sum in another order on a GPU, which 20 steps carry on."""
    run_two_processes(tmp_path, "cuda")
    assert_same_training(tmp_path, tolerance=1e-4)


@ALL_MODELS
def test_classes_declare_how_they_are_split(kind: str) -> None:
    """What accelerate wraps and places as a unit, and what transformers' own FSDP shards."""
    model = make_model(kind)
    blocks = {type(layer).__name__ for layer in model.backbone.layers}
    assert set(model._no_split_modules) == blocks == set(model.backbone._no_split_modules)
    names = {re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    assert {f"backbone.{name}" for name in model.config.base_model_fsdp_plan} | set(HEAD_FSDP_PLAN) <= names
