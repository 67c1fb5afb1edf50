"""What transformers' native classes get wrong around the cache and in generate(), right here.

The numbers are those of the list of native defects; each docstring says what the native classes do. Every model kind is
compared with its own forward over the whole sequence at once.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_mamba import RecurrentCache
from hf_mamba.cache import MAX_REPLAY

from .builders import ALL_MODELS, make_model, random_ids

TOLERANCE = 1e-5
GREEDY = {"do_sample": False, "eos_token_id": None}
# with tied embeddings, a random model repeats its last token for ever
TALKATIVE = {"tie_word_embeddings": False}


@torch.no_grad()
def all_logits(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= TOLERANCE


def assert_same_states(cache, other, row: int | slice = slice(None), other_row: int | slice = slice(None)) -> None:
    """Every state of `cache` equals that of `other`."""
    compared = 0
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        if not getattr(expected, "has_previous_state", [False])[0]:
            continue
        compared += 1
        assert_close(layer.conv_states[0][row], expected.conv_states[0][other_row])
        assert_close(layer.recurrent_states[0][row], expected.recurrent_states[0][other_row])
    assert compared


@torch.no_grad()
def filled_cache(model, ids: torch.Tensor, recording: bool = False, **kwargs) -> RecurrentCache:
    cache = RecurrentCache(model.config)
    if recording:
        cache.activate_past_recording()
    model(ids, cache=cache, **kwargs)
    return cache


@ALL_MODELS
@pytest.mark.parametrize("cache_class", [RecurrentCache, DynamicCache])
@torch.no_grad()
def test_defect_01_state_kept_over_multi_token_continuation(kind: str, cache_class) -> None:
    """Native Mamba and Falcon-Mamba drop the SSM state when more than one token is fed over a cache."""
    model = make_model(kind)
    ids = random_ids(2, 19)
    cache = cache_class(config=model.config)
    logits = [model(part, cache_params=cache).logits for part in ids.split([6, 5, 1, 2, 1, 4], dim=1)]
    assert_close(torch.cat(logits, dim=1), all_logits(model, ids))
    assert_same_states(cache, filled_cache(model, ids))


@ALL_MODELS
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_defect_02_full_sequence_over_a_returned_cache(kind: str, name: str) -> None:
    """Native generate() returns `past_key_values`, refuses it as an argument, and counts the prompt twice as `cache_params`."""
    model = make_model(kind, **TALKATIVE)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    cache = first.past_key_values
    assert isinstance(cache, RecurrentCache) and cache.get_seq_length() == 13
    turn = torch.cat([first.sequences, random_ids(2, 4, seed=7)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, turn.shape[1] - mask.shape[1]), value=1)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
        **GREEDY,
    }
    again = model.generate(turn, **{name: cache}, **options)
    fresh = model.generate(turn, **options)
    assert torch.equal(again.sequences, fresh.sequences)
    for logits, expected in zip(again.logits, fresh.logits, strict=True):
        assert_close(logits, expected)
    assert again.past_key_values is cache and cache.get_seq_length() == turn.shape[1] + 5


@ALL_MODELS
def test_defect_02_a_cache_that_has_seen_everything_is_refused(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match="has seen 6 tokens"):
        model.generate(ids, attention_mask=torch.ones_like(ids), cache=filled_cache(model, ids), max_new_tokens=2)


@ALL_MODELS
@torch.no_grad()
def test_defect_03_full_length_mask_on_a_step(kind: str) -> None:
    """Native Mamba and Falcon-Mamba broadcast the mask of the whole sequence over the one new token."""
    model = make_model(kind, use_bias=True)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = [all_logits(model, ids[:1])[0], all_logits(model, ids[1:, 4:])[0]]
    cache = filled_cache(model, ids[:, :7], attention_mask=mask[:, :7])
    for start, stop in ((7, 8), (8, 10), (10, 11)):
        logits = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits
        assert_close(logits[0], expected[0][start:stop])
        assert_close(logits[1], expected[1][start - 4 : stop - 4])
    # the mask of the new token alone says the same
    logits = model(ids[:, 11:], attention_mask=mask[:, 11:], cache=cache).logits
    assert_close(logits[:, 0], torch.stack([expected[0][11], expected[1][7]]))


@ALL_MODELS
@torch.no_grad()
def test_defect_05_right_padded_prefill_leaves_the_right_cache(kind: str) -> None:
    """Native classes let right padding run into the states: the cache is wrong, and every step after it."""
    model = make_model(kind, use_bias=True)
    lengths = (9, 2, 5)
    rows = [random_ids(1, length + 3, seed=length) for length in lengths]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[index, :length], mask[index, :length] = row[0, :length], 1
    cache = filled_cache(model, ids, attention_mask=mask)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert_same_states(cache, filled_cache(model, row[:, :length]), row=index, other_row=0)
    for step in range(3):
        tokens = torch.cat(
            [row[:, length + step : length + step + 1] for row, length in zip(rows, lengths, strict=True)]
        )
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(tokens, attention_mask=mask, cache=cache).logits[:, 0]
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            assert_close(logits[index], all_logits(model, row[:, : length + step + 1])[0, -1])


@pytest.mark.parametrize("kind", ["mamba2", "mamba2-groups"])
@torch.no_grad()
def test_defect_06_time_step_limit_in_a_step(kind: str) -> None:
    """Native Mamba-2 clamps the time step in the parallel form and not in a decoding step."""
    model = make_model(kind, time_step_limit=(0.0, 0.05))
    ids = random_ids(2, 12)
    cache = filled_cache(model, ids[:, :6])
    steps = [model(ids[:, [position]], cache=cache).logits for position in range(6, 12)]
    assert_close(torch.cat(steps, dim=1), all_logits(model, ids)[:, 6:])
    # the limit is not idle
    free = make_model(kind)
    free.load_state_dict(model.state_dict())
    assert (all_logits(free, ids) - all_logits(model, ids)).abs().max() > 0.01


@ALL_MODELS
def test_defect_10_prompt_lookup_and_chunked_prefill_equal_greedy(kind: str) -> None:
    """Native classes refuse `prompt_lookup_num_tokens`, `assistant_model` and `prefill_chunk_size`."""
    model = make_model(kind, **TALKATIVE)
    ids = random_ids(1, 12).repeat(1, 2)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, **GREEDY}
    expected = model.generate(ids, **options)
    assert expected[0, 24:].unique().numel() > 3
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), expected)


@ALL_MODELS
def test_defect_10_assisted_decoding_equals_greedy(kind: str) -> None:
    model = make_model(kind, **TALKATIVE)
    ids = random_ids(1, 10)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, **GREEDY}
    expected = model.generate(ids, **options)
    # one assistant guesses nearly everything right, the other nearly nothing
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.lm_head.weight.add_(0.02 * torch.randn_like(near.lm_head.weight))
    for assistant in (near, make_model(kind, seed=5, num_hidden_layers=2, **TALKATIVE)):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


@ALL_MODELS
def test_defect_10_what_does_not_apply_is_refused(kind: str) -> None:
    """A quantized cache and paged continuous batching are made of key/value pairs."""
    model = make_model(kind)
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match=r"cache_implementation='quantized'.*Leave `cache_implementation` out"):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), cache_implementation="quantized", max_new_tokens=2, **GREEDY
        )
    with pytest.raises(ValueError, match=r"generate_batch.*generate\(\)"):
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)


@ALL_MODELS
@torch.no_grad()
def test_defect_11_crop_rolls_back_exactly(kind: str) -> None:
    """Native crop() raises, or, after activate_past_recording(), leaves the recurrent state where it was."""
    model = make_model(kind)
    assert RecurrentCache.is_croppable
    prompt, wrong, right = random_ids(2, 7), random_ids(2, 6, seed=8), random_ids(2, 5, seed=9)
    cache = filled_cache(model, prompt, recording=True)
    model(wrong, cache=cache)
    # accept two tokens of six, twice in a row without a forward in between
    cache.crop(-3)
    cache.crop(-1)
    # the states after every token of a short forward are at hand: nothing is read again
    assert cache.get_seq_length() == 9 and cache.pending_length == 0
    whole = torch.cat([prompt, wrong[:, :2], right], dim=1)
    expected = all_logits(model, whole)
    parts = [model(part, cache=cache).logits for part in right.split([1, 1, 3], dim=1)]
    assert_close(torch.cat(parts, dim=1), expected[:, 9:])
    assert cache.get_seq_length() == whole.shape[1] and cache.pending_length == 0
    assert_same_states(cache, filled_cache(model, whole))


@ALL_MODELS
@torch.no_grad()
def test_defect_11_crop_to_nothing_and_into_the_prompt(kind: str) -> None:
    model = make_model(kind)
    ids, other = random_ids(1, 7), random_ids(1, 6, seed=8)
    cache = filled_cache(model, ids, recording=True)
    cache.crop(-3)
    assert_close(model(other, cache=cache).logits, all_logits(model, torch.cat([ids[:, :4], other], dim=1))[:, 4:])
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0
    assert_close(model(other, cache=cache).logits, all_logits(model, other))


@ALL_MODELS
@torch.no_grad()
def test_defect_11_crop_with_padding(kind: str) -> None:
    """Pending tokens keep their padding."""
    model = make_model(kind, use_bias=True)
    ids = random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    cache = filled_cache(model, ids[:, :4], recording=True, attention_mask=mask[:, :4])
    model(ids[:, 4:9], attention_mask=mask[:, :9], cache=cache)
    cache.crop(-2)
    logits = model(ids[:, 7:], attention_mask=mask, cache=cache).logits
    assert_close(logits[0], all_logits(model, ids[:1])[0, 7:])
    assert_close(logits[1], all_logits(model, ids[1:, 6:])[0, 1:])


@ALL_MODELS
@torch.no_grad()
def test_defect_11_crop_zero_commits(kind: str) -> None:
    """generate() calls crop(0) to say that no token is taken back any more."""
    model = make_model(kind)
    ids = random_ids(1, 9)
    cache = filled_cache(model, ids[:, :3], recording=True)
    model(ids[:, 3:7], cache=cache)
    cache.crop(-2)
    cache.crop(0)
    with pytest.raises(ValueError, match=r"back to token 4.*no snapshot that early"):
        cache.crop(-1)
    assert cache.get_seq_length() == 5 and cache.pending_length == 0
    assert_close(model(ids[:, 5:], cache=cache).logits, all_logits(model, ids)[:, 5:])


@ALL_MODELS
@torch.no_grad()
def test_defect_11_crop_zero_commits_a_long_forward(kind: str) -> None:
    """Of more than 16 tokens only the states before them are kept, so the tokens that stay are read again."""
    model = make_model(kind)
    ids = random_ids(1, 23)
    cache = filled_cache(model, ids[:, :3], recording=True)
    model(ids[:, 3:], cache=cache)
    cache.crop(-18)
    cache.crop(0)
    assert cache.get_seq_length() == 5 and cache.pending_length == 2
    # what the states have not seen yet can still go, and no more
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"back to token 2.*no snapshot that early"):
        cache.crop(-1)
    assert cache.get_seq_length() == 3
    assert_close(model(ids[:, 3:], cache=cache).logits, all_logits(model, ids)[:, 3:])


def test_defect_11_impossible_crops_are_refused() -> None:
    model = make_model("mamba")
    cache = filled_cache(model, random_ids(1, 6))
    with pytest.raises(ValueError, match=r"back to token 4.*activate_past_recording\(\)"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="cannot remove 7 tokens from a cache that has seen 6"):
        cache.crop(-7)
    with pytest.raises(ValueError, match=r"as a negative number, got 2.*crop\(n - cache.get_seq_length\(\)\)"):
        cache.crop(2)
    assert cache.get_seq_length() == 6
    short = RecurrentCache(model.config, max_snapshots=1)
    short.activate_past_recording()
    for part in random_ids(1, 6).split(2, dim=1):
        model(part, cache=short)
    with pytest.raises(ValueError, match="raise `max_snapshots`"):
        short.crop(-3)


@ALL_MODELS
@torch.no_grad()
def test_defect_11_partial_accepts_do_not_grow_the_replay(kind: str) -> None:
    """A long run of candidates of which half are accepted each time recomputes a bounded number of tokens."""
    model = make_model(kind)
    kept = random_ids(1, 5)
    cache = filled_cache(model, kept, recording=True)
    widths: list[int] = []
    hook = model.backbone.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for turn in range(16):
        candidates = random_ids(1, 6, seed=100 + turn)
        model(candidates, cache=cache)
        cache.crop(-3)
        kept = torch.cat([kept, candidates[:, :3]], dim=1)
        assert cache.get_seq_length() == kept.shape[1]
    hook.remove()
    assert max(widths) <= MAX_REPLAY + 6
    last = random_ids(1, 2, seed=99)
    assert_close(model(last, cache=cache).logits, all_logits(model, torch.cat([kept, last], dim=1))[:, -2:])


@ALL_MODELS
@pytest.mark.parametrize("pending", [False, True], ids=["plain", "pending"])
@torch.no_grad()
def test_defect_12_batch_operations(kind: str, pending: bool) -> None:
    """On native caches get_seq_length, batch_repeat_interleave and batch_select_indices raise."""
    model = make_model(kind)
    ids, tail = random_ids(3, 8), random_ids(3, 3, seed=4)
    length = 6 if pending else 8

    def fresh() -> RecurrentCache:
        cache = filled_cache(model, ids, recording=pending)
        cache.crop(length - 8)
        return cache

    expected = all_logits(model, torch.cat([ids[:, :length], tail], dim=1))[:, length:]
    assert fresh().get_seq_length() == length

    cache = fresh()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_close(model(tail[[2, 0, 0]], cache=cache).logits, expected[[2, 0, 0]])

    cache = fresh()
    cache.batch_repeat_interleave(2)
    assert_close(model(tail.repeat_interleave(2, dim=0), cache=cache).logits, expected.repeat_interleave(2, dim=0))

    for rows in (torch.tensor([2, 1]), torch.tensor([True, False, True])):
        cache = fresh()
        cache.batch_select_indices(rows)
        assert_close(model(tail[rows], cache=cache).logits, expected[rows])
        assert cache.get_seq_length() == length + 3


@ALL_MODELS
@torch.no_grad()
def test_defect_12_batch_operations_reach_the_snapshots(kind: str) -> None:
    """Rolling back after the rows were selected gives the selected rows."""
    model = make_model(kind)
    ids, tail = random_ids(3, 8), random_ids(3, 3, seed=4)
    cache = filled_cache(model, ids[:, :5], recording=True)
    model(ids[:, 5:], cache=cache)
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-2)
    order = torch.tensor([0, 0, 2, 2])
    expected = all_logits(model, torch.cat([ids[:, :6], tail], dim=1))[:, 6:]
    assert_close(model(tail[order], cache=cache).logits, expected[order])


@ALL_MODELS
@torch.no_grad()
def test_defect_12_reset(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, 6)
    cache = filled_cache(model, random_ids(2, 9, seed=3), recording=True)
    cache.crop(-2)
    cache.reset()
    assert cache.get_seq_length() == cache.pending_length == 0
    assert_close(model(ids, cache=cache).logits, all_logits(model, ids))
    assert_same_states(cache, filled_cache(model, ids))
