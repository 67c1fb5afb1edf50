"""generate(): prompts of every kind and length, padding, chunked prefill and several turns on one cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_mamba import RecurrentCache
from hf_mamba.generation import mixin

from .builders import ALL_MODELS, NATIVE_MODELS, make_native, random_ids
from .oracles import GREEDY, TOLERANCE, assert_continues, greedy_loop, make_talker, padded
from .test_parity import with_oracle

STEPS = 6
SIDES = pytest.mark.parametrize("side", ["left", "right", "middle"])
ROWS = [random_ids(n, seed=n) for n in (3, 9, 1)]


@ALL_MODELS
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_greedy_equals_the_loop_without_a_cache(kind: str, length: int) -> None:
    """Lengths 1 to 3 are shorter than the convolution."""
    model = make_talker(kind)
    ids = random_ids(2, length)
    output = assert_continues(model, list(ids), ids, STEPS)
    assert isinstance(output.past_key_values, RecurrentCache)
    assert output.past_key_values.get_seq_length() == length + STEPS - 1
    assert_continues(model, list(ids), ids, STEPS, use_cache=False)


@ALL_MODELS
def test_without_a_prompt_starts_from_bos(kind: str) -> None:
    model = make_talker(kind)
    bos = torch.tensor([model.config.bos_token_id])
    sequences = model.generate(max_new_tokens=STEPS, **GREEDY)
    assert sequences[0].tolist() == [*bos.tolist(), *greedy_loop(model, bos, STEPS)[0].tolist()]


@ALL_MODELS
def test_sampling_does_not_depend_on_the_cache(kind: str) -> None:
    model = make_talker(kind)
    ids = random_ids(2, 7)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 3}
    sequences = []
    for use_cache in (True, False, True):
        torch.manual_seed(5)
        sequences.append(model.generate(ids, use_cache=use_cache, **options))
    assert sequences[0].shape == (6, 15)
    assert torch.equal(sequences[0], sequences[1]) and torch.equal(sequences[0], sequences[2])
    assert len({tuple(row) for row in sequences[0].tolist()}) > 2


@ALL_MODELS
@pytest.mark.parametrize("sample", [False, True], ids=["beam", "beam-sample"])
def test_beams_do_not_depend_on_the_cache(kind: str, sample: bool) -> None:
    model = make_talker(kind)
    prompt, mask = padded(ROWS[:2], "left")
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": STEPS, "do_sample": sample}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(
            model.generate(
                prompt,
                attention_mask=mask,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.allclose(results[0].sequences_scores, results[1].sequences_scores, atol=TOLERANCE)
    # the beams were really reordered: otherwise this would test nothing
    assert (results[0].beam_indices[:, 1:STEPS] != results[0].beam_indices[:, : STEPS - 1]).any()


@NATIVE_MODELS
def test_beams_equal_native(kind: str) -> None:
    with_oracle(kind)
    model = make_talker(kind)
    native = make_native(model)
    ids = random_ids(2, 9)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), native.generate(ids, **options))


@ALL_MODELS
@SIDES
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_padded_rows_continue_after_their_last_real_token(kind: str, side: str, use_cache: bool) -> None:
    """With the padding on the right, too: it is the row that goes on, not its padding."""
    model = make_talker(kind, use_bias=True)
    prompt, mask = padded(ROWS, side)
    output = assert_continues(model, ROWS, prompt, STEPS, attention_mask=mask, use_cache=use_cache)
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)


@ALL_MODELS
@SIDES
def test_padding_is_found_by_the_pad_token(kind: str, side: str) -> None:
    model = make_talker(kind)
    prompt, _ = padded(ROWS, side, pad=model.config.pad_token_id)
    assert_continues(model, ROWS, prompt, STEPS)


@ALL_MODELS
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
def test_masks_of_other_types(kind: str, dtype: torch.dtype) -> None:
    model = make_talker(kind)
    prompt, mask = padded(ROWS, "left")
    assert_continues(model, ROWS, prompt, STEPS, attention_mask=mask.to(dtype))


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "chunks"])
def test_embeddings_as_prompt(kind: str, side: str, chunk: int | None) -> None:
    model = make_talker(kind)
    prompt, mask = padded(ROWS, side)
    embeds = model.get_input_embeddings()(prompt).detach()
    options = {"inputs_embeds": embeds, "attention_mask": mask, "prefill_chunk_size": chunk}
    alone = assert_continues(model, ROWS, None, STEPS, **options)
    assert alone.sequences.shape[1] == STEPS
    # ids beside the embeddings are only bookkeeping: they come back in front of the new tokens
    ids = torch.full_like(prompt, 7)
    both = assert_continues(model, ROWS, ids, STEPS, **options)
    assert torch.equal(both.sequences, torch.cat([ids, alone.sequences], dim=1))


@ALL_MODELS
@pytest.mark.parametrize("chunk", [1, 3, 5])
@pytest.mark.parametrize("side", [None, "left", "right"], ids=["unpadded", "left", "right"])
def test_chunked_prefill(kind: str, chunk: int, side: str | None) -> None:
    model = make_talker(kind)
    rows = ROWS if side else list(random_ids(2, 9))
    prompt, mask = padded(rows, side or "left")
    assert_continues(model, rows, prompt, STEPS, attention_mask=mask, prefill_chunk_size=chunk)


def test_chunked_prefill_needs_a_cache() -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        make_talker("mamba").generate(random_ids(1, 4), prefill_chunk_size=2, use_cache=False, max_new_tokens=2)


@ALL_MODELS
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "chunks"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_three_turns_on_one_cache(kind: str, name: str, chunk: int | None, side: str) -> None:
    model = make_talker(kind)
    rows = [random_ids(5, seed=5), random_ids(8, seed=8)]
    sequences, mask = padded(rows, side)
    cache = RecurrentCache(model.config)
    for turn in range(3):
        if turn:
            new = random_ids(2, turn + 1, seed=20 + turn)
            sequences = torch.cat([sequences, new], dim=1)
            mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
            rows = [row[keep.bool()] for row, keep in zip(sequences, mask, strict=True)]
        output = assert_continues(
            model, rows, sequences, 4, attention_mask=mask, prefill_chunk_size=chunk, **{name: cache}
        )
        assert output.past_key_values is cache and cache.get_seq_length() == output.sequences.shape[1] - 1
        sequences = output.sequences


@ALL_MODELS
@pytest.mark.parametrize("pad", [0, "eos"], ids=["pad", "pad-is-eos"])
def test_a_row_that_ended_early_goes_on_in_the_next_turn(kind: str, pad: int | str) -> None:
    """What the batch appended to it while the others went on is padding, in its states as in the mask."""
    model = make_talker(kind)
    prompt, mask = padded(ROWS, "left")
    eos = int(greedy_loop(model, ROWS[1], STEPS)[0][1])
    first = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos if pad == "eos" else pad,
        return_dict_in_generate=True,
    )
    new = first.sequences[:, prompt.shape[1] :]
    ended = (new[:, :-1] == eos).cumsum(dim=1) > 0
    assert ended.any(dim=1).tolist() != [True, True, True] and ended[1].any()
    mask = torch.cat([mask, torch.ones(3, 1), ~ended, torch.ones(3, 2)], dim=1).long()
    sequences = torch.cat([first.sequences, random_ids(3, 2, seed=9)], dim=1)
    rows = [row[keep.bool()] for row, keep in zip(sequences, mask, strict=True)]
    assert_continues(model, rows, sequences, 4, attention_mask=mask, cache=first.past_key_values)


@ALL_MODELS
def test_only_the_new_tokens_with_a_mask_for_all(kind: str) -> None:
    model = make_talker(kind)
    ids = random_ids(1, 6)
    first = assert_continues(model, list(ids), ids, 4)
    new = random_ids(1, 3, seed=9)
    whole = torch.cat([first.sequences, new], dim=1)
    # the last generated token has not been fed yet
    fed = torch.cat([first.sequences[:, -1:], new], dim=1)
    assert_continues(model, list(whole), fed, 4, attention_mask=torch.ones_like(whole), cache=first.past_key_values)


@ALL_MODELS
def test_a_reset_cache_starts_again(kind: str) -> None:
    model = make_talker(kind)
    ids = random_ids(2, 6)
    cache = assert_continues(model, list(ids), ids, 3).past_key_values
    storage = [state.data_ptr() for layer in cache.layers for state in layer.conv_states.values() if state is not None]
    cache.reset()
    assert cache.get_seq_length() == 0
    other = random_ids(2, 4, seed=2)
    assert_continues(model, list(other), other, 3, cache=cache)
    assert storage == [
        state.data_ptr() for layer in cache.layers for state in layer.conv_states.values() if state is not None
    ]


@ALL_MODELS
def test_forward_and_generate_share_a_cache(kind: str) -> None:
    model = make_talker(kind)
    ids = random_ids(1, 9)
    cache = RecurrentCache(model.config)
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
    assert_continues(model, list(ids), ids, 4, cache=cache)


def test_a_prompt_within_the_cache_is_refused() -> None:
    model = make_talker("mamba2")
    ids = random_ids(1, 6)
    cache = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY).past_key_values
    for length in (5, 9):
        with pytest.raises(ValueError, match=f"has seen 9 tokens, so a prompt of {length} tokens"):
            model.generate(random_ids(1, length), cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="batch of 1"):
        model.generate(random_ids(2, 12), cache=cache, max_new_tokens=2)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        make_talker("mamba").generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


def test_two_different_caches_are_refused() -> None:
    model = make_talker("mamba")
    caches = RecurrentCache(model.config), RecurrentCache(model.config)
    with pytest.raises(ValueError, match="names for one cache, but several"):
        model.generate(random_ids(1, 3), cache=caches[0], cache_params=caches[1], max_new_tokens=2)
    with pytest.raises(ValueError, match="use only one of the two"):
        model.generate(random_ids(1, 3), cache=caches[0], cache_implementation="static", max_new_tokens=2)
    with pytest.raises(TypeError, match="must be a transformers Cache, got list"):
        model.generate(random_ids(1, 3), cache=[], max_new_tokens=2)


@ALL_MODELS
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_stock_caches_under_either_name(kind: str, name: str, cache_class: type) -> None:
    model = make_talker(kind)

    def new_cache():
        return cache_class(config=model.config, **({"max_cache_len": 32} if cache_class is StaticCache else {}))

    prompt, mask = padded(ROWS, "left")
    output = assert_continues(model, ROWS, prompt, STEPS, attention_mask=mask, **{name: new_cache()})
    assert type(output.past_key_values) is cache_class
    assert_continues(model, ROWS, prompt, STEPS, attention_mask=mask, prefill_chunk_size=2, **{name: new_cache()})
    ids, cache = random_ids(2, 9), new_cache()
    with torch.no_grad():
        parts = [model(part, **{name: cache}).logits for part in ids.split([1, 4, 1, 3], dim=1)]
        assert (torch.cat(parts, dim=1) - model(ids).logits).abs().max().item() <= TOLERANCE


def test_a_used_stock_cache_needs_a_mask_that_tells_what_is_new() -> None:
    model = make_talker("mamba2")
    ids = random_ids(1, 6)
    first = assert_continues(model, list(ids), ids, 4, cache=DynamicCache(config=model.config))
    whole = torch.cat([first.sequences, random_ids(1, 3, seed=9)], dim=1)
    cache = first.past_key_values
    with pytest.raises(ValueError, match="DynamicCache` does not count"):
        model.generate(whole, cache_params=cache, attention_mask=torch.ones_like(whole), max_new_tokens=2)
    mask = torch.ones_like(whole)
    assert_continues(model, list(whole), whole[:, 9:], 4, attention_mask=mask, cache_params=cache)


@ALL_MODELS
def test_a_long_prompt_is_read_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without being asked, so that the memory it takes is bounded."""
    model = make_talker(kind)
    lengths: list[int] = []
    model.backbone.embeddings.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr(mixin, "MAX_PREFILL_TOKENS", 8)
    ids = random_ids(2, 9)
    assert_continues(model, list(ids), ids, STEPS)
    # of 8 tokens, which are 4 columns of 2 rows
    assert lengths[:4] == [4, 4, 1, 1]
