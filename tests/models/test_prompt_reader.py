"""Prompts of prompt lookup and assisted decoding are read by graphs, with the states of an ordinary forward.

Here without a GPU, what would be captured is called instead; with `-m gpu` the same tests run on real graphs.
"""

from typing import Any

import pytest
import torch

from hf_mamba import RecurrentCache
from hf_mamba.generation import graphs, prompt_graphs

from .builders import ALL_MODELS, random_ids
from .on_graphs import DEVICES, generate, graph_device, stock
from .oracles import GREEDY, TOLERANCE, greedy_loop, make_talker

STEPS = 12

device = pytest.fixture(params=DEVICES)(graph_device)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the graphs that read a prompt, in order."""
    lengths: list[int] = []
    original = prompt_graphs.PromptGraph.read

    def watched(graph: Any, rows: Any) -> None:
        lengths.append(graph.shape.length)
        original(graph, rows)

    monkeypatch.setattr(prompt_graphs.PromptGraph, "read", watched)
    return lengths


def looking_up(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return generate(model, ids, prompt_lookup_num_tokens=4, **{"max_new_tokens": STEPS, **GREEDY, **options})


@ALL_MODELS
def test_from_the_second_prompt_of_a_length_on(device: torch.device, kind: str, read: list[int]) -> None:
    model = make_talker(kind)
    prompts = [random_ids(1, length, seed=length) for length in (9, 15, 14, 40, 38)]
    expected = [greedy_loop(model, ids[0], STEPS)[0] for ids in prompts]
    model.to(device)
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(looking_up(model, ids.to(device))[0, ids.shape[1] :].cpu(), tokens)
    # the last token of a prompt is not part of it: 8, 14 and 13 tokens in the same graph, 39 and 37 in another
    assert read == [16, 16, 48]


def test_the_assistants_prompt_as_well(device: torch.device, read: list[int]) -> None:
    model, assistant = make_talker("mamba2"), make_talker("mamba", seed=1)
    ids = random_ids(1, 11)
    expected = greedy_loop(model, ids[0], STEPS)[0]
    model.to(device), assistant.to(device)
    for _ in range(3):
        result = generate(model, ids.to(device), assistant_model=assistant, max_new_tokens=STEPS, **GREEDY)
        assert torch.equal(result[0, 11:].cpu(), expected)
    assert read == [16] * 4


@ALL_MODELS
def test_goes_on_from_a_cache(device: torch.device, kind: str, read: list[int]) -> None:
    model = make_talker(kind).to(device)
    for attempt in range(2):
        cache = RecurrentCache(model.config)
        text = random_ids(1, 20, seed=attempt).to(device)
        for _ in range(2):
            text = looking_up(model, text, cache=cache)
            with torch.no_grad():
                again = RecurrentCache(model.config)
                model(text[:, :-1], cache=again)
            assert cache.get_seq_length() == text.shape[1] - 1
            for found, wanted in zip(cache.states(), again.states(), strict=True):
                assert all((a - b).abs().max() <= TOLERANCE for a, b in zip(found, wanted, strict=True))
            text = torch.cat([text, random_ids(1, 7, seed=attempt).to(device)], dim=1)
    assert len(read) == 2


def test_padding_in_front(device: torch.device, read: list[int]) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 12).to(device)
    padded = torch.cat([ids.new_zeros(1, 5), ids], dim=1)
    mask = torch.cat([ids.new_zeros(1, 5), torch.ones_like(ids)], dim=1)
    expected = stock(model, ids, max_new_tokens=STEPS, **GREEDY)
    for _ in range(3):
        assert torch.equal(looking_up(model, padded, attention_mask=mask)[:, 5:], expected)
    assert read == [16, 16]


def test_changed_weights_are_read_anew(device: torch.device, read: list[int]) -> None:
    model = make_talker("mamba2").to(device)
    ids = random_ids(1, 10).to(device)
    for _ in range(2):
        looking_up(model, ids)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight.mul_(-1)
    assert torch.equal(looking_up(model, ids), stock(model, ids, max_new_tokens=STEPS, **GREEDY))
    assert len(read) == 2
    # other tensors, so that all graphs are dropped
    model.backbone.layers[0].mixer.in_proj.weight = torch.nn.Parameter(
        model.backbone.layers[0].mixer.in_proj.weight.detach().clone() * 2
    )
    assert torch.equal(looking_up(model, ids), stock(model, ids, max_new_tokens=STEPS, **GREEDY))
    assert len(read) == 2


def test_without_memory_for_a_graph(device: torch.device, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 10).to(device)
    expected = stock(model, ids, max_new_tokens=STEPS, **GREEDY)
    original = prompt_graphs.PromptGraph.__init__

    def exhaust(graph: Any, *args: Any) -> None:
        original(graph, *args)
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(prompt_graphs.PromptGraph, "__init__", exhaust)
    for _ in range(3):
        assert torch.equal(looking_up(model, ids), expected)
    assert not read and graphs.graphs_of(model) is not None
