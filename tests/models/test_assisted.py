"""Assisted and prompt-lookup decoding: candidates are taken back by snapshot and replay, and the tokens are those of greedy."""

import pytest
import torch

from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, random_ids
from .oracles import GREEDY, TOLERANCE, assert_continues, greedy_loop, make_talker, padded

STEPS = 10


def repetitive(seed: int) -> torch.Tensor:
    """A prompt in which prompt lookup finds something to propose."""
    part = random_ids(1, 6, seed=seed)
    return torch.cat([part, random_ids(1, 2, seed=seed + 1), part, part[:, :3]], dim=1)


class CountCrops:
    """Counts by how many tokens the caches were cropped while it is active."""

    def __init__(self, monkeypatch) -> None:
        self.crops: list[int] = []
        original = RecurrentCache.crop

        def crop(cache: RecurrentCache, tokens_to_remove: int) -> None:
            self.crops.append(tokens_to_remove)
            original(cache, tokens_to_remove)

        monkeypatch.setattr(RecurrentCache, "crop", crop)


@ALL_MODELS
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("chunk", [None, 4], ids=["whole", "chunks"])
def test_prompt_lookup_equals_greedy(kind: str, seed: int, chunk: int | None, monkeypatch) -> None:
    model = make_talker(kind, seed=seed)
    ids = repetitive(seed)
    counter = CountCrops(monkeypatch)
    output = assert_continues(
        model, list(ids), ids, STEPS, prompt_lookup_num_tokens=4, max_matching_ngram_size=2, prefill_chunk_size=chunk
    )
    assert any(count < 0 for count in counter.crops), "no candidate was refused, so nothing was tested"
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1


@ALL_MODELS
@pytest.mark.parametrize("assistant_seed", [0, 3], ids=["same", "other"])
@pytest.mark.parametrize("layers", [1, 2], ids=["smaller", "equal"])
def test_assisted_equals_greedy(kind: str, assistant_seed: int, layers: int, monkeypatch) -> None:
    model = make_talker(kind)
    # MoE-Mamba has a recurrent layer in every other place
    scale = 2 if kind == "moe_mamba" else 1
    assistant = make_talker(kind, seed=assistant_seed, num_hidden_layers=layers * scale)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = random_ids(1, 9)
    counter = CountCrops(monkeypatch)
    assert_continues(model, list(ids), ids, STEPS, assistant_model=assistant)
    refused = any(count < 0 for count in counter.crops)
    assert refused or (assistant_seed == 0 and layers == 2)


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_number_of_candidates(schedule: str, tokens: int) -> None:
    model, assistant = make_talker("mamba2"), make_talker("mamba", seed=4)
    assistant.generation_config.num_assistant_tokens = tokens
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = random_ids(1, 7)
    assert_continues(model, list(ids), ids, STEPS, assistant_model=assistant)


def test_more_candidates_than_snapshots(monkeypatch) -> None:
    """The assistant's cache remembers as many forwards as it drafts tokens."""
    model, assistant = make_talker("mamba2"), make_talker("mamba2", seed=4)
    assistant.generation_config.num_assistant_tokens = 80
    assistant.generation_config.eos_token_id = None
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = random_ids(1, 7)

    def enough(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= 10])

    counter = CountCrops(monkeypatch)
    output = model.generate(ids, assistant_model=assistant, max_new_tokens=90, stopping_criteria=[enough], **GREEDY)
    assert torch.equal(output[0, 7:10], greedy_loop(model, ids[0], 3)[0])
    assert min(counter.crops) < -RecurrentCache(model.config).max_snapshots


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("way", ["lookup", "assistant"])
def test_padded_prompts(kind: str, side: str, way: str) -> None:
    model = make_talker(kind, use_bias=True)
    row = repetitive(2)[0]
    ids, mask = padded([row, random_ids(row.shape[0] + 3)], side)
    options = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {"assistant_model": make_talker(kind, seed=6)}
    assert_continues(model, [row], ids[:1], STEPS, attention_mask=mask[:1], **options)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_short_and_long_prompts(length: int) -> None:
    """40 tokens are more than one forward replays; of one token, nothing can be fed in advance."""
    model, assistant = make_talker("mamba"), make_talker("mamba", seed=6)
    ids = random_ids(1, length)
    assert_continues(model, list(ids), ids, STEPS, assistant_model=assistant)
    assert_continues(model, list(ids), ids, STEPS, prompt_lookup_num_tokens=3)


