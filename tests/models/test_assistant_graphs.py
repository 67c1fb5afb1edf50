"""Assisted decoding by CUDA graphs gives the tokens of plain greedy decoding, in fewer steps, and leaves the same states.

Here without a GPU, what would be captured is called instead; with `-m gpu` the same tests run on real graphs.
"""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MaxTimeCriteria, StoppingCriteriaList

from hf_mamba import RecurrentCache
from hf_mamba.generation import graphs, speculative

from .builders import ALL_MODELS, random_ids
from .on_graphs import (
    DEVICES,
    Called,
    Collect,
    assert_goes_on,
    generate,
    graph_device,
    pause_often,
    stock,
    watch_drafting,
)
from .oracles import GREEDY, greedy_loop, make_talker, padded

STEPS = 20

device = pytest.fixture(params=DEVICES)(graph_device)


def make_pair(
    kind: str, device: torch.device, draft: str = "same", tokens: int = 4, noise: float = 3e-2
) -> tuple[Any, Any]:
    """A model and an assistant that is right always, seldom or in between, the less often the more `noise`."""
    model = make_talker(kind)
    assistant = make_talker(kind, seed=0 if draft != "other" else 3)
    if draft == "near":
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * noise)
    assistant.generation_config.num_assistant_tokens = tokens
    return model.to(device), assistant.to(device)


def assisted(model: Any, assistant: Any, ids: torch.Tensor, **options: Any) -> Any:
    return generate(model, ids, assistant_model=assistant, **{"max_new_tokens": STEPS, **GREEDY, **options})


def steps_of(model: Any) -> Any:
    return speculative._steps[graphs.graphs_of(model)]


@ALL_MODELS
@pytest.mark.parametrize("draft", ["same", "near", "other"])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_equals_greedy(device: torch.device, kind: str, draft: str, tokens: int) -> None:
    ids = random_ids(1, 9)
    expected = greedy_loop(make_talker(kind), ids[0], STEPS)[0]
    model, assistant = make_pair(kind, device, draft, tokens)
    for _ in range(2):
        result = assisted(model, assistant, ids.to(device))
        assert torch.equal(result[0, : ids.shape[1]].cpu(), ids[0])
        assert torch.equal(result[0, ids.shape[1] :].cpu(), expected)


