"""One of two processes: the same 20 training steps alone, in DDP and in FSDP2. Run by test_training_distributed.

    python -m tests.training_worker RANK FOLDER [cpu|cuda]

On the CPU they talk through gloo, on two GPUs through NCCL; kernels are then Triton's. The first process writes `FOLDER/losses.json` and `FOLDER/<strategy>-<kind>/`, the model as saved out of two processes.
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


def train(model: nn.Module, rows: slice, device: torch.device) -> list[float]:
    """The losses of `STEPS` steps on these rows of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        ids = random_ids(ROWS, LENGTH, seed=step)[rows].to(device)
        loss = model(ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(rank: int, folder: Path, kind_of_device: str = "cpu") -> None:
    on_gpu = kind_of_device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
        device_id=device if on_gpu else None,
    )
    half = ROWS // 2
    results: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        start = make(kind).to(device)
        results[kind] = {"alone": train(copy.deepcopy(start), slice(None), device)}
        for strategy in ("ddp", "fsdp2"):
            model = copy.deepcopy(start)
            wrapped = wrap(model, strategy)
            losses = torch.tensor(train(wrapped, slice(rank * half, (rank + 1) * half), device), device=device)
            dist.all_reduce(losses)
            results[kind][strategy] = (losses / 2).tolist()
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank == 0:
                start.save_pretrained(folder / f"{strategy}-{kind}", state_dict=state)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
