"""A token through the blocks on a CPU without calling them equals the modules, which are called wherever they do more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_mamba import RecurrentCache
from hf_mamba.layers import cpu_steps
from hf_mamba.layers.projection import MAX_ROWS
from mamba_kernels import backend

from .builders import make_model, random_ids
from .oracles import TOLERANCE

KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2-groups", "falcon_mamba"])
# single tokens among the pieces below
SINGLE = 5


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the steps that were taken, one for each layer."""
    found: list[str] = []
    for kind in (cpu_steps._SelectiveScanStep, cpu_steps._SSDStep):

        def counted(self: Any, *args: Any, call: Any = kind.__call__, name: str = kind.__name__) -> Any:
            found.append(name)
            return call(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)
    return found


def run(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    pieces = ids.split([4, 1, 1, 2, 1, 1, 1], dim=1)
    return torch.cat([model(input_ids=piece, cache=cache).logits for piece in pieces], dim=1)


@torch.no_grad()
def assert_steps_equal_the_sequence(model: Any, batch: int = 2) -> None:
    ids = random_ids(batch, 11)
    expected = model(input_ids=ids, use_cache=False).logits
    error = (run(model, ids, RecurrentCache(model.config)) - expected).abs().max().item()
    # wide toy models have logits of a hundred
    assert error <= TOLERANCE * max(1, expected.abs().max().item())


@KINDS
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("batch", [1, 2, MAX_ROWS])
def test_equals_the_sequence(taken: list[str], kind: str, bias: bool, batch: int) -> None:
    assert_steps_equal_the_sequence(make_model(kind, use_bias=bias), batch=batch)
    assert len(taken) == 2 * SINGLE


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_large_weights_in_parts(taken: list[str], kind: str, batch: int) -> None:
    heads = {"num_heads": 16, "head_dim": 32} if kind == "mamba2" else {}
    model = make_model(kind, hidden_size=256, use_bias=True, **heads)
    assert_steps_equal_the_sequence(model, batch=batch)
    assert len(taken) == 2 * SINGLE


@KINDS
@torch.no_grad()
def test_states_are_those_of_the_modules(taken: list[str], kind: str) -> None:
    model, ids = make_model(kind), random_ids(1, 11)
    stepped, called = RecurrentCache(model.config), RecurrentCache(model.config)
    run(model, ids, stepped)
    assert taken
    taken.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.backbone), "_run_cpu_steps", lambda *args: None)
        run(model, ids, called)
    assert not taken
    for ours, theirs in zip(stepped.states(), called.states(), strict=True):
        for state, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


def test_limits_of_the_time_step(taken: list[str]) -> None:
    assert_steps_equal_the_sequence(make_model("mamba2", time_step_limit=(0.02, 0.05)))
    assert taken


def test_without_a_bias_of_the_convolution(taken: list[str]) -> None:
    assert_steps_equal_the_sequence(make_model("mamba", use_conv_bias=False))
    assert taken


def _hook(model: Any) -> None:
    model.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda module, args, output: 2 * output)


def _hook_of_a_block(model: Any) -> None:
    model.backbone.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def _replaced_forward(model: Any) -> None:
    linear = model.backbone.layers[1].mixer.out_proj
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)