def test_the_prompt_is_read_once(monkeypatch) -> None:
    """Taking candidates back never means to read a long prompt again."""
    model, assistant = make_talker("mamba"), make_talker("mamba", seed=6)
    ids = torch.cat([random_ids(1, 60), repetitive(0)], dim=1)
    fed = {model: 0, assistant: 0}
    for each in (model, assistant):
        each.backbone.norm_f.register_forward_pre_hook(
            lambda module, inputs, each=each: fed.__setitem__(each, fed[each] + inputs[0].shape[1])
        )
    model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4, **GREEDY)
    assert fed[model] < 1.5 * ids.shape[1]
    fed[model] = 0
    model.generate(ids, assistant_model=assistant, max_new_tokens=4, **GREEDY)
    assert fed[model] < 1.8 * ids.shape[1] and fed[assistant] < 2 * ids.shape[1]


@ALL_MODELS
@pytest.mark.parametrize("second", ["greedy", "lookup"])
def test_turns_on_a_cache_left_by_prompt_lookup(kind: str, second: str) -> None:
    model = make_talker(kind)
    sequences, cache = repetitive(3), RecurrentCache(model.config)
    for turn in range(3):
        options = {"prompt_lookup_num_tokens": 4} if turn == 0 or second == "lookup" else {}
        output = assert_continues(
            model,
            list(sequences),
            sequences,
            6,
            cache=cache,
            attention_mask=torch.ones_like(sequences),
            **options,
        )
        assert output.past_key_values is cache and not cache.recording
        sequences = torch.cat([output.sequences, random_ids(1, 3, seed=turn), output.sequences[:, :5]], dim=1)


@ALL_MODELS
def test_eos_within_the_candidates(kind: str) -> None:
    model = make_talker(kind)
    ids = repetitive(4)
    tokens, _ = greedy_loop(model, ids[0], STEPS)
    eos = int(tokens[7])
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": eos}
    expected = tokens[: tokens.tolist().index(eos) + 1]
    for way in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": make_talker(kind)}, {}):
        assert torch.equal(model.generate(ids, **options, **way)[0, ids.shape[1] :], expected)


@ALL_MODELS
def test_sampling_with_an_identical_assistant(kind: str) -> None:
    """Speculative sampling with p = q accepts every candidate."""
    model, assistant = make_talker(kind), make_talker(kind)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = random_ids(1, 9)
    torch.manual_seed(0)
    output = model.generate(
        ids,
        assistant_model=assistant,
        do_sample=True,
        eos_token_id=None,
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        expected = model(output.sequences).logits[0, ids.shape[1] - 1 : -1]
    assert (torch.cat(output.logits) - expected).abs().max().item() <= TOLERANCE


@ALL_MODELS
def test_hidden_states_of_every_token(kind: str) -> None:
    model = make_talker(kind)
    ids = repetitive(1)
    output = model.generate(
        ids,
        prompt_lookup_num_tokens=4,
        max_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_hidden_states=True,
        **GREEDY,
    )
    with torch.no_grad():
        expected = model(output.sequences[:, :-1], output_hidden_states=True).hidden_states
    for layer, states in enumerate(expected):
        actual = torch.cat([step[layer] for step in output.hidden_states], dim=1)
        assert torch.allclose(actual, states, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_and_prompt_lookup(side: str) -> None:
    model = make_talker("falcon_mamba")
    row = repetitive(5)[0]
    ids, mask = padded([row, random_ids(row.shape[0] + 3)], side)
    embeds = model.get_input_embeddings()(ids[:1]).detach()
    options = {"inputs_embeds": embeds, "attention_mask": mask[:1], "prompt_lookup_num_tokens": 3}
    assert_continues(model, [row], None, STEPS, **options)
    with pytest.raises(ValueError, match="not both"):
        model.generate(ids[:1], max_new_tokens=2, **options)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_refused_without_a_cache_that_can_go_back(options: dict) -> None:
    model = make_talker("mamba")
    with pytest.raises((ValueError, RuntimeError), match="cache"):
        model.generate(repetitive(0), prompt_lookup_num_tokens=3, max_new_tokens=3, **options)
