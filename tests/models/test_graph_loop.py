"""Decoding by CUDA graphs gives what transformers' own loop gives.

Here without a GPU, what would be captured is called instead; with `-m gpu` the same tests run on real graphs.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import mamba_kernels
from hf_mamba import RecurrentCache
from hf_mamba.generation import graphs

from .builders import ALL_MODELS, NATIVE_MODELS, make_native, random_ids
from .on_graphs import DEVICES, generate, graph_device, stock
from .oracles import GREEDY, TOLERANCE, make_talker, padded
from .test_parity import with_oracle

STEPS = 12


device = pytest.fixture(params=DEVICES)(graph_device)


def assert_same(model: Any, *args: Any, **options: Any) -> Any:
    expected = stock(model, *args, **options)
    result = generate(model, *args, **options)
    assert torch.equal(result, expected)
    # from the graph of the first call
    assert torch.equal(generate(model, *args, **options), expected)
    return result


@ALL_MODELS
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(device: torch.device, kind: str, length: int, batch: int) -> None:
    """Lengths 1 and 2 are shorter than the convolution."""
    model = make_talker(kind).to(device)
    result = assert_same(model, random_ids(batch, length).to(device), max_new_tokens=STEPS, **GREEDY)
    assert result.shape == (batch, length + STEPS)


@NATIVE_MODELS
def test_greedy_equals_native(device: torch.device, kind: str) -> None:
    with_oracle(kind)
    model = make_talker(kind)
    ids = random_ids(2, 7)
    expected = make_native(model).generate(ids, max_new_tokens=STEPS, **GREEDY)
    assert torch.equal(generate(model.to(device), ids.to(device), max_new_tokens=STEPS, **GREEDY).cpu(), expected)


@ALL_MODELS
def test_padded_batches(device: torch.device, kind: str) -> None:
    model = make_talker(kind, use_bias=True).to(device)
    for side in ("left", "right"):
        prompt, mask = (t.to(device) for t in padded([random_ids(n, seed=n) for n in (3, 9, 1)], side))
        assert_same(model, prompt, attention_mask=mask, max_new_tokens=STEPS, **GREEDY)


SAMPLING = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7, "top_k": 0},
    "min-p": {"min_p": 0.1, "top_k": 0},
    "typical": {"typical_p": 0.5, "top_k": 0},
    "epsilon": {"epsilon_cutoff": 0.02, "top_k": 0},
    "penalty": {"repetition_penalty": 1.7},
    "all": {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "renormalised": {"top_k": 7, "renormalize_logits": True},
    "several": {"num_return_sequences": 3},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "moe_mamba"])
def test_sampling(device: torch.device, kind: str, options: dict[str, Any]) -> None:
    model = make_talker(kind).to(device)
    ids = random_ids(2, 6).to(device)
    results = [
        assert_same(model, ids, max_new_tokens=STEPS, do_sample=True, eos_token_id=None, seed=seed, **options)
        for seed in (1, 2)
    ]
    assert not torch.equal(*results)


def test_greedy_with_a_repetition_penalty(device: torch.device) -> None:
    model = make_talker("mamba2").to(device)
    ids = random_ids(2, 6).to(device)
    plain = generate(model, ids, max_new_tokens=30, replayed=None, **GREEDY)
    penalised = assert_same(model, ids, max_new_tokens=30, repetition_penalty=3.0, **GREEDY)
    assert not torch.equal(plain, penalised)


def ends_for(model: Any, ids: torch.Tensor, positions: tuple[int, ...]) -> list[int]:
    """Tokens that greedy decoding reaches first at these positions, one a row."""
    new = stock(model, ids, max_new_tokens=30, **GREEDY)[:, ids.shape[1] :]
    return [int(row[position]) for row, position in zip(new, positions, strict=True)]


@ALL_MODELS
@pytest.mark.parametrize("returned", [False, True], ids=["tokens", "dict"])
def test_rows_end_at_different_steps(device: torch.device, kind: str, returned: bool) -> None:
    model = make_talker(kind).to(device)
    ids = random_ids(3, 5, seed=8).to(device)
    ends = ends_for(model, ids, (2, 7, 11))
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    if not returned:
        result = assert_same(model, ids, **options)
        assert result.shape[1] < 5 + 30
        return
    options.update(return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected, result = stock(model, ids, **options), generate(model, ids, **options)
    assert torch.equal(result.sequences, expected.sequences)
    new = result.sequences[:, 5:]
    ended = torch.isin(new, torch.tensor(ends, device=device)).cumsum(dim=1) > 0
    for name in ("scores", "logits"):
        assert len(result[name]) == len(expected[name]) == new.shape[1]
        for step, (mine, theirs) in enumerate(zip(result[name], expected[name], strict=True)):
            # what is computed for a row after its end means nothing
            live = ~ended[:, step - 1] if step else slice(None)
            torch.testing.assert_close(mine[live], theirs[live], atol=TOLERANCE, rtol=TOLERANCE)
    # both caches go on alike, those of rows that ended early included
    caches = [output.past_key_values for output in (result, expected)]
    assert all(isinstance(cache, RecurrentCache) for cache in caches)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == result.sequences.shape[1] - 1
    for mine, theirs in zip(caches[0].states(), caches[1].states(), strict=True):
        for state, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(state, other, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("options", [{"min_new_tokens": 9}, {"min_length": 13}], ids=["new", "all"])
def test_no_end_before_the_minimum(device: torch.device, options: dict[str, int]) -> None:
    model = make_talker("mamba").to(device)
    for length in (5, 8):
        ids = random_ids(2, length, seed=3).to(device)
        ends = ends_for(model, ids, (1, 3))
        base = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
        early = assert_same(model, ids, **base)
        late = assert_same(model, ids, **base, **options)
        assert early.shape[1] < late.shape[1]


def test_a_conversation_on_one_cache(device: torch.device) -> None:
    model = make_talker("mamba2").to(device)
    first, second = random_ids(1, 5).to(device), random_ids(1, 3, seed=4).to(device)
    cache = RecurrentCache(model.config)
    turn = generate(model, first, cache=cache, max_new_tokens=6, **GREEDY)
    assert cache.get_seq_length() == 10
    whole = torch.cat([turn, second], dim=1)
    again = generate(model, whole, cache=cache, max_new_tokens=6, **GREEDY)
    assert torch.equal(again, stock(model, whole, max_new_tokens=6, **GREEDY))


def test_a_returned_cache_is_not_overwritten(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    ids, other = random_ids(1, 5).to(device), random_ids(1, 9, seed=7).to(device)
    cache = generate(model, ids, max_new_tokens=6, return_dict_in_generate=True, **GREEDY).past_key_values
    before = [state.clone() for pair in cache.states() for state in pair]
    generate(model, other, max_new_tokens=20, **GREEDY)
    assert all(torch.equal(a, b) for a, b in zip(before, [s for pair in cache.states() for s in pair], strict=True))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().cpu())

    def end(self) -> None:
        self.ends += 1


def test_streamer(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 4).to(device)
    ends = ends_for(model, ids, (17,))
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    streamer = Recorder()
    result = generate(model, ids, streamer=streamer, **options)
    assert streamer.ends == 1 and len(streamer.pieces) == 1 + result.shape[1] - 4
    assert torch.equal(torch.cat(streamer.pieces), result[0].cpu())


class AfterThirdSeven(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(
            [row.shape[0] >= 9 + index for index, row in enumerate(input_ids)], device=input_ids.device
        )


def test_stopping_criteria(device: torch.device) -> None:
    model = make_talker("mamba2").to(device)
    ids = random_ids(2, 4).to(device)
    options = {"max_new_tokens": 30, **GREEDY}
    result = assert_same(model, ids, stopping_criteria=StoppingCriteriaList([AfterThirdSeven()]), **options)
    assert result.shape[1] == 10
    assert generate(model, ids, stopping_criteria=[MaxTimeCriteria(0.0)], **options).shape[1] == 5


def test_one_new_token(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(2, 4).to(device)
    expected = stock(model, ids, max_new_tokens=1, **GREEDY)
    # not worth a graph of its own
    assert torch.equal(generate(model, ids, max_new_tokens=1, replayed=False, **GREEDY), expected)
    generate(model, ids, max_new_tokens=STEPS, **GREEDY)
    assert torch.equal(generate(model, ids, max_new_tokens=1, **GREEDY), expected)


def test_two_models_at_once(device: torch.device) -> None:
    models = [make_talker("mamba", seed=seed).to(device) for seed in (1, 2)]
    ids = random_ids(1, 5).to(device)
    expected = [stock(model, ids, max_new_tokens=STEPS, **GREEDY) for model in models]
    assert not torch.equal(*expected)
    for _ in range(2):
        for model, tokens in zip(models, expected, strict=True):
            assert torch.equal(generate(model, ids, max_new_tokens=STEPS, **GREEDY), tokens)


@torch.no_grad()
def _change_weights(model: Any) -> None:
    model.backbone.layers[0].mixer.in_proj.weight.mul_(-1.0)


def _replace_weights(model: Any) -> None:
    layer = model.backbone.layers[0].mixer.out_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())


def _change_dtype(model: Any) -> None:
    model.double()


def _change_a_setting(model: Any) -> None:
    model.backbone.norm_f.variance_epsilon = 10.0


@pytest.mark.parametrize("change", [_change_weights, _replace_weights, _change_dtype, _change_a_setting])
def test_never_a_stale_graph(device: torch.device, change: Callable[[Any], None]) -> None:
    model = make_talker("mamba2").to(device)
    ids = random_ids(2, 5).to(device)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    before = torch.stack(assert_logits_same(model, ids, options))
    change(model)
    after = torch.stack(assert_logits_same(model, ids, options))
    # in double, the difference is one of rounding only
    assert not torch.equal(before, after)


def assert_logits_same(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    expected, result = stock(model, ids, **options), generate(model, ids, **options)
    for mine, theirs in zip(result.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    return result.logits


def test_switched_adapters(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    config = LoraConfig(target_modules=["in_proj", "x_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    ids = random_ids(1, 5).to(device)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    seen = []
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        model.eval()
        seen.append(assert_logits_same(model, ids, options)[-1])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    with model.disable_adapter():
        assert not torch.equal(assert_logits_same(model, ids, options)[-1], seen[0])
    model.merge_adapter()
    assert_logits_same(model, ids, options)


class Shift(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.roll(input_ids.shape[1], dims=-1)


def test_what_graphs_cannot_do_takes_the_stock_loop(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 5).to(device)
    base = {"max_new_tokens": STEPS, **GREEDY}
    for options in (
        {"logits_processor": LogitsProcessorList([Shift()])},
        {"num_beams": 2},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"disable_compile": True},
    ):
        generate(model, ids, replayed=False, **base, **options)
    handle = model.backbone.layers[1].register_forward_hook(lambda module, args, output: None)
    generate(model, ids, replayed=False, **base)
    handle.remove()
    generate(model, ids, **base)
    model.train()
    generate(model, ids, replayed=False, **base)


def test_inference_mode(device: torch.device) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 5).to(device)
    expected = stock(model, ids, max_new_tokens=STEPS, **GREEDY)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(generate(model, ids, max_new_tokens=STEPS, **GREEDY), expected)
        assert torch.equal(generate(model, ids, max_new_tokens=STEPS, **GREEDY), expected)


def test_a_capture_that_fails(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 5).to(device)
    expected = stock(model, ids, max_new_tokens=STEPS, **GREEDY)
    attempts = []

    def refuse(function: Any, device: Any, **options: Any) -> None:
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    def exhaust(function: Any, device: Any, **options: Any) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    works = graphs.capture
    monkeypatch.setattr(graphs, "capture", refuse)
    for _ in range(2):
        assert torch.equal(generate(model, ids, replayed=False, max_new_tokens=STEPS, **GREEDY), expected)
    # what cannot be captured is not tried again
    assert len(attempts) == 1
    other = make_talker("mamba").to(device)
    monkeypatch.setattr(graphs, "capture", exhaust)
    for _ in range(2):
        assert torch.equal(generate(other, ids, replayed=False, max_new_tokens=STEPS, **GREEDY), expected)
    monkeypatch.setattr(graphs, "capture", works)
    assert torch.equal(generate(other, ids, max_new_tokens=STEPS, **GREEDY), expected)


@pytest.mark.gpu
def test_captures_what_no_early_launch_may_follow() -> None:
    """Behind a fill a graph takes no launch that starts early; it is captured all the same, and is right."""
    weight = torch.randn(64, 64, device="cuda")
    out = torch.empty(1, 64, device="cuda")

    def run() -> None:
        out.copy_(mamba_kernels.fused_linear(torch.zeros(1, 64, device="cuda"), weight, bias=weight[0]))

    graph = graphs.capture(run, out.device)
    out.zero_()
    graph.replay()
    assert torch.equal(out[0], weight[0])
    # random numbers still follow the seed after an attempt that broke off
    torch.manual_seed(3)
    first = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_graphs_are_bounded_and_go_with_their_model(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_talker("mamba").to(device)
    for batch in range(1, graphs.MAX_STEPS + 3):
        generate(model, random_ids(batch, 3).to(device), max_new_tokens=STEPS, **GREEDY)
    store = graphs._graphs[model]
    assert len(store.steps) == graphs.MAX_STEPS
    for temperature in range(1, graphs.MAX_SAMPLERS + 3):
        generate(
            model,
            random_ids(2, 3).to(device),
            max_new_tokens=STEPS,
            do_sample=True,
            temperature=temperature + 0.5,
        )
    assert max(len(step.samplers) for step in store.steps.values()) == graphs.MAX_SAMPLERS
    step = weakref.ref(next(iter(store.steps.values())))
    del model, store
    gc.collect()
    assert step() is None


def test_options_of_a_generation_config(device: torch.device) -> None:
    model = make_talker("mamba2").to(device)
    ids = random_ids(1, 5).to(device)
    config = GenerationConfig(max_new_tokens=STEPS, do_sample=True, top_k=3, pad_token_id=0)
    assert torch.equal(generate(model, ids, generation_config=config), stock(model, ids, generation_config=config))


@pytest.mark.gpu
def test_a_capture_that_breaks_off_leaves_the_device_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 5).to(device)
    expected = stock(model, ids, max_new_tokens=STEPS, **GREEDY)
    forward = graphs.DecodeStep._forward

    def breaks_off(self: graphs.DecodeStep) -> None:
        forward(self)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    monkeypatch.setattr(graphs.DecodeStep, "_forward", breaks_off)
    assert torch.equal(model.generate(ids, max_new_tokens=STEPS, **GREEDY), expected)
    monkeypatch.undo()
    assert torch.rand(3, device=device).isfinite().all()
    other = make_talker("mamba2").to(device)
    options = {"max_new_tokens": STEPS, "do_sample": True, "eos_token_id": None}
    assert torch.equal(generate(other, ids, replayed=None, **options), stock(other, ids, **options))


@pytest.mark.gpu
def test_memory_is_constant_over_10000_tokens() -> None:
    device = torch.device("cuda", 0)
    model = make_talker("mamba2").to(device)
    ids = random_ids(2, 5).to(device)
    options = {"pad_token_id": 0, **GREEDY}
    model.generate(ids, max_new_tokens=10_000, **options)
    torch.cuda.synchronize()
    peaks = []
    for steps in (100, 10_000):
        torch.cuda.reset_peak_memory_stats()
        model.generate(ids, max_new_tokens=steps, **options)
        peaks.append(torch.cuda.max_memory_allocated())
    # the ids themselves are 8 bytes a token and row, in a few copies
    assert peaks[1] - peaks[0] < 2 * 10_000 * 8 * 8
