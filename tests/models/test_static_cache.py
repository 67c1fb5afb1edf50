"""`cache_implementation` of every kind, and compiled decode steps."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, make_native, random_ids
from .oracles import GREEDY, TOLERANCE, assert_continues, make_talker, padded

STEPS = 5
ROWS = [random_ids(n, seed=n) for n in (4, 7)]
# compiling takes seconds: as few layers as there are kinds of layers
LAYERS = {"mamba": 1, "mamba2-groups": 1, "moe_mamba": 2}
ACCEPTED = [name for name in ALL_CACHE_IMPLEMENTATIONS if name != "quantized"]


@pytest.fixture
def compiled_calls():
    """Counts graphs that torch.compile makes, without compiling them."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield backend, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ACCEPTED)
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "moe_mamba"])
def test_every_implementation_that_native_accepts(kind: str, implementation: str) -> None:
    model = make_talker(kind)
    prompt, mask = padded(ROWS, "left")
    options = {"attention_mask": mask, "cache_implementation": implementation}
    cache = assert_continues(model, ROWS, prompt, STEPS, **options).past_key_values
    # a recurrent cache is static as it is; "hybrid" is transformers' old name for the default
    own = implementation in ("dynamic", "hybrid")
    assert isinstance(cache, RecurrentCache if own else DynamicCache if implementation == "offloaded" else StaticCache)
    # a second call, with another batch size, starts from nothing
    ids = random_ids(1, 3)
    assert_continues(model, list(ids), ids, STEPS, cache_implementation=implementation)
    if kind != "moe_mamba":
        options |= {"max_new_tokens": STEPS, **GREEDY}
        assert torch.equal(model.generate(prompt, **options), make_native(model).generate(prompt, **options))


@ALL_MODELS
@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_beams_and_chunks_on_stock_caches(kind: str, implementation: str) -> None:
    model = make_talker(kind)
    prompt, mask = padded(ROWS, "right")
    options = {"attention_mask": mask, "max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation=implementation, **options), expected)
    assert_continues(
        model, ROWS, prompt, STEPS, attention_mask=mask, cache_implementation=implementation, prefill_chunk_size=2
    )


def test_implementations_that_make_no_sense_are_refused() -> None:
    model = make_talker("mamba2")
    with pytest.raises(ValueError, match="constant size and none of them"):
        model.generate(random_ids(1, 3), cache_implementation="quantized", max_new_tokens=2)
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate(random_ids(1, 3), cache_implementation="paged", max_new_tokens=2)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(random_ids(1, 3), cache_implementation="nonsense", max_new_tokens=2)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cache_class", [StaticCache, RecurrentCache], ids=["static", "recurrent"])
@torch.no_grad()
def test_one_graph_serves_all_decode_steps(kind: str, cache_class: type, compiled_calls) -> None:
    backend, graphs = compiled_calls
    model = make_talker(kind, num_hidden_layers=LAYERS[kind])
    ids = random_ids(2, 12)
    cache = cache_class(config=model.config, **({"max_cache_len": 32} if cache_class is StaticCache else {}))
    model(ids[:, :5], cache_params=cache)
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    logits, counts = [], []
    for part in ids[:, 5:].split(1, dim=1):
        logits.append(step(part, cache_params=cache).logits)
        counts.append(len(graphs))
    expected = model(ids).logits[:, 5:]
    assert (torch.cat(logits, dim=1) - expected).abs().max().item() <= TOLERANCE
    # the token count of a RecurrentCache turns from a constant into a symbol once
    assert counts[-1] <= (1 if cache_class is StaticCache else 2), counts


@pytest.mark.parametrize("kind", ["falcon_mamba", "mamba2"])
@torch.no_grad()
def test_compiled_prefill_and_steps_with_aot(kind: str) -> None:
    torch._dynamo.reset()
    model = make_talker(kind, num_hidden_layers=1)
    ids = random_ids(2, 8)
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    logits = [step(part, cache_params=cache).logits for part in ids.split([5, 1, 1, 1], dim=1)]
    assert (torch.cat(logits, dim=1) - model(ids).logits).abs().max().item() <= TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", LAYERS)
def test_generate_with_a_compiled_static_step(kind: str, compiled_calls, monkeypatch) -> None:
    """What generate() does by itself on a GPU: compile the decode step for a static cache."""
    backend, graphs = compiled_calls
    model = make_talker(kind, num_hidden_layers=LAYERS[kind])
    prompt, mask = padded(ROWS, "left")
    compiled = torch.compile(model.__call__, fullgraph=True, backend=backend)
    monkeypatch.setattr(model, "get_compiled_call", lambda compile_config: compiled)
    monkeypatch.setattr(
        model, "_valid_auto_compile_criteria", lambda kwargs, config: config.cache_implementation == "static"
    )
    output = model.generate(
        prompt,
        attention_mask=mask,
        cache_implementation="static",
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
        **GREEDY,
    )
    assert len(graphs) == 1
    monkeypatch.undo()
    expected = assert_continues(model, ROWS, prompt, 8, attention_mask=mask)
    assert torch.equal(output.sequences, expected.sequences)
