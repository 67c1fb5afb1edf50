"""One of two gloo processes on the CPU: the same 20 training steps alone, in DDP and in FSDP2. Run by test_training_distributed.

    python -m tests.training_worker RANK FOLDER

The first process writes `FOLDER/losses.json` and `FOLDER/<strategy>-<kind>/`, the model as saved out of two processes.
"""

import copy
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.models.builders import make_model, random_ids

KINDS = ("mamba2", "moe_mamba")
STEPS, ROWS, LENGTH = 20, 4, 16


def make(kind: str) -> nn.Module:
    """A small model in training mode; without routers' losses, which are means over what a process sees."""
    overrides = {"router_aux_loss_coef": 0.0} if kind == "moe_mamba" else {}
    model = make_model(kind, **overrides).train()
    model.skip_logits = True
    return model


def wrap(model: nn.Module, strategy: str) -> nn.Module:
    """`model` for a strategy; FSDP2 in the groups that the class declares."""
    if strategy == "ddp":
        return DistributedDataParallel(model)
    if strategy == "fsdp2":
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
    return model


def train(model: nn.Module, rows: slice) -> list[float]:
    """The losses of `STEPS` steps on these rows of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        ids = random_ids(ROWS, LENGTH, seed=step)[rows]
        loss = model(ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    half = ROWS // 2
    results: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        start = make(kind)
        results[kind] = {"alone": train(copy.deepcopy(start), slice(None))}
        for strategy in ("ddp", "fsdp2"):
            model = copy.deepcopy(start)
            losses = torch.tensor(train(wrap(model, strategy), slice(rank * half, (rank + 1) * half)))
            dist.all_reduce(losses)
            results[kind][strategy] = (losses / 2).tolist()
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                start.save_pretrained(folder / f"{strategy}-{kind}", state_dict=state)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
