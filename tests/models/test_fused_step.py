"""A block's decoding step with norm and residual inside the projections equals the modules called one after the other."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_mamba import RecurrentCache
from hf_mamba.layers import fused_step
from hf_mamba.models.recurrent import RecurrentModel
from mamba_kernels.dispatch import MOST_ROWS

from .builders import make_model, random_ids
from .oracles import TOLERANCE

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2-groups", "falcon_mamba"])


@pytest.fixture(params=["eager", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or a CPU on which the ops run in eager as if there were one."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    monkeypatch.setattr(fused_step, "select", lambda op, device: "triton")
    monkeypatch.setattr(RecurrentModel, "_run_cpu_steps", lambda *args: None)
    return torch.device("cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the steps that were fused."""
    found: list[str] = []
    for name in ("_selective_scan_step", "_ssd_step"):
        step = getattr(fused_step, name)

        def counted(*args: Any, step: Any = step, name: str = name) -> Any:
            out = step(*args)
            if out is not None:
                found.append(name)
            return out

        monkeypatch.setattr(fused_step, name, counted)
    return found


@torch.no_grad()
def assert_steps_equal_the_sequence(model: Any, device: torch.device, batch: int = 2) -> None:
    ids = random_ids(batch, 11).to(device)
    expected = model(input_ids=ids, use_cache=False).logits
    cache = RecurrentCache(model.config)
    parts = [model(input_ids=part, cache=cache).logits for part in ids.split([4, 1, 1, 2, 1, 1, 1], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max().item() <= TOLERANCE


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("fp32", [False, True], ids=["residual", "residual-fp32"])
def test_equals_the_sequence(device: torch.device, taken: list[str], kind: str, bias: bool, fp32: bool) -> None:
    model = make_model(kind, use_bias=bias, residual_in_fp32=fp32).to(device)
    assert_steps_equal_the_sequence(model, device)
    # 5 single tokens in 2 layers
    assert len(taken) == 10


def test_limits_of_the_time_step(device: torch.device, taken: list[str]) -> None:
    model = make_model("mamba2", time_step_limit=(0.02, 0.05)).to(device)
    assert_steps_equal_the_sequence(model, device)
    assert taken


@KINDS
@pytest.mark.parametrize("batch", [MOST_ROWS, MOST_ROWS + 1, 17])
def test_any_number_of_rows(device: torch.device, taken: list[str], kind: str, batch: int) -> None:
    assert_steps_equal_the_sequence(make_model(kind).to(device), device, batch=batch)
    assert len(taken) == 10


def _hook(model: Any) -> None:
    for layer in model.backbone.layers:
        layer.norm.register_forward_hook(lambda module, args, output: output)


def _replaced_forward(model: Any) -> None:
    for layer in model.backbone.layers:
        layer.mixer.out_proj.forward = layer.mixer.out_proj.forward


def _other_activation(model: Any) -> None:
    for layer in model.backbone.layers:
        conv = layer.mixer.conv1d
        conv.fused_activation, conv.activation = None, torch.nn.GELU()


@KINDS
@pytest.mark.parametrize("change", [_hook, _replaced_forward, _other_activation])
def test_modules_that_do_more_are_called(device: torch.device, taken: list[str], kind: str, change: Any) -> None:
    model = make_model(kind).to(device)
    change(model)
    assert_steps_equal_the_sequence(model, device)
    assert not taken


@KINDS
def test_adapters_are_called(device: torch.device, taken: list[str], kind: str) -> None:
    model = get_peft_model(
        make_model(kind).to(device), LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)
    ).eval()
    assert_steps_equal_the_sequence(model, device)
    assert not taken


def test_gradients_take_the_parallel_ops(device: torch.device, taken: list[str]) -> None:
    model = make_model("mamba").to(device)
    cache = RecurrentCache(model.config)
    for part in random_ids(1, 4).to(device).split([3, 1], dim=1):
        model(part, cache=cache).logits.sum().backward()
    assert not taken
