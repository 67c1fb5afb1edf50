"""What transformers' native classes can do stays possible: checkpointing, autocast, offloading, export and the like."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, make_model, random_ids

TOLERANCE = 1e-5
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}


def loss_and_gradients(model, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, attention_mask=(ids != 0).long()).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@ALL_MODELS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    model = make_model(kind).train()
    ids = random_ids(2, 15)
    ids[1, :4] = 0
    loss, expected = loss_and_gradients(model, ids)
    calls: list[int] = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *args: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, gradients = loss_and_gradients(model, ids)
    # once forward, once more to recompute
    assert len(calls) == 2
    assert again == loss
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


@ALL_MODELS
def test_autocast(kind: str) -> None:
    """bf16 in the projections, fp32 in the recurrence: close to fp32, and gradients for all."""
    model = make_model(kind).train()
    ids = random_ids(2, 30)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    assert output.logits.dtype == torch.float32
    assert (output.logits - expected).abs().max() <= 0.05 * expected.abs().max()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@ALL_MODELS
@torch.no_grad()
def test_autocast_over_a_cache(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        full = model(ids).logits
        cache = RecurrentCache(model.config)
        parts = [model(part, cache=cache).logits for part in ids.split([7, 1, 4], dim=1)]
    assert (torch.cat(parts, dim=1) - full).abs().max() <= 0.05 * full.abs().max()


@ALL_MODELS
@torch.no_grad()
def test_embeddings_instead_of_ids(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    generated = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **GREEDY)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(generated, expected[:, 9:])


@ALL_MODELS
@torch.no_grad()
def test_logits_to_keep(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, 9)
    expected = model(ids).logits
    for count in (1, 4, 9, 50):
        assert torch.allclose(model(ids, logits_to_keep=count).logits, expected[:, -count:], atol=1e-6)
    positions = torch.tensor([0, 5, -1])
    assert torch.allclose(model(ids, logits_to_keep=positions).logits, expected[:, positions], atol=1e-6)
    # the last of the new tokens, whatever is replayed before them
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :6], cache=cache)
    cache.crop(-3)
    logits = model(ids[:, 3:], cache=cache, logits_to_keep=2).logits
    assert (logits - expected[:, -2:]).abs().max() <= TOLERANCE


@ALL_MODELS
@torch.no_grad()
def test_outputs_as_a_tuple(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(1, 6)
    logits, cache = model(ids, use_cache=True, return_dict=False)[:2]
    assert torch.equal(logits, model(ids).logits) and isinstance(cache, RecurrentCache)
    loss, logits = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (1, 6, 61)


@ALL_MODELS
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_a_cache_with_pending_tokens_is_copied(kind: str, way: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, 12)
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :5], cache=cache)
    model(ids[:, 5:9], cache=cache)
    cache.crop(-2)
    if way == "deepcopy":
        other = copy.deepcopy(cache)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(cache))
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    expected = model(ids).logits[:, 7:]
    assert (model(ids[:, 7:], cache=cache).logits - expected).abs().max() <= TOLERANCE
    # the first one has moved on, the copy has not
    assert other.get_seq_length() == 7
    assert (model(ids[:, 7:], cache=other).logits - expected).abs().max() <= TOLERANCE


@ALL_MODELS
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map(kind: str, place: str, tmp_path) -> None:
    """On one device, and with half the layers on disk, where accelerate swaps `forward` of each leaf module."""
    model = make_model(kind, use_bias=True, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    if place == "cpu":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    else:
        names = [name for name, _ in model.backbone.named_children() if name != "layers"]
        device_map = {f"backbone.{name}": "cpu" for name in names} | {"lm_head": "disk"}
        for index in range(model.config.num_hidden_layers):
            device_map[f"backbone.layers.{index}"] = "disk" if index % 2 == 0 else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert loaded.backbone.layers[0].mixer.in_proj.weight.is_meta
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        assert torch.allclose(
            loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, atol=1e-6
        )
    assert torch.equal(
        loaded.generate(ids, attention_mask=mask, **GREEDY), model.generate(ids, attention_mask=mask, **GREEDY)
    )


@ALL_MODELS
@torch.no_grad()
def test_exported_program(kind: str) -> None:
    """torch.export, with the forward as it is and tensors of the exported shape."""
    model = make_model(kind, num_hidden_layers=2)
    ids = random_ids(2, 7)
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    other = random_ids(2, 7, seed=5)
    assert (program.module()(other, use_cache=False).logits - model(other).logits).abs().max() <= TOLERANCE


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_folder(tmp_path) -> None:
    """`AutoModelForCausalLM` loads base model and adapter from the adapter's folder."""
    make_model("mamba").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj", "dt_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = random_ids(1, 7)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-6)
        assert not torch.allclose(make_model("mamba")(ids).logits, expected, atol=1e-2)
