"""TRL's `SFTTrainer(packing=True)`, where TRL is installed (`pip install hf-mamba[train]`)."""

import itertools
import warnings

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import hf_mamba

from .models.builders import make_model, random_ids

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_packed_texts_are_trained_as_if_alone(kind: str, adapter: bool, tmp_path) -> None:
    lengths = [5 + index % 7 for index in range(64)]
    data = datasets.Dataset.from_list([{"input_ids": random_ids(n, seed=i).tolist()} for i, n in enumerate(lengths)])
    options = trl.SFTConfig(
        output_dir=str(tmp_path),
        packing=True,
        max_length=32,
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    batches = []

    class Recording(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append({key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)})
            return super().compute_loss(model, inputs, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Recording(
            model=make_model(kind),
            args=options,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(hf_mamba.demo_checkpoint()),
            peft_config=LoraConfig(r=2) if adapter else None,
        )
        trainer.train()
    ids = batches[0]["input_ids"]
    starts = [*(batches[0]["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    assert len(starts) > 4
    model = make_model(kind)
    total, targets = 0.0, 0
    for start, stop in itertools.pairwise(starts):
        alone = ids[:, start:stop]
        if alone.shape[1] > 1:
            total += model(alone, labels=alone, num_items_in_batch=1).loss.item()
            targets += alone.shape[1] - 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / targets, rel=1e-5)
