"""Training that keeps little: no logits of the whole batch, block inputs alone under checkpointing, one compiled graph."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_mamba.layers.loss import chunked_cross_entropy

from .models.builders import ALL_MODELS, VOCAB, make_model, random_ids

IDS = random_ids(3, 20)


def step(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(actual, expected, tolerance: float = 2e-6) -> None:
    assert abs(actual[0] - expected[0]) <= tolerance * expected[0].abs()
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


# --- the loss without logits ------------------------------------------------------------------------------------------

MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
MASK[1, -3:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100).masked_fill(IDS % 5 == 0, -100)
INPUTS = {
    "plain": {"labels": IDS},
    "padded and partly ignored": {"attention_mask": MASK, "labels": LABELS},
    "packed": {"position_ids": torch.arange(20).remainder(7).expand(3, -1), "labels": IDS},
    "part of an accumulated batch": {"labels": LABELS, "num_items_in_batch": torch.tensor(95)},
    "number of items as a number": {"labels": LABELS, "num_items_in_batch": 95},
    "shifted before": {"shift_labels": IDS.roll(-1, dims=1)},
    "another ignored label": {"labels": IDS, "ignore_index": 7},
}


@ALL_MODELS
@pytest.mark.parametrize("inputs", INPUTS)
def test_loss_without_logits_is_the_loss(kind: str, inputs: str, monkeypatch) -> None:
    """Of MoE-Mamba too, where the routers' losses are added. All in fp64: in fp32, sums that cancel differ by their rounding."""
    monkeypatch.setattr("hf_mamba.layers.loss.MAX_LOGITS", 7 * VOCAB)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = make_model(kind).train().double()
    given = {"input_ids": IDS} | INPUTS[inputs]
    expected = step(model, **given)
    assert model(**given, skip_logits=True).logits is None
    assert_same_step(step(model, **given, skip_logits=True), expected, tolerance=1e-8)


DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trained", ["weight, bias and x", "weight and x", "x", "weight", "bias"])
def test_gradients_of_the_loss_against_fp64(device: str, dtype: torch.dtype, trained: str) -> None:
    """Whichever of head and hidden states are trained; ignored targets, those at the end of a part too; a loss that is scaled."""
    torch.manual_seed(0)
    head = nn.Linear(24, 301, bias="bias" in trained).to(device, dtype)
    hidden = torch.randn(3, 33, 24, device=device, dtype=dtype)
    targets = torch.randint(301, (3, 33), device=device)
    targets[0, :14], targets[1, -1] = -100, -100
    wanted = {"weight": head.weight, "bias": head.bias, "x": hidden}
    for name, tensor in wanted.items():
        if tensor is not None:
            tensor.requires_grad_(name in trained)
    exact = copy.deepcopy(head).double()
    x = hidden.detach().double().requires_grad_(hidden.requires_grad)
    expected = F.cross_entropy(exact(x).flatten(0, 1), targets.flatten())
    (3 * expected).backward()
    loss = chunked_cross_entropy(head, hidden, targets, chunk_size=14)
    (3 * loss).backward()
    assert abs(loss - expected) <= DTYPES[dtype] * expected
    for name, tensor in {"weight": exact.weight, "bias": exact.bias, "x": x}.items():
        if name in trained:
            assert wanted[name].grad.dtype == dtype
            difference = (wanted[name].grad.double() - tensor.grad).abs().max()
            assert difference <= DTYPES[dtype] * tensor.grad.abs().max(), name
        else:
            assert tensor is None or wanted[name].grad is None
    with torch.no_grad():
        assert abs(chunked_cross_entropy(head, hidden, targets, chunk_size=14) - loss) <= 1e-6 * loss


def test_head_and_loss_multiply_three_times() -> None:
    """Forward, and backward for hidden states and weight: no logits are computed twice."""
    head, hidden, targets = nn.Linear(8, 50), torch.randn(64, 8, requires_grad=True), torch.randint(50, (64,))
    with FlopCounterMode(display=False) as counted:
        chunked_cross_entropy(head, hidden, targets, chunk_size=8).backward()
    assert counted.get_total_flops() == 3 * 2 * 64 * 8 * 50


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_without_logits_of_an_adapted_head(tied: bool, monkeypatch) -> None:
    """The head is called, not read; its dropout falls on the same values when it is computed again."""
    monkeypatch.setattr("hf_mamba.layers.loss.MAX_LOGITS", 7 * VOCAB)
    config = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    adapted = get_peft_model(make_model("mamba2", tie_word_embeddings=tied), config).train()
    torch.manual_seed(1)
    loss = adapted(input_ids=IDS, labels=IDS, skip_logits=True).loss
    loss.backward()
    layer = adapted.get_base_model().lm_head
    # the gradient of B is that of a loss whose dropout masks are drawn in the same order
    expected = copy.deepcopy(adapted)
    expected.zero_grad()
    hidden = expected.get_base_model().backbone(IDS).last_hidden_state.flatten(0, 1)
    targets = F.pad(IDS[:, 1:], (0, 1), value=-100).flatten()
    torch.manual_seed(1)
    total = 0
    for x, wanted in zip(hidden.split(7), targets.split(7), strict=True):
        logits = expected.get_base_model().lm_head(x)
        total = total + F.cross_entropy(logits, wanted, reduction="sum")
    (total / (targets != -100).sum()).backward()
    gradient = expected.get_base_model().lm_head.lora_B["default"].weight.grad
    assert (layer.lora_B["default"].weight.grad - gradient).abs().max() <= 1e-6 * gradient.abs().max()