@pytest.mark.parametrize("assistant_kind", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_an_assistant_of_another_type(device: torch.device, kind: str, assistant_kind: str) -> None:
    ids = random_ids(1, 9)
    expected = greedy_loop(make_talker(kind), ids[0], STEPS)[0]
    model, assistant = make_talker(kind).to(device), make_talker(assistant_kind, seed=2).to(device)
    assert torch.equal(assisted(model, assistant, ids.to(device))[0, 9:].cpu(), expected)


@ALL_MODELS
@pytest.mark.parametrize("steps", [64, 61])
def test_fewer_steps_where_the_draft_is_good(device: torch.device, kind: str, steps: int) -> None:
    """Eight tokens a step, wherever the last one ends."""
    model, assistant = make_pair(kind, device, tokens=7)
    ids = random_ids(1, 6).to(device)
    expected = greedy_loop(make_talker(kind), ids[0].cpu(), steps)[0]
    assisted(model, assistant, ids, max_new_tokens=steps)
    before = Called.replays
    result = assisted(model, assistant, ids, max_new_tokens=steps)
    assert torch.equal(result[0, 6:].cpu(), expected)
    assert Called.replays - before == 8


@ALL_MODELS
def test_states_of_the_assistant_are_rolled_back(device: torch.device, kind: str) -> None:
    """Wherever a draft is refused, the next one is what the assistant says after the text as it is."""
    counts = []
    # weights differ between versions of torch, and with them how often an assistant of some noise is right
    for noise in (1e-2, 3e-2, 1e-1, 3e-1):
        model, assistant = make_pair(kind, device, "near", noise=noise)
        ids = random_ids(1, 9).to(device)
        result = assisted(model, assistant, ids, max_new_tokens=STEPS)
        assert result.shape[1] == 9 + STEPS
        step = next(iter(steps_of(model).values()))
        with torch.no_grad():
            cache, prompt = RecurrentCache(model.config), RecurrentCache(assistant.config)
            model(ids[:, :-1], cache=cache)
            assistant(ids[:, :-1], cache=prompt)
            step.begin(ids, cache, prompt)
            for _ in range(6):
                length = int(step.text.length)
                expected = step.text.tokens[:length].cpu()
                step.drafted.replay()
                for _ in range(4):
                    said = assistant(expected[None].to(device), use_cache=False).logits[0, -1].argmax()
                    expected = torch.cat([expected, said.cpu()[None]])
                assert torch.equal(step.text.ids[0, 1:].cpu(), expected[length:])
                counts.append(int(step.report[0]))
    assert min(counts) < 4 and max(counts) > 0, counts


@ALL_MODELS
@pytest.mark.parametrize("steps", [37, 38, 40])
def test_between_drafts_and_plain_steps(
    device: torch.device, kind: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused drafts mean plain steps for a while, after which the assistant reads what it has not seen."""
    pause_often(monkeypatch)
    counts: list[int] = []
    original = speculative._Pace.judge
    monkeypatch.setattr(
        speculative._Pace, "judge", lambda pace, accepted: (counts.append(accepted), original(pace, accepted))[1]
    )
    model, assistant = make_pair(kind, device, tokens=2)
    ids = random_ids(1, 9)
    expected = greedy_loop(make_talker(kind), ids[0], 40)[0][:steps]
    cache = RecurrentCache(model.config)
    result = assisted(model, assistant, ids.to(device), cache=cache, max_new_tokens=steps)
    assert torch.equal(result[0, 9:].cpu(), expected)
    # the assistant still is the same model, so all that it drafts is right
    assert len(counts) > 4 and set(counts) == {2}
    assert_goes_on(model, cache, result)


def test_bad_drafts_are_given_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = watch_drafting(monkeypatch)
    model, assistant = make_pair("mamba", device, "other")
    assisted(model, assistant, random_ids(1, 9).to(device), max_new_tokens=200)
    assert drafted.count(True) < 40 and drafted.count(False) > 120


def test_what_drafts_have_to_pay() -> None:
    def pay(cost: float, tokens: int) -> int:
        return speculative._Pace(tokens, cost).enough

    # of 4 drafts: text costs nothing; a quarter of the main model, 16 times, is four tokens a draft; and no more than there are
    assert pay(0.0, 16) == 4 and pay(4.0, 16) == 16 and pay(16.0, 16) == 60


@ALL_MODELS
@pytest.mark.parametrize("stop", ["length", "eos"])
@pytest.mark.parametrize("draft", ["same", "other"])
def test_states_are_handed_back(device: torch.device, kind: str, stop: str, draft: str) -> None:
    ids = random_ids(1, 9)
    tokens = greedy_loop(make_talker(kind), ids[0], STEPS)[0].tolist()
    eos = None if stop == "length" else tokens[7]
    count = STEPS if eos is None else tokens.index(eos) + 1
    model, assistant = make_pair(kind, device, draft)
    cache = RecurrentCache(model.config)
    result = assisted(model, assistant, ids.to(device), cache=cache, eos_token_id=eos, return_dict_in_generate=True)
    sequence = torch.cat([ids[0], torch.tensor(tokens[:count])])
    assert torch.equal(result.sequences[0].cpu(), sequence) and result.past_key_values is cache
    assert_goes_on(model, cache, sequence[None])


def test_turns_of_a_conversation(device: torch.device) -> None:
    """A cache that has seen a part of the text; the assistant has none and reads all of it."""
    model, assistant = make_pair("mamba2", device)
    cache, sequence = RecurrentCache(model.config), random_ids(1, 9)
    for turn in range(3):
        expected = greedy_loop(make_talker("mamba2"), sequence[0], 8)[0]
        mask = torch.ones_like(sequence).to(device)
        before = Called.replays
        result = assisted(
            model, assistant, sequence.to(device), cache=cache, attention_mask=mask, max_new_tokens=8
        ).cpu()
        assert torch.equal(result[0, sequence.shape[1] :], expected)
        assert turn == 0 or Called.replays - before == 2
        sequence = torch.cat([result, random_ids(1, 3, seed=turn)], dim=1)


@pytest.mark.parametrize("side", ["left", "middle", "right"])
def test_padded_prompts(device: torch.device, side: str) -> None:
    model, assistant = make_pair("mamba", device)
    row = random_ids(7)
    ids, mask = (t[:1].to(device) for t in padded([row, random_ids(10)], side))
    expected = greedy_loop(make_talker("mamba"), row, STEPS)[0]
    result = assisted(model, assistant, ids, attention_mask=mask, replayed=side != "right")
    assert torch.equal(result[0, 10:].cpu(), expected)


@pytest.mark.parametrize("length", [2, 3, 40])
def test_lengths_of_the_prompt(device: torch.device, length: int) -> None:
    model, assistant = make_pair("mamba2", device)
    ids = random_ids(1, length)
    expected = greedy_loop(make_talker("mamba2"), ids[0], STEPS)[0]
    assert torch.equal(assisted(model, assistant, ids.to(device))[0, length:].cpu(), expected)


def test_the_model_as_its_own_assistant(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 9).to(device)
    expected = greedy_loop(make_talker("mamba"), ids[0].cpu(), STEPS)[0]
    assert torch.equal(assisted(model, model, ids, num_assistant_tokens=6)[0, 9:].cpu(), expected)
    assert next(iter(steps_of(model).values())).tokens == 7


@pytest.mark.parametrize(
    ("own", "given", "drafted"),
    [(None, None, 15), (None, 6, 6), (3, 6, 3), (3, None, 3), (40, None, 15), (None, 40, 15)],
)
def test_how_many_tokens_are_drafted(device: torch.device, own: int | None, given: int | None, drafted: int) -> None:
    """The assistant's own number, which is all that transformers' loop looks at, else that of the call; no more than 15."""
    model, assistant = make_pair("mamba", device)
    assistant.generation_config.num_assistant_tokens = own
    assisted(
        model, assistant, random_ids(1, 9).to(device), **({} if given is None else {"num_assistant_tokens": given})
    )
    assert next(iter(steps_of(model).values())).tokens == drafted + 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_assistant_tokens_schedule": "constant"},
        {"num_assistant_tokens_schedule": "heuristic"},
        {"num_assistant_tokens_schedule": "heuristic_transient"},
        {"assistant_confidence_threshold": 0.9},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_what_changes_the_length_of_drafts_is_for_the_stock_loop(
    device: torch.device, options: dict[str, Any]
) -> None:
    """Graphs draft as many tokens every time; the assistant's own options are not written to either."""
    model, assistant = make_pair("mamba", device, "near", tokens=4)
    assistant.generation_config.update(**options)
    ids = random_ids(1, 9)
    expected = greedy_loop(make_talker("mamba"), ids[0], STEPS)[0]
    for _ in range(2):
        assert torch.equal(assisted(model, assistant, ids.to(device))[0, 9:].cpu(), expected)
    assert [step.tokens for step in steps_of(model).values()] == [5]
    assert assistant.generation_config.num_assistant_tokens == 4


def test_streamer(device: torch.device) -> None:
    model, assistant = make_pair("mamba", device)
    streamer = Collect()
    result = assisted(model, assistant, random_ids(1, 9).to(device), streamer=streamer)
    assert streamer.tokens == result[0].tolist() and streamer.ended


@pytest.mark.parametrize("changed", ["model", "assistant"])
def test_changed_weights_are_seen(device: torch.device, changed: str) -> None:
    """In place, and by another tensor: never a stale graph of either."""
    model, assistant = make_pair("mamba", device)
    ids = random_ids(1, 9).to(device)
    assisted(model, assistant, ids)
    for change in (lambda p: p.data.mul_(-1.0), lambda p: setattr(p, "data", p.data.clone().mul_(0.5))):
        change((model if changed == "model" else assistant).backbone.layers[0].mixer.out_proj.weight)
        expected = model.generate(ids, max_new_tokens=STEPS, **GREEDY)
        assert torch.equal(assisted(model, assistant, ids), expected)


def test_a_changed_assistant_drafts_anew(device: torch.device) -> None:
    """That tokens are right says nothing of the drafts: number of steps with an assistant that has become right."""
    model, assistant = make_pair("mamba", device, "other", tokens=3)
    ids = random_ids(1, 9).to(device)
    assisted(model, assistant, ids)
    stale = next(iter(steps_of(model).values()))
    for own, given in zip(assistant.parameters(), model.parameters(), strict=True):
        own.data = given.data.clone()
    gc.collect()
    # the model's own watch takes notice of nothing
    assisted(model, assistant, ids)
    before = Called.replays
    assisted(model, assistant, ids)
    assert Called.replays - before == STEPS // 4
    # what there was of the assistant as it was is gone
    assert len(steps_of(model)) == 1 and stale not in steps_of(model).values()


def test_assistants_in_turn(device: torch.device) -> None:
    """Each has a step of its own, and a copy of an assistant is not that assistant."""
    model, good = make_pair("mamba", device, tokens=3)
    bad, copied = make_talker("mamba", seed=3).to(device), copy.deepcopy(good)
    bad.generation_config.num_assistant_tokens = 3
    ids = random_ids(1, 9).to(device)
    expected = model.generate(ids, max_new_tokens=STEPS, **GREEDY)
    for assistant in (good, bad, good, copied, bad):
        assert torch.equal(assisted(model, assistant, ids), expected)
    assert len(steps_of(model)) == speculative.MAX_STEPS
    replays = []
    for assistant in (copied, bad, copied):
        before = Called.replays
        assisted(model, assistant, ids)
        replays.append(Called.replays - before)
    assert replays[0] == replays[2] == STEPS // 4 < replays[1]


def test_an_assistant_is_not_kept(device: torch.device) -> None:
    model, assistant = make_pair("mamba", device)
    ids = random_ids(1, 9).to(device)
    assisted(model, assistant, ids)
    reference = weakref.ref(assistant)
    del assistant
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    "options",
    [
        {"disable_compile": True},
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(100.0)])},
        {"return_dict_in_generate": True, "output_logits": True},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"assistant_ensemble_weight": 0.5},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_left_to_the_stock_loop(device: torch.device, options: dict[str, Any]) -> None:
    model, assistant = make_pair("mamba", device)
    assisted(model, assistant, random_ids(1, 9).to(device), replayed=False, **options)


