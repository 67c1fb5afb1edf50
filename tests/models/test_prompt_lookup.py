"""Prompt lookup by CUDA graphs gives the tokens of plain greedy decoding, in fewer steps, and leaves the same states.

Here without a GPU, what would be captured is called instead; with `-m gpu` the same tests run on real graphs.
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList

from hf_mamba import RecurrentCache
from hf_mamba.generation import drafting, graphs, speculative

from .builders import ALL_MODELS, random_ids
from .on_graphs import (
    DEVICES,
    Called,
    Collect,
    assert_goes_on,
    generate,
    graph_device,
    pause_often,
    watch_drafting,
)
from .oracles import GREEDY, TOLERANCE, greedy_loop, make_talker, padded
from .test_assisted import repetitive

STEPS = 20

device = pytest.fixture(params=DEVICES)(graph_device)


def looking_up(model: Any, ids: torch.Tensor, tokens: int = 4, **options: Any) -> Any:
    return generate(model, ids, prompt_lookup_num_tokens=tokens, **{"max_new_tokens": STEPS, **GREEDY, **options})


@ALL_MODELS
@pytest.mark.parametrize("tokens", [1, 4, 15, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_greedy(device: torch.device, kind: str, tokens: int, seed: int) -> None:
    model = make_talker(kind, seed=seed)
    ids = repetitive(seed)
    expected = greedy_loop(model, ids[0], STEPS)[0]
    model.to(device)
    for _ in range(2):
        result = looking_up(model, ids.to(device), tokens)
        assert torch.equal(result[0, : ids.shape[1]].cpu(), ids[0])
        assert torch.equal(result[0, ids.shape[1] :].cpu(), expected)


@ALL_MODELS
def test_fewer_steps_where_the_draft_is_good(device: torch.device, kind: str) -> None:
    """A head that likes one token more than all others says it for ever, which a draft foresees."""
    model = make_talker(kind)
    with torch.no_grad():
        # the same row for all tokens: the first of the largest is chosen
        model.lm_head.weight.copy_(model.lm_head.weight[:1].expand_as(model.lm_head.weight))
    model.to(device)
    ids = random_ids(1, 6).to(device)
    looking_up(model, ids, 7, max_new_tokens=64)
    before = Called.replays
    result = looking_up(model, ids, 7, max_new_tokens=64)
    assert result[0, 6:].tolist() == [0] * 64
    # eight tokens a step once the second zero is there
    assert Called.replays - before <= 64 // 8 + 2 + speculative.RUN_AHEAD


@ALL_MODELS
@pytest.mark.parametrize("steps", [37, 38, 39, 40])
def test_between_drafts_and_plain_steps(
    device: torch.device, kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused drafts mean plain steps for a while; tokens and states are the same wherever it ends."""
    pause_often(monkeypatch)
    model = make_talker(kind)
    ids = repetitive(0)
    expected = greedy_loop(model, ids[0], 40)[0][:steps]
    model.to(device)
    cache = RecurrentCache(model.config)
    result = looking_up(model, ids.to(device), cache=cache, max_new_tokens=steps)
    assert torch.equal(result[0, ids.shape[1] :].cpu(), expected)
    assert_goes_on(model, cache, result)


def test_bad_drafts_are_given_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = watch_drafting(monkeypatch)
    monkeypatch.setattr(drafting.LookupDrafter, "draft", lambda drafter: drafter.text.ids[0, 1:].zero_())
    model = make_talker("mamba").to(device)
    looking_up(model, random_ids(1, 9).to(device), max_new_tokens=200)
    assert drafted.count(True) < 40 and drafted.count(False) > 120


@ALL_MODELS
@pytest.mark.parametrize("stop", ["length", "eos"])
def test_states_are_handed_back(device: torch.device, kind: str, stop: str) -> None:
    model = make_talker(kind)
    ids = repetitive(2)
    tokens = greedy_loop(model, ids[0], STEPS)[0].tolist()
    eos = None if stop == "length" else tokens[9]
    count = STEPS if eos is None else tokens.index(eos) + 1
    model.to(device)
    cache = RecurrentCache(model.config)
    result = looking_up(model, ids.to(device), cache=cache, eos_token_id=eos, return_dict_in_generate=True)
    sequence = torch.cat([ids[0], torch.tensor(tokens[:count])])
    assert torch.equal(result.sequences[0].cpu(), sequence) and result.past_key_values is cache
    assert_goes_on(model, cache, sequence[None])


@ALL_MODELS
def test_turns_of_a_conversation(device: torch.device, kind: str) -> None:
    model = make_talker(kind)
    cache, sequence = RecurrentCache(model.config), repetitive(3)
    for turn in range(3):
        expected = greedy_loop(model.cpu(), sequence[0], 8)[0]
        mask = torch.ones_like(sequence).to(device)
        model.to(device)
        result = looking_up(model, sequence.to(device), cache=cache, attention_mask=mask, max_new_tokens=8).cpu()
        assert torch.equal(result[0, sequence.shape[1] :], expected)
        sequence = torch.cat([result, random_ids(1, 3, seed=turn), result[:, :5]], dim=1)


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "middle"])
def test_padded_prompts(device: torch.device, kind: str, side: str) -> None:
    model = make_talker(kind, use_bias=True)
    row = repetitive(2)[0]
    ids, mask = (t[:1].to(device) for t in padded([row, random_ids(row.shape[0] + 3)], side))
    expected = greedy_loop(model, row, STEPS)[0]
    result = looking_up(model.to(device), ids, attention_mask=mask)
    assert torch.equal(result[0, ids.shape[1] :].cpu(), expected)


