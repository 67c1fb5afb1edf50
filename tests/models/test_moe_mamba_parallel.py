"""Tensor and expert parallelism: the declared plans, and two processes against one, on CPUs and on two GPUs.

The experts' activation is split over F or whole experts over the processes; logits, losses and gradients stay what they
are on one.
"""

import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig, TrainerState
from transformers.distributed import tensor_parallel

from hf_mamba import MoeMambaForCausalLM
from hf_mamba.integrations.router_health import RouterHealth, expert_layers
from hf_mamba.layers.switch import Routing

from .builders import make_model, random_ids

FRAMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated-shared": {"moe_gated": True, "num_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "dense": {"layers_block_type": ["mamba", "mlp", "parallel_moe", "parallel_mlp"], "final_norm": True},
    "biased": {"moe_bias": True, "layers_block_type": ["mamba", "moe", "mlp", "moe"]},
    "gated-bias": {"moe_gated": True, "moe_bias": True, "num_shared_experts": 1},
}
# before 5.21 expert parallelism was a flag
HAS_EP_SIZE = "ep_size" in DistributedConfig.__dataclass_fields__
SPLITS = {
    "tensor": {"tp_size": 2},
    "expert": {"tp_size": 2, **({"ep_size": 2} if HAS_EP_SIZE else {"enable_expert_parallel": True})},
}
# what of the plan two processes can be seen to run
RUN = [("plain", "tensor"), ("plain", "expert"), ("gated-shared", "tensor"), ("gated-shared", "expert")]
RUN += [("dense", "tensor"), ("biased", "expert")]


@pytest.mark.parametrize("frame", FRAMES)
def test_plans_name_what_there_is(frame: str) -> None:
    """Every rule matches a module or parameter, its style is known, and the experts are in the expert plan."""
    model = make_model("moe_mamba", **FRAMES[frame])
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    tensor_plan, expert_plan = model.config.base_model_tp_plan, model.config.base_model_ep_plan
    assert model.tp_plan == {f"backbone.{rule}": style for rule, style in (tensor_plan or {}).items()}
    for rule, style in [*model.tp_plan.items(), *((f"backbone.{r}", s) for r, s in expert_plan.items())]:
        assert any(rule.replace("*", str(layer)) in names for layer in range(4)), rule
        assert style in tensor_parallel.ALL_PARALLEL_STYLES, style
    experts = next(layer.moe.experts for layer in model.backbone.layers if layer.moe is not None)
    assert {f"layers.*.moe.experts.{name}" for name, _ in experts.named_parameters()} <= set(expert_plan)
    assert ("layers.*.moe.experts" in (tensor_plan or {})) != model.config.moe_bias
    saved = model.config.to_dict()
    assert not [key for key in saved if "plan" in key]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_rank(rank: int, port: int, folder: str, cases: list[tuple[str, str]], gpu: bool) -> None:
    """One of two processes: every case's logits, loss and gradients, compared with the whole model of this process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.distributed.init_process_group("gloo")
    try:
        for frame, split in cases:
            compare(Path(folder) / frame, split, device)
        count_together(rank, device)
        verdict = "equal"
    except Exception:
        verdict = traceback.format_exc()
    (Path(folder) / f"verdict-{rank}").write_text(verdict, encoding="utf-8")
    # a rank that is still at work would lose its connection
    for _ in range(100):
        if (Path(folder) / f"verdict-{1 - rank}").exists():
            break
        time.sleep(0.1)
    # a rank that failed would leave the other one waiting at the barrier of an orderly shutdown
    os._exit(0)


def compare(folder: Path, split: str, device: torch.device) -> None:
    whole = MoeMambaForCausalLM.from_pretrained(folder).to(device)
    parted = MoeMambaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**SPLITS[split]))
    local = parted.backbone.layers[1].moe or parted.backbone.layers[2].moe
    full = whole.backbone.layers[1].moe or whole.backbone.layers[2].moe
    weight = local.experts.down_proj.to_local()
    assert weight.numel() * 2 == full.experts.down_proj.numel()
    assert weight.shape[0] == full.experts.num_experts // (2 if split == "expert" else 1)
    assert weight.device == device
    ids = random_ids(2, 7).to(device)
    with torch.no_grad():
        difference = (parted.eval()(ids).logits - whole.eval()(ids).logits).abs().max().item()
        assert difference <= 1e-5, f"{folder.name}, {split}: logits differ by {difference}"
    losses, gradients = [], []
    for model in (whole.train(), parted.train()):
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    for name, expected in gradients[0].items():
        actual = whole_tensor(gradients[1][name])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4, msg=f"{folder.name}, {split}: {name}")


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor of which two processes have parts; `full_tensor` of torch 2.11 refuses gate and up rows that are split apiece."""
    if not isinstance(value, DTensor):
        return value
    (placement,) = value.placements
    if placement.is_replicate():
        return value.to_local()
    local = value.to_local().contiguous()
    parts = [torch.empty_like(local) for _ in range(2)]
    torch.distributed.all_gather(parts, local)
    if type(placement).__name__ == "_StridedShard":
        parts = [
            half for halves in zip(*[part.chunk(2, placement.dim) for part in parts], strict=True) for half in halves
        ]
    return torch.cat(parts, placement.dim)


def count_together(rank: int, device: torch.device) -> None:
    """`RouterHealth` logs what both processes did: rank 0 has one token for expert 1, rank 1 two for expert 3."""
    model = make_model("moe_mamba", router_bias=True).to(device)
    health = RouterHealth(patience=5)
    state = TrainerState(global_step=4)
    health.on_train_begin(None, state, None, model=model)
    health.on_step_begin(None, state, None)
    for layer in expert_layers(model).values():
        logits = torch.zeros(1 + rank, 4, device=device)
        logits[:, 1 + 2 * rank] = 3.0
        layer.observer(Routing(logits, logits[:, :1], logits.topk(1).indices, None, None, training=True))
    logs: dict[str, Any] = {"loss": 1.0}
    state.log_history.append({"step": 4})
    health.on_log(None, state, None, logs=logs)
    entropy = torch.distributions.Categorical(logits=torch.tensor([0.0, 3.0, 0.0, 0.0])).entropy()
    assert abs(logs["router_entropy"] - entropy) < 1e-5 and logs["router_unused_experts"] == 4
    assert state.log_history[-1]["router_layers"][0]["load"] == [0, 1 / 3, 0, 2 / 3]
    assert health._records[1].last_used.tolist() == [4, 5, 4, 5]


def run_two_processes(folder: Path, gpu: bool) -> None:
    for frame in {frame for frame, _ in RUN}:
        make_model("moe_mamba", capacity_factor=0.75, **FRAMES[frame]).save_pretrained(folder / frame)
    torch.multiprocessing.spawn(run_rank, args=(free_port(), str(folder), RUN, gpu), nprocs=2)
    for rank in range(2):
        assert (folder / f"verdict-{rank}").read_text(encoding="utf-8") == "equal"


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Logits in evaluation, loss and gradients in training with capacity, for each way of splitting; and router health."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    run_two_processes(tmp_path, gpu=False)


@pytest.mark.gpu
def test_two_gpus_equal_one(tmp_path: Path) -> None:
    """The same with a GPU for each process, over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_two_processes(tmp_path, gpu=True)
