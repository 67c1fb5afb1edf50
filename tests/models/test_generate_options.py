"""generate(): streaming, stopping, logits processors and everything it can return."""

from threading import Thread

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, VOCAB, random_ids
from .oracles import GREEDY, TOLERANCE, assert_continues, greedy_loop, make_talker, padded

STEPS = 8
ROWS = [random_ids(n, seed=n) for n in (4, 7)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Token n is the word "wn"."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


@ALL_MODELS
def test_text_streamer_prints_the_text(kind: str, tokenizer, capsys) -> None:
    model = make_talker(kind)
    ids = random_ids(1, 5)
    output = model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=STEPS, **GREEDY)
    assert capsys.readouterr().out.split() == [f"w{n}" for n in output[0, 5:].tolist()]


@ALL_MODELS
@pytest.mark.parametrize("way", ["greedy", "lookup"])
def test_text_iterator_streamer_in_a_thread(kind: str, way: str, tokenizer) -> None:
    model = make_talker(kind)
    ids = random_ids(1, 5).repeat(1, 2)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {}
    thread = Thread(
        target=model.generate,
        args=(ids,),
        kwargs={"streamer": streamer, "max_new_tokens": STEPS, **GREEDY, **options},
    )
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    assert words == [f"w{n}" for n in greedy_loop(model, ids[0], STEPS)[0].tolist()]


@ALL_MODELS
def test_several_end_tokens(kind: str) -> None:
    """Each row ends at its own end token and is padded after it."""
    model = make_talker(kind)
    prompt, mask = padded(ROWS, "left")
    alone = [greedy_loop(model, row, STEPS)[0].tolist() for row in ROWS]
    ends = [alone[0][2], alone[1][5]]
    output = model.generate(
        prompt, attention_mask=mask, eos_token_id=ends, pad_token_id=60, do_sample=False, max_new_tokens=STEPS
    )
    for row, tokens in zip(output[:, prompt.shape[1] :].tolist(), alone, strict=True):
        length = next(n for n, token in enumerate(tokens) if token in ends) + 1
        assert row == tokens[:length] + [60] * (len(row) - length)


@ALL_MODELS
def test_lengths(kind: str) -> None:
    model = make_talker(kind)
    row = ROWS[0]
    eos = int(greedy_loop(model, row, 1)[0][0])
    ended = model.generate(row[None], eos_token_id=eos, do_sample=False, max_new_tokens=6)
    assert ended.shape[1] == row.shape[0] + 1
    later = model.generate(row[None], eos_token_id=eos, do_sample=False, max_new_tokens=6, min_new_tokens=4)
    assert later.shape[1] >= row.shape[0] + 4 and eos not in later[0, 4:7].tolist()
    assert model.generate(row[None], max_length=9, **GREEDY).shape[1] == 9


@ALL_MODELS
def test_stopping_criteria(kind: str) -> None:
    model = make_talker(kind)
    ids = ROWS[1][None]
    tokens = greedy_loop(model, ids[0], STEPS)[0].tolist()

    def after_four(input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= ids.shape[1] + 4)

    options = {"max_new_tokens": STEPS, **GREEDY}
    assert model.generate(ids, stopping_criteria=[after_four], **options)[0, 7:].tolist() == tokens[:4]
    assert model.generate(ids, stopping_criteria=[MaxTimeCriteria(0.0)], **options)[0, 7:].tolist() == tokens[:1]


@ALL_MODELS
def test_logits_processors_see_prompt_and_text(kind: str) -> None:
    model = make_talker(kind)
    ids = ROWS[1][None]
    penalty, expected = 5.0, ids
    with torch.no_grad():
        for _ in range(STEPS):
            logits = model(expected).logits[0, -1]
            used = expected[0].unique()
            logits[used] = torch.where(logits[used] > 0, logits[used] / penalty, logits[used] * penalty)
            expected = torch.cat([expected, logits.argmax()[None, None]], dim=1)
    options = {"max_new_tokens": STEPS, **GREEDY}
    assert torch.equal(model.generate(ids, repetition_penalty=penalty, **options), expected)

    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            allowed = torch.full_like(scores, -torch.inf)
            return allowed.scatter(1, (input_ids[:, -1:] + 1) % VOCAB, 0.0)

    counted = model.generate(ids, logits_processor=[Only()], **options)[0, 6:]
    assert counted.tolist() == [(int(ids[0, -1]) + n) % VOCAB for n in range(STEPS + 1)]
    banned = model.generate(ids, bad_words_ids=[[int(t)] for t in greedy_loop(model, ids[0], STEPS)[0]], **options)
    assert not set(banned[0, 7:].tolist()) & set(greedy_loop(model, ids[0], STEPS)[0].tolist())


