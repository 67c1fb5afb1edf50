"""What transformers' native classes get wrong about outputs, norms, memory and compilation, right here.

The numbers are those of the list of native defects.
"""

import pytest
import torch
from torch import nn
from transformers import StaticCache

from hf_mamba import RecurrentCache
from hf_mamba.layers import GatedRMSNorm, SSDMixer

from .builders import ALL_MODELS, make_model, random_ids

TOLERANCE = 1e-5


@ALL_MODELS
@torch.no_grad()
def test_defect_08_hidden_states_convention(kind: str) -> None:
    """Native `hidden_states[0]` is layer 1's output, and the embeddings are missing."""
    model = make_model(kind)
    ids = random_ids(2, 9)
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in model.backbone.layers
    ]
    output = model.backbone(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    layers = model.config.num_hidden_layers
    assert len(output.hidden_states) == layers + 1 == len(outputs) + 1
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    for hidden_states, expected in zip(output.hidden_states[1:-1], outputs[:-1], strict=True):
        assert torch.equal(hidden_states, expected)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    # nothing else is computed on the way to the logits
    logits = model(ids, output_hidden_states=True)
    assert torch.equal(logits.logits, model.lm_head(logits.hidden_states[-1]).float())


@ALL_MODELS
@torch.no_grad()
def test_defect_08_hidden_states_with_padding_and_a_cache(kind: str) -> None:
    """They stand where the tokens stand, and over a cache there is one for each new token."""
    model = make_model(kind)
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[1:, 3:], output_hidden_states=True).hidden_states
    for hidden_states, expected in zip(padded, alone, strict=True):
        assert (hidden_states[1, 3:] - expected[0]).abs().max() <= TOLERANCE
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    model(ids[:1, :6], cache=cache)
    cache.crop(-2)
    whole = model(ids[:1, :7], output_hidden_states=True).hidden_states
    step = model(ids[:1, 4:7], cache=cache, output_hidden_states=True).hidden_states
    for hidden_states, expected in zip(step, whole, strict=True):
        assert hidden_states.shape == (1, 3, model.config.hidden_size)
        assert (hidden_states - expected[:, 4:]).abs().max() <= TOLERANCE


@ALL_MODELS
def test_defect_08_hidden_states_of_generate(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(1, 5)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        expected = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    for index, layer in enumerate(expected):
        actual = torch.cat([step[index] for step in output.hidden_states], dim=1)
        assert (actual - layer).abs().max() <= TOLERANCE


@ALL_MODELS
def test_defect_09_attentions_are_refused(kind: str) -> None:
    """Native generate() dies with an AttributeError."""
    model = make_model(kind)
    ids = random_ids(1, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"no attention weights.*drop `output_attentions=True`"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"no attention weights.*drop `output_attentions=True`"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **options)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"no attention weights.*output_attentions"):
        model(ids)


@pytest.mark.parametrize(
    "options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}], ids=["contrastive", "dola"]
)
def test_defect_09_contrastive_and_dola_ask_for_their_hub_code(options: dict) -> None:
    """transformers moved both to Hub repositories, for every model: they need `trust_remote_code` and a network."""
    model = make_model("mamba")
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, **options)


def saved_bytes(model, length: int) -> int:
    """Bytes that autograd keeps between forward and backward for one row of `length` tokens, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = random_ids(1, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids).loss.backward()
    return sum(storages.values())


def graph_nodes(model, length: int) -> int:
    """Nodes of the autograd graph."""
    ids = random_ids(1, length)
    seen, queue = set(), [model(ids, labels=ids).loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return len(seen)


@ALL_MODELS
def test_defect_13_training_is_linear_in_the_length(kind: str) -> None:
    """Without kernels, the native Mamba loop saves and sums whole sequences once for each token: quadratic in L."""
    model = make_model(kind).train()
    base = saved_bytes(model, 256)
    assert saved_bytes(model, 512) <= 2.05 * base
    assert saved_bytes(model, 1024) <= 4.15 * base
    # and the graph does not depend on the length at all: there is no loop over tokens in it
    assert graph_nodes(model, 512) == graph_nodes(model, 256)


def compiled_model(kind: str):
    """The fewest layers that hold every kind of layer: compiling takes seconds each."""
    model = make_model(kind, num_hidden_layers=2 if kind == "moe_mamba" else 1)
    assert model._can_compile_fullgraph
    torch._dynamo.reset()
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])
def test_defect_20_prefill_compiles_in_one_graph(kind: str) -> None:
    """Native Mamba and Falcon-Mamba declare that they do not (`_can_compile_fullgraph`)."""
    model, compiled = compiled_model(kind)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask).logits
    assert (logits - expected)[mask.bool()].abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "moe_mamba"])
@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticCache])
@torch.no_grad()
def test_defect_20_decoding_step_compiles_in_one_graph(kind: str, cache_class: type) -> None:
    """On our own cache and on the one that `cache_implementation="static"` makes; a new token compiles nothing new."""
    model, step = compiled_model(kind)
    options = {"max_cache_len": 32} if cache_class is StaticCache else {}
    ids = random_ids(2, 10)
    expected = model(ids).logits
    cache = cache_class(config=model.config, **options)
    model(ids[:, :5], cache_params=cache)
    for position in range(5, 10):
        # the number of tokens seen is a constant of the first graph and a variable of the second
        if position == 7:
            torch.compiler.set_stance("fail_on_recompile")
        try:
            logits = step(ids[:, [position]], cache_params=cache).logits
        finally:
            torch.compiler.set_stance("default")
        assert (logits[:, 0] - expected[:, position]).abs().max() <= TOLERANCE


def test_defect_22_gated_norm_is_grouped() -> None:
    """Up to transformers 5.22, native Mamba-2 normalises over all channels at once whatever `n_groups` says."""
    torch.manual_seed(0)
    norm = GatedRMSNorm(24, group_size=6, eps=1e-5)
    nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    expected = torch.empty(2, 5, 24, dtype=torch.float64)
    gated = x.double() * z.double() / (1 + torch.exp(-z.double()))
    for group in range(4):
        channels = slice(6 * group, 6 * group + 6)
        scale = (gated[..., channels].pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        expected[..., channels] = gated[..., channels] / scale * norm.weight[channels].double()
    assert (norm(x, z) - expected).abs().max() <= 2e-6


def test_defect_22_mixer_normalises_each_group() -> None:
    """Scaling the channels of one group of the mixer's inner output leaves the other groups as they were."""
    model = make_model("mamba2-groups")
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, SSDMixer) and mixer.norm.group_size == mixer.intermediate_size // 8
    seen: dict[str, torch.Tensor] = {}
    mixer.norm.register_forward_hook(lambda module, args, output: seen.update(x=args[0], z=args[1], out=output))
    with torch.no_grad():
        model(random_ids(2, 6))
    groups = (seen["x"].double() * nn.functional.silu(seen["z"].double())).unflatten(-1, (8, -1))
    expected = groups * torch.rsqrt(groups.pow(2).mean(dim=-1, keepdim=True) + model.config.layer_norm_epsilon)
    expected = expected.flatten(-2) * mixer.norm.weight.double()
    assert (seen["out"] - expected).abs().max() <= 1e-5