@pytest.mark.parametrize("length", [2, 3, 40])
@pytest.mark.parametrize("longest", [1, 3, 9])
def test_lengths_of_prompt_and_match(device: torch.device, length: int, longest: int) -> None:
    model = make_talker("mamba2")
    ids = random_ids(1, length)
    expected = greedy_loop(model, ids[0], STEPS)[0]
    result = looking_up(model.to(device), ids.to(device), max_matching_ngram_size=longest)
    assert torch.equal(result[0, length:].cpu(), expected)


def test_ids_that_are_not_in_the_vocabulary_are_never_drafted(device: torch.device) -> None:
    """A text that matches nowhere, a buffer that is reused after a longer text, a prompt of one token over and over."""
    model = make_talker("mamba").to(device)
    looking_up(model, random_ids(1, 90).to(device))
    step = next(iter(speculative._steps[graphs.graphs_of(model)].values()))
    for ids in (torch.arange(3, 9)[None], torch.full((1, 5), 4), torch.tensor([[5, 6]])):
        looking_up(model, ids.to(device))
        assert 0 <= int(step.text.ids.min()) and int(step.text.ids.max()) < model.config.vocab_size


def test_the_draft_is_what_followed_the_same_tokens(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    looking_up(model, random_ids(1, 9).to(device), tokens=3)
    step = next(iter(speculative._steps[graphs.graphs_of(model)].values()))

    def draft(*text: int) -> list[int]:
        ids = torch.tensor([text], device=device)
        cache = RecurrentCache(model.config)
        with torch.no_grad():
            model(ids[:, :-1], cache=cache)
            step.begin(ids, cache)
            step.drafter.draft()
        return step.text.ids[0].tolist()

    # the longer match before the later one
    assert draft(5, 6, 7, 8, 9, 6, 10, 5, 6) == [6, 7, 8, 9]
    # of two equally long ones the later
    assert draft(5, 6, 7, 5, 6, 8, 9, 5, 6) == [6, 8, 9, 5]
    # periodic beyond the end
    assert draft(3, 4, 3, 4) == [4, 3, 4, 3]


@pytest.mark.parametrize(("tokens", "drafted"), [(1, 1), (3, 3), (15, 15), (40, 15)])
def test_how_many_tokens_are_drafted(device: torch.device, tokens: int, drafted: int) -> None:
    model = make_talker("mamba").to(device)
    looking_up(model, repetitive(0).to(device), tokens)
    (step,) = speculative._steps[graphs.graphs_of(model)].values()
    assert step.tokens == drafted + 1


def test_streamer(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    streamer = Collect()
    result = looking_up(model, repetitive(0).to(device), streamer=streamer)
    assert streamer.tokens == result[0].tolist() and streamer.ended


def test_changed_weights_are_seen(device: torch.device) -> None:
    """In place, and by another tensor: never a stale graph."""
    model = make_talker("mamba").to(device)
    ids = repetitive(0).to(device)
    looking_up(model, ids)
    for change in (lambda p: p.data.mul_(-1.0), lambda p: setattr(p, "data", p.data.clone().mul_(0.5))):
        change(model.backbone.layers[0].mixer.out_proj.weight)
        expected = model.generate(ids, max_new_tokens=STEPS, **GREEDY)
        assert torch.equal(looking_up(model, ids), expected)


class Double(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return 2 * scores


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"logits_processor": LogitsProcessorList([Double()])},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(100.0)])},
        {"return_dict_in_generate": True, "output_logits": True},
        {"return_dict_in_generate": True, "output_hidden_states": True},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_left_to_the_stock_loop(device: torch.device, options: dict[str, Any]) -> None:
    model = make_talker("mamba").to(device)
    looking_up(model, repetitive(0).to(device), replayed=False, **options)


def test_adapters_are_left_to_the_stock_loop(device: torch.device) -> None:
    """They have to be called as modules; the capture finds out, is not tried again, and nothing is lost."""
    config = LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(make_talker("mamba"), config).eval().to(device)
    ids = repetitive(0).to(device)
    expected = model.generate(input_ids=ids, max_new_tokens=STEPS, disable_compile=True, **GREEDY)
    for _ in range(2):
        result = generate(
            model, input_ids=ids, prompt_lookup_num_tokens=4, max_new_tokens=STEPS, replayed=False, **GREEDY
        )
        assert torch.equal(result, expected)


def test_memory_is_bounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_talker("mamba").to(device)
    for tokens in (2, 3, 4, 5):
        looking_up(model, repetitive(0).to(device), tokens)
    steps = speculative._steps[graphs.graphs_of(model)]
    assert len(steps) == speculative.MAX_STEPS
    monkeypatch.setattr(graphs, "device_memory", lambda device: 0)
    looking_up(model, repetitive(0).to(device), 6)
    assert len(steps) == 1


@ALL_MODELS
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_stock_loop_goes_back_without_replay(kind: str, count: int) -> None:
    """A few tokens fed while recording, and some of them taken back."""
    model = make_talker(kind)
    ids = random_ids(2, 12)
    cache = RecurrentCache(model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        cache.activate_past_recording()
        fed = model(ids[:, 5:9], cache=cache).logits
        cache.crop(-count)
        assert cache.pending_length == 0 and cache.get_seq_length() == 9 - count
        again = model(ids[:, 9 - count :], cache=cache).logits
        expected = model(ids, use_cache=False).logits
    assert (fed - expected[:, 5:9]).abs().max().item() <= TOLERANCE
    assert (again - expected[:, 9 - count :]).abs().max().item() <= TOLERANCE