def test_loss_without_logits_of_trained_tokens() -> None:
    """PEFT wraps a tied head too, in a module that does not show its vocabulary."""
    config = LoraConfig(r=2, target_modules=["in_proj"], trainable_token_indices={"embeddings": [3, 4, 5]})
    adapted = get_peft_model(make_model("mamba2", tie_word_embeddings=True), config).train()
    expected = step(adapted, input_ids=IDS, labels=IDS)
    assert any("trainable_tokens" in name for name in expected[1])
    assert_same_step(step(adapted, input_ids=IDS, labels=IDS, skip_logits=True), expected)


def test_loss_under_autocast_is_computed_in_fp32() -> None:
    model = make_model("mamba").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(model, input_ids=IDS, labels=IDS)
        actual = step(model, input_ids=IDS, labels=IDS, skip_logits=True)
    assert actual[0].dtype == torch.float32
    assert_same_step(actual, expected, tolerance=1e-2)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_logits_of_the_batch_never_exist() -> None:
    hidden, targets = torch.randn(64, 8, requires_grad=True), torch.randint(500, (64,))
    head = nn.Linear(8, 500)
    with LargestTensor() as seen:
        chunked_cross_entropy(head, hidden, targets, chunk_size=8).backward()
    # the chunk's logits, or the weight and its gradient
    assert seen.largest == 8 * 500
    with LargestTensor() as seen:
        F.cross_entropy(head(hidden), targets).backward()
    assert seen.largest == 64 * 500


def test_when_logits_are_left_out() -> None:
    model = make_model("mamba")
    assert model.train()(IDS, labels=IDS).logits is not None
    model.skip_logits = True
    output = model(IDS, labels=IDS)
    assert output.logits is None and "logits" not in output
    assert model(IDS).logits is not None
    assert model(IDS, labels=IDS, skip_logits=False).logits is not None
    assert model.eval()(IDS, labels=IDS).logits is not None
    assert len(model(IDS, labels=IDS, skip_logits=True, return_dict=False, use_cache=False)) == 1


def test_loss_without_logits_refuses_what_it_cannot_do() -> None:
    model = make_model("mamba")
    with pytest.raises(ValueError, match="needs `labels`"):
        model(IDS, skip_logits=True)
    with pytest.raises(ValueError, match="leave `logits_to_keep` at 0"):
        model(IDS, labels=IDS, skip_logits=True, logits_to_keep=1)
    model.loss_function = lambda **kwargs: kwargs["logits"].sum()
    with pytest.raises(ValueError, match="another `loss_function`"):
        model(IDS, labels=IDS, skip_logits=True)


@pytest.mark.gpu
def test_liger_on_a_gpu_is_the_same_loss(monkeypatch) -> None:
    pytest.importorskip("liger_kernel")
    model = make_model("mamba2", vocab_size=1000).to("cuda", torch.bfloat16).train()
    ids = IDS.cuda()
    fused = step(model, input_ids=ids, labels=ids, skip_logits=True)
    monkeypatch.setattr("hf_mamba.layers.loss._has_liger", lambda: False)
    assert_same_step(fused, step(model, input_ids=ids, labels=ids, skip_logits=True), tolerance=2e-2)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def saved_for_backward(model) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a forward leaves for the backward, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=torch.randn(2, 16, 32, requires_grad=True), use_cache=False)
    return shapes


@ALL_MODELS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_saves_one_input_for_each_block(kind: str, reentrant: bool) -> None:
    backbones = {layers: make_model(kind, num_hidden_layers=layers).backbone.train() for layers in (2, 6)}
    plain = {layers: saved_for_backward(model) for layers, model in backbones.items()}
    assert len(plain[6]) - len(plain[2]) > 4 * 5
    for model in backbones.values():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saved = {layers: saved_for_backward(model) for layers, model in backbones.items()}
    added = list(saved[6])
    for shape in saved[2]:
        added.remove(shape)
    # the logits of the routers, (tokens, 4), are kept for their losses
    assert [shape for shape in added if kind != "moe_mamba" or shape[-1] == 32] == [(2, 16, 32)] * 4


@pytest.mark.parametrize("kind", ["mamba", "moe_mamba"])
def test_checkpointing_of_a_frozen_model_with_an_adapter(kind: str) -> None:
    model = make_model(kind)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).train()
    expected = step(adapted, input_ids=IDS, labels=IDS)
    adapted.gradient_checkpointing_enable()
    assert_same_step(step(adapted, input_ids=IDS, labels=IDS), expected)


# --- one compiled graph -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mamba2", "moe_mamba"])
def test_training_step_compiles_without_a_graph_break(kind: str) -> None:
    """Forward, loss and backward, with checkpointing and without the logits; moe_mamba holds a Mamba layer as well."""
    model = make_model(kind, num_hidden_layers=1 if kind == "mamba2" else 2).train()
    if kind == "moe_mamba":
        # in transformers 5.17 the grouped product on a CPU asks how many tokens each expert has
        model.set_experts_implementation("batched_mm")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {"input_ids": IDS, "labels": IDS, "skip_logits": True}
    expected = step(model, **inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(**inputs).loss
    loss.backward()
    assert_same_step((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), expected)