@ALL_MODELS
def test_classifier_free_guidance(kind: str) -> None:
    """The processor runs the model itself, with a cache of its own."""
    model = make_talker(kind)
    ids, negative = ROWS[1][None], random_ids(1, 3, seed=30)
    scale, expected, against = 1.7, ids, negative
    with torch.no_grad():
        for _ in range(STEPS):
            for_logits, against_logits = (model(x).logits[0, -1].log_softmax(-1) for x in (expected, against))
            token = (against_logits + scale * (for_logits - against_logits)).argmax()[None, None]
            expected, against = torch.cat([expected, token], dim=1), torch.cat([against, token], dim=1)
    options = {"guidance_scale": scale, "negative_prompt_ids": negative, "max_new_tokens": STEPS, **GREEDY}
    assert torch.equal(model.generate(ids, **options), expected)


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 3], ids=["whole", "chunks"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_hidden_states_step_by_step(kind: str, side: str, chunk: int | None, use_cache: bool) -> None:
    """The usual types: per step a tuple of layers, the first step with the whole prompt, where the prompt has its tokens."""
    if chunk and not use_cache:
        return
    model = make_talker(kind)
    prompt, mask = padded(ROWS, side)
    output = assert_continues(
        model,
        ROWS,
        prompt,
        4,
        attention_mask=mask,
        prefill_chunk_size=chunk,
        use_cache=use_cache,
        output_hidden_states=True,
        output_scores=True,
    )
    assert isinstance(output.hidden_states, tuple) and isinstance(output.hidden_states[0], tuple)
    assert len(output.hidden_states) == 4 and len(output.scores) == 4
    assert all(len(step) == model.config.num_hidden_layers + 1 for step in output.hidden_states)
    assert [step[0].shape[1] for step in output.hidden_states] == ([7, 1, 1, 1] if use_cache else [7, 8, 9, 10])
    whole = torch.nn.functional.pad(mask, (0, 3), value=1)
    with torch.no_grad():
        for layer, expected in enumerate(
            model(output.sequences[:, :-1], attention_mask=whole, output_hidden_states=True).hidden_states
        ):
            steps = [step[layer] for step in output.hidden_states]
            actual = torch.cat(steps, dim=1) if use_cache else steps[-1]
            assert torch.allclose(actual[whole.bool()], expected[whole.bool()], atol=TOLERANCE)


@ALL_MODELS
def test_fields_of_the_output(kind: str) -> None:
    model = make_talker(kind)
    output = assert_continues(model, ROWS[1:], ROWS[1][None], 3, output_scores=True)
    assert isinstance(output.past_key_values, RecurrentCache) and output.attentions is None
    for scores, logits in zip(output.scores, output.logits, strict=True):
        assert logits.shape == (1, VOCAB) and logits.dtype == torch.float32 and torch.equal(scores, logits)
    assert output.to_tuple()[0] is output.sequences


@ALL_MODELS
def test_attentions_are_refused(kind: str) -> None:
    model = make_talker(kind)
    with pytest.raises(ValueError, match="no attention weights"):
        model.generate(ROWS[0][None], output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)


def test_unknown_and_contradicting_arguments_are_refused() -> None:
    model = make_talker("mamba")
    ids = ROWS[0][None]
    with pytest.raises(ValueError, match="atention_mask"):
        model.generate(ids, atention_mask=torch.ones_like(ids), max_new_tokens=2)
    for mask in (torch.ones(1, 9), torch.ones(1, 3), torch.zeros(1, 9), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=f"must have 4 columns, got {mask.shape[1]}"):
            model.generate(ids, attention_mask=mask.long(), max_new_tokens=2)
        embeds = model.get_input_embeddings()(ids).detach()
        with pytest.raises(ValueError, match="attention_mask"):
            model.generate(inputs_embeds=embeds, attention_mask=torch.zeros(1, mask.shape[1]), max_new_tokens=2)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, cache=RecurrentCache(model.config), use_cache=False, max_new_tokens=2)


@ALL_MODELS
def test_positions_of_the_caller_separate_packed_sequences(kind: str) -> None:
    """The text goes on from the last of the sequences packed into the prompt."""
    model = make_talker(kind)
    packed = torch.cat(ROWS)[None]
    positions = torch.cat([torch.arange(row.shape[0]) for row in ROWS])[None]
    assert_continues(model, ROWS[1:], packed, STEPS, position_ids=positions)
    assert_continues(model, ROWS[1:], packed, STEPS, position_ids=positions, prefill_chunk_size=3)


@ALL_MODELS
def test_generation_config_of_the_model(kind: str, tmp_path) -> None:
    model = make_talker(kind)
    model.generation_config = GenerationConfig(max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.generation_config.max_new_tokens == 5
    ids = ROWS[1][None]
    assert torch.equal(again.generate(ids), model.generate(ids))
    assert model.generate(ids).shape[1] == ids.shape[1] + 5


@ALL_MODELS
@pytest.mark.parametrize("cache_class", [RecurrentCache, StaticCache])
def test_a_decoding_loop_of_the_users_own(kind: str, cache_class: type) -> None:
    """A recurrent cache tells prepare_inputs_for_generation() what is new; with a stock cache the caller has to."""
    model = make_talker(kind)
    own = cache_class is RecurrentCache
    prompt, mask = padded(ROWS, "right" if own else "left")
    cache = cache_class(config=model.config, **({} if own else {"max_cache_len": 32}))
    ids, tokens = prompt, []
    with torch.no_grad():
        for step in range(4):
            count = None if own else 1 if step else prompt.shape[1]
            inputs = model.prepare_inputs_for_generation(
                ids,
                next_sequence_length=count,
                cache=cache,
                attention_mask=mask,
                is_first_iteration=not step,
            )
            tokens.append(model(**inputs).logits[:, -1].argmax(dim=-1, keepdim=True))
            ids = torch.cat([ids, tokens[-1]], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for row, actual in zip(ROWS, torch.cat(tokens, dim=1), strict=True):
        assert torch.equal(actual, greedy_loop(model, row, 4)[0])


@ALL_MODELS
def test_options_in_the_configuration_are_noticed_in_every_call(kind: str) -> None:
    model = make_talker(kind)
    ids = random_ids(1, 4)
    model.generate(ids, max_new_tokens=2)
    model.config.temperature = 0.5
    with pytest.raises(ValueError, match="control generation"):
        model.generate(ids, max_new_tokens=2)
    del model.config.temperature
    model.generate(ids, max_new_tokens=2)