def test_switched_off(device: torch.device) -> None:
    model, assistant = make_pair("mamba", device)
    ids = random_ids(1, 9).to(device)
    expected = greedy_loop(make_talker("mamba"), ids[0].cpu(), STEPS)[0]
    result = stock(model, ids, assistant_model=assistant, max_new_tokens=STEPS, **GREEDY)
    assert torch.equal(result[0, 9:].cpu(), expected)


@pytest.mark.parametrize("reason", ["foreign", "training", "hook", "adapter"])
def test_assistants_that_graphs_do_not_take(device: torch.device, reason: str) -> None:
    model, assistant = make_pair("mamba", device)
    if reason == "foreign":
        config = GPTNeoXConfig(
            vocab_size=model.config.vocab_size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
        assistant = GPTNeoXForCausalLM(config).eval().to(device)
    elif reason == "training":
        assistant.train()
    elif reason == "hook":
        assistant.backbone.norm_f.register_forward_hook(lambda *_: None)
    else:
        assistant = get_peft_model(assistant, LoraConfig(target_modules=["in_proj"], r=2)).eval().to(device)
    ids = random_ids(1, 9).to(device)
    expected = greedy_loop(make_talker("mamba"), ids[0].cpu(), STEPS)[0]
    result = assisted(model, assistant, ids, replayed=False)
    assert torch.equal(result[0, 9:].cpu(), expected)


def test_adapters_of_the_assistant(device: torch.device) -> None:
    """They are called as modules, in graphs as well; whether they are switched on is seen."""
    model, assistant = make_pair("mamba", device, tokens=3)
    adapted = get_peft_model(assistant, LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in adapted.to(device).named_parameters():
            if "lora" in name:
                parameter.mul_(10.0)
    ids = random_ids(1, 9).to(device)
    expected = greedy_loop(make_talker("mamba"), ids[0].cpu(), STEPS)[0]

    def replays() -> int:
        before = Called.replays
        result = assisted(model, adapted.get_base_model(), ids)
        assert torch.equal(result[0, 9:].cpu(), expected)
        return Called.replays - before

    replays()
    adapted_replays = replays()
    with adapted.disable_adapter():
        replays()
        assert replays() == STEPS // 4 < adapted_replays
    assert replays() > STEPS // 4


def test_a_batch_is_refused_as_ever(device: torch.device) -> None:
    model, assistant = make_pair("mamba", device)
    with pytest.raises(ValueError, match="batch"):
        model.generate(random_ids(2, 9).to(device), assistant_model=assistant, max_new_tokens=STEPS, **GREEDY)