def _replaced_module(model: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    mixer = model.backbone.layers[1].mixer
    old = mixer.out_proj
    mixer.out_proj = Doubled(old.in_features, old.out_features, bias=old.bias is not None).eval()
    mixer.out_proj.load_state_dict(old.state_dict())


def _other_activation(model: Any) -> None:
    conv = model.backbone.layers[1].mixer.conv1d
    conv.fused_activation, conv.activation = None, nn.GELU()


CHANGES = pytest.mark.parametrize("change", [_hook, _hook_of_a_block, _replaced_forward, _replaced_module])


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
@CHANGES
def test_modules_that_do_more_are_called(taken: list[str], kind: str, change: Callable[[Any], None]) -> None:
    model = make_model(kind)
    change(model)
    assert_steps_equal_the_sequence(model)
    assert not taken


def test_another_activation(taken: list[str]) -> None:
    model = make_model("mamba2")
    _other_activation(model)
    assert_steps_equal_the_sequence(model)
    assert not taken


@CHANGES
@torch.no_grad()
def test_modules_that_do_more_since_the_last_token_are_called(taken: list[str], change: Callable[[Any], None]) -> None:
    model, ids = make_model("mamba"), random_ids(1, 6)
    cache, other = RecurrentCache(model.config), RecurrentCache(model.config)
    for each in (cache, other):
        model(ids[:, :4], cache=each)
    model(ids[:, 4:5], cache=cache)
    assert len(taken) == 2
    change(model)
    found = model(ids[:, 5:], cache=cache).logits
    # the same first step, which prepares nothing for a cache, and the same change
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.backbone), "_run_cpu_steps", lambda *args: None)
        fresh = make_model("mamba")
        fresh(ids[:, 4:5], cache=other)
        change(fresh)
        expected = fresh(ids[:, 5:], cache=other).logits
    assert len(taken) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _in_place(parameter: nn.Parameter) -> None:
    parameter.mul_(1.5)


def _through_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def _other_storage(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("write", [_in_place, _through_data, _other_storage])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_weights_written_between_two_tokens_count(
    taken: list[str], kind: str, write: Callable[[nn.Parameter], None]
) -> None:
    model, ids = make_model(kind), random_ids(1, 6)
    cache = RecurrentCache(model.config)
    model(ids[:, :4], cache=cache)
    model(ids[:, 4:5], cache=cache)
    other = cache.select([0])
    for parameter in model.backbone.layers.parameters():
        write(parameter)
    found = model(ids[:, 5:], cache=cache).logits
    assert len(taken) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.backbone), "_run_cpu_steps", lambda *args: None)
        expected = model(ids[:, 5:], cache=other).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_goes_on_with_another_model(taken: list[str]) -> None:
    model, ids = make_model("mamba"), random_ids(1, 6)
    other = make_model("mamba")
    for parameter in other.backbone.layers.parameters():
        parameter.mul_(1.5)
    cache = RecurrentCache(model.config)
    for part in ids[:, :5].split([4, 1], dim=1):
        model(part, cache=cache)
    copy = cache.select([0])
    found, expected = (other(ids[:, 5:], cache=each).logits for each in (cache, copy))
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(ids[:, 5:], cache=copy).logits)


def test_adapters_are_called(taken: list[str]) -> None:
    model = get_peft_model(make_model("mamba"), LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False))
    assert_steps_equal_the_sequence(model.eval())
    assert not taken


def test_gradients_take_the_parallel_ops(taken: list[str]) -> None:
    model = make_model("mamba")
    cache = RecurrentCache(model.config)
    for part in random_ids(1, 4).split([3, 1], dim=1):
        model(part, cache=cache).logits.sum().backward()
    assert not taken


@pytest.mark.parametrize("case", ["bf16", "autocast", "reference", "bf16 states", "many rows", "hidden states"])
@torch.no_grad()
def test_what_is_left_to_the_modules(taken: list[str], case: str) -> None:
    model = make_model("mamba").to(torch.bfloat16 if case == "bf16" else torch.float32)
    cache = RecurrentCache(model.config, ssm_dtype=torch.bfloat16 if case == "bf16 states" else None)
    batch = MAX_ROWS + 1 if case == "many rows" else 1
    options = {"output_hidden_states": True} if case == "hidden states" else {}
    with torch.autocast("cpu", enabled=case == "autocast"), backend("reference" if case == "reference" else "eager"):
        for part in random_ids(batch, 3).split([2, 1], dim=1):
            model(part, cache=cache, **options)
    assert not taken


@torch.inference_mode()
def test_steps_prepared_in_inference_mode_go_on_outside(taken: list[str]) -> None:
    model, ids = make_model("mamba"), random_ids(1, 6)
    cache = RecurrentCache(model.config)
    expected = model(ids, use_cache=False).logits[:, -1]
    for part in ids[:, :5].split([4, 1], dim=1):
        model(part, cache=cache)
    with torch.inference_mode(False), torch.no_grad():
        found = model(ids[:, 5:].clone(), cache=cache).logits[:, -1]
    assert len(taken) == 4
    assert (found - expected).abs().max().item() <= TOLERANCE
