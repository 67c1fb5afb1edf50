"""Prompts that are read by CUDA graphs, in graphs that are longer than they are, give what the model gives.

Here without a GPU, what would be captured is called instead; with `-m gpu` the same tests run on real graphs.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_mamba import RecurrentCache
from hf_mamba.generation import graphs
from hf_mamba.generation.fingerprint import Watch
from hf_mamba.generation.prompt import Prompt
from hf_mamba.generation.prompt_graphs import MAX_TOKENS, PromptGraph, PromptShape, RowPrompt, bucket

from .builders import ALL_MODELS, random_ids
from .on_graphs import DEVICES, generate, graph_device, stock
from .oracles import GREEDY, TOLERANCE, make_talker, padded

STEPS = 8

device = pytest.fixture(params=DEVICES)(graph_device)


class Reads:
    """How many prompts graphs have read, of which shapes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[PromptShape] = []
        read = PromptGraph.read

        def counted(graph: PromptGraph, prompt: RowPrompt) -> None:
            self.shapes.append(graph.shape)
            read(graph, prompt)

        monkeypatch.setattr(PromptGraph, "read", counted)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def assert_read(model: Any, reads: Reads, *args: Any, times: int = 3, **options: Any) -> None:
    """`times` calls of generate() give what the stock loop gives, the last of them by a graph of the prompt."""
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **GREEDY, **options}
    expected = stock(model, *args, **options)
    for _ in range(times):
        before = len(reads.shapes)
        result = generate(model, *args, **options)
        assert torch.equal(result.sequences, expected.sequences)
        for mine, theirs in zip(result.logits, expected.logits, strict=True):
            torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        caches = [output.past_key_values for output in (result, expected)]
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        for mine, theirs in zip(caches[0].states(), caches[1].states(), strict=True):
            for state, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(state, other, atol=TOLERANCE, rtol=TOLERANCE)
    assert len(reads.shapes) == before + captures_prompts(model)


def captures_prompts(model: Any) -> bool:
    """Whether prompts can be captured: experts that run one by one, as those of the MoE-Mamba of these tests may, cannot be."""
    refused = graphs.PROMPTS in graphs._graphs[model].refused
    assert not refused or (model.config.model_type == "moe_mamba" and model.device.type == "cuda")
    return not refused


@ALL_MODELS
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 33])
@pytest.mark.parametrize("use_bias", [False, True], ids=["", "bias"])
def test_a_prompt(device: torch.device, reads: Reads, kind: str, length: int, use_bias: bool) -> None:
    """Lengths 1 to 3 are shorter than the convolution; 16 fills its graph. With biases, padding is told by `seq_idx`."""
    model = make_talker(kind, use_bias=use_bias).to(device)
    in_front = not use_bias and kind != "moe_mamba"
    assert model.backbone.pads_in_front() == in_front
    for batch in (1, 3):
        assert_read(model, reads, random_ids(batch, length).to(device))
        if captures_prompts(model):
            assert reads.shapes[-1] == (bucket(length), length == bucket(length), True)


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("use_bias", [False, True], ids=["", "bias"])
def test_padded_batches(device: torch.device, reads: Reads, kind: str, side: str, use_bias: bool) -> None:
    model = make_talker(kind, use_bias=use_bias).to(device)
    prompt, mask = (t.to(device) for t in padded([random_ids(n, seed=n) for n in (3, 18, 1)], side))
    assert_read(model, reads, prompt, attention_mask=mask)
    # rows of one length, all of them padded, which fill the graph
    prompt, mask = (t.to(device) for t in padded([random_ids(16, seed=n) for n in (3, 18, 1)], side))
    prompt, mask = (nn.functional.pad(t, (5, 2)) for t in (prompt, mask))
    assert_read(model, reads, prompt, attention_mask=mask)
    assert not captures_prompts(model) or reads.shapes[-1] == (16, True, True)


def test_a_prompt_is_captured_when_it_comes_again(device: torch.device, reads: Reads) -> None:
    model = make_talker("mamba").to(device)
    for length in (17, 18, 19):
        generate(model, random_ids(1, length).to(device), max_new_tokens=STEPS, **GREEDY)
    assert reads.shapes == 2 * [(32, False, True)]
    # without padding it is another graph
    for _ in range(2):
        generate(model, random_ids(1, 32).to(device), max_new_tokens=STEPS, **GREEDY)
    assert reads.shapes[2:] == [(32, True, True)]
    # other options of generate() change nothing about the prompt
    generate(model, random_ids(1, 20).to(device), max_new_tokens=STEPS, do_sample=True, top_k=3)
    assert reads.shapes[3:] == [(32, False, True)]
    # another batch does
    generate(model, random_ids(2, 20).to(device), max_new_tokens=STEPS, **GREEDY)
    assert len(reads.shapes) == 4


def test_the_first_prompt_of_a_length_is_padded_as_those_after_it(device: torch.device, reads: Reads) -> None:
    """So its result is the same to the last bit, and no kernel is compiled when a graph is captured."""
    model, lengths = make_talker("mamba2").to(device), []
    embeddings = type(model.backbone.embeddings)
    forward = embeddings.forward

    def counted(self: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        lengths.append(tuple(ids.shape))
        return forward(self, ids)

    ids = random_ids(2, 37).to(device)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "forward", counted)
        first = generate(model, ids, **options)
        assert lengths[0] == (2, 48)
    for _ in range(2):
        later = generate(model, ids, **options)
        assert torch.equal(torch.stack(later.logits), torch.stack(first.logits))
    assert len(reads.shapes) == 2


@ALL_MODELS
def test_conversations(device: torch.device, reads: Reads, kind: str) -> None:
    """Later turns go on from the states of a cache."""
    model = make_talker(kind).to(device)
    turns = [random_ids(1, n, seed=n).to(device) for n in (5, 3, 16)]
    for _ in range(3):
        cache, whole = RecurrentCache(model.config), turns[0][:, :0]
        for turn in turns:
            whole = torch.cat([whole, turn], dim=1)
            expected = stock(model, whole, max_new_tokens=STEPS, **GREEDY)
            whole = generate(model, whole, cache=cache, max_new_tokens=STEPS, **GREEDY)
            assert torch.equal(whole, expected)
            assert cache.get_seq_length() == whole.shape[1] - 1
    if captures_prompts(model):
        assert {(16, False, False), (16, False, True), (32, False, False)} <= set(reads.shapes)


def test_a_cache_with_a_longer_mask(device: torch.device, reads: Reads) -> None:
    """Only the new tokens are given, and the mask tells of those before."""
    model = make_talker("mamba2").to(device)
    first, second = random_ids(2, 9).to(device), random_ids(2, 4, seed=3).to(device)
    mask = torch.ones(2, 13, dtype=torch.int64, device=device)
    mask[0, 9] = 0
    for index in range(3):
        results = []
        for run in (stock, generate):
            cache = RecurrentCache(model.config)
            with torch.no_grad():
                model(first, cache=cache)
            options = {"attention_mask": mask, "cache": cache, "max_new_tokens": STEPS}
            results.append(run(model, second, **options, **GREEDY))
        assert torch.equal(*results)
        assert len(reads.shapes) == index


def test_rounding_in_half_precision(device: torch.device, reads: Reads) -> None:
    model = make_talker("mamba2").to(device, torch.bfloat16)
    ids = random_ids(2, 37).to(device)
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    expected = stock(model, ids, **options).logits[0]
    for _ in range(2):
        generate(model, ids, **options | {"max_new_tokens": STEPS})
    logits = generate(model, ids, **options).logits[0]
    assert len(reads.shapes) == 2
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_two_models(device: torch.device, reads: Reads) -> None:
    models = [make_talker("mamba", seed=seed).to(device) for seed in (1, 2)]
    ids = random_ids(1, 7).to(device)
    expected = [stock(model, ids, max_new_tokens=STEPS, **GREEDY) for model in models]
    assert not torch.equal(*expected)
    for _ in range(3):
        for model, tokens in zip(models, expected, strict=True):
            assert torch.equal(generate(model, ids, max_new_tokens=STEPS, **GREEDY), tokens)
    assert len(reads.shapes) == 4


@torch.no_grad()
def _change_weights(model: Any) -> None:
    model.backbone.layers[0].mixer.in_proj.weight.mul_(-1.0)


def _replace_weights(model: Any) -> None:
    layer = model.backbone.layers[0].mixer.out_proj
    layer.weight = nn.Parameter(-layer.weight.detach())


def _replace_data(model: Any) -> None:
    weight = model.lm_head.weight
    weight.data = -weight.data


def _change_a_setting(model: Any) -> None:
    model.backbone.norm_f.variance_epsilon = 10.0


def _replace_a_module(model: Any) -> None:
    mixer = model.backbone.layers[1].mixer
    linear = nn.Linear(mixer.in_proj.in_features, mixer.in_proj.out_features, bias=False)
    mixer.in_proj = linear.eval().to(mixer.in_proj.weight)


CHANGES = [_change_weights, _replace_weights, _replace_data, _change_a_setting, _replace_a_module]


@pytest.mark.parametrize("change", CHANGES)
def test_never_a_stale_graph(device: torch.device, reads: Reads, change: Callable[[Any], None]) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(2, 6).to(device)
    assert_read(model, reads, ids)
    change(model)
    assert_read(model, reads, ids)


def test_what_changes_is_noticed() -> None:
    for change in CHANGES[1:]:
        model = make_talker("mamba2")
        watch = Watch(model)
        assert watch.unchanged()
        change(model)
        assert not watch.unchanged()
    model = make_talker("mamba2")
    watch = Watch(model)
    assert watch.readable()
    _change_a_setting(model)
    assert watch.readable()
    _replace_weights(model)
    assert not watch.readable()
    model = make_talker("mamba2")
    watch = Watch(model)
    _replace_data(model)
    assert not watch.readable()
    model = make_talker("mamba2")
    model.options = {"scale": [1.0]}
    watch = Watch(model)
    # values are read anew by every replay
    _change_weights(model)
    assert watch.unchanged()
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: None)
    assert not watch.unchanged()
    handle.remove()
    assert watch.unchanged()
    model.options["scale"].append(2.0)
    assert not watch.unchanged()
    model.options["scale"].pop()
    assert watch.unchanged()
    model.train()
    assert not watch.unchanged()
    model.eval()
    assert watch.unchanged()
    model.backbone.layers[0].mixer.forward = lambda *_: None
    assert not watch.unchanged()
    del model.backbone.layers[0].mixer.forward
    assert watch.unchanged()
    del model.backbone.layers[0].mixer.time_step_limit
    assert not watch.unchanged()


def test_what_takes_the_model(device: torch.device, reads: Reads) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 9).to(device)
    mask = torch.ones(2, 9, dtype=torch.int64, device=device)
    mask[1] = 0
    for args, options in (
        ((ids,), {"position_ids": torch.arange(9, device=device)[None]}),
        ((ids,), {"prefill_chunk_size": 4}),
        ((), {"inputs_embeds": model.get_input_embeddings()(ids)}),
        ((ids.expand(2, -1),), {"attention_mask": mask}),
        ((ids.expand(MAX_TOKENS // 16 + 1, -1),), {}),
    ):
        for _ in range(3):
            generate(model, *args, replayed=None, max_new_tokens=STEPS, **GREEDY, **options)
        assert not reads.shapes

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert "layout" not in kwargs
            return super().forward(*args, **kwargs)

    model.__class__ = Own
    for _ in range(3):
        generate(model, ids, max_new_tokens=STEPS, **GREEDY)
    assert not reads.shapes


@pytest.mark.parametrize("error", [RuntimeError, torch.cuda.OutOfMemoryError])
def test_a_capture_that_fails(
    device: torch.device, reads: Reads, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    model = make_talker("mamba").to(device)
    ids = random_ids(1, 5).to(device)
    expected = stock(model, ids, max_new_tokens=STEPS, **GREEDY)
    attempts, warnings = [], []

    def fail(self: PromptGraph) -> None:
        attempts.append(1)
        raise error("no")

    monkeypatch.setattr(PromptGraph, "_forward", fail)
    monkeypatch.setattr(graphs.logger, "warning_once", warnings.append)
    for length in (5, 5, 5, 30, 30, 30):
        generate(model, random_ids(1, length).to(device), max_new_tokens=STEPS, **GREEDY)
    assert torch.equal(generate(model, ids, max_new_tokens=STEPS, **GREEDY), expected)
    assert len(attempts) == 1 and not reads.shapes
    assert len(warnings) == (error is torch.cuda.OutOfMemoryError)


def test_their_number_is_bounded(device: torch.device, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_PROMPTS", 2)
    monkeypatch.setattr(graphs, "MAX_SEEN", 5)
    model = make_talker("mamba").to(device)
    for length in (5, 5, 20, 20, 40, 40, 20):
        generate(model, random_ids(1, length).to(device), max_new_tokens=STEPS, **GREEDY)
    assert [shape.length for shape in reads.shapes] == [16, 32, 48, 32]
    store = graphs._graphs[model]
    (step,) = store.steps.values()
    assert [shape.length for shape in step.prompts] == [48, 32]
    for length in range(1, 300, 20):
        generate(model, random_ids(1, length).to(device), max_new_tokens=STEPS, **GREEDY)
    assert len(store.seen) == 5


def test_buckets() -> None:
    lengths = range(1, 5000)
    chosen = [bucket(length) for length in lengths]
    assert chosen == sorted(chosen) and all(b >= n for b, n in zip(chosen, lengths, strict=True))
    assert [bucket(n) for n in (1, 16, 17, 33, 129, 1025, 2048, 2049)] == [16, 16, 32, 48, 160, 1280, 2048, 2560]
    assert all(bucket(b) == b and b % 16 == 0 for b in chosen)
    assert max((b - n) / b for b, n in zip(chosen, lengths, strict=True) if n > 64) <= 0.2
    # few graphs serve all
    assert len({b for b in chosen if b <= MAX_TOKENS}) == 28


def test_rows_are_aligned() -> None:
    ids = torch.tensor([[0, 5, 6, 0, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    rows = RowPrompt.of(Prompt(ids, None, mask, None))
    assert rows is not None and rows.lengths is not None
    assert rows.input_ids[0, 2:].tolist() == [5, 6, 7] and rows.input_ids[1].tolist() == [1, 2, 3, 4, 5]
    written, lengths = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    rows.write(written, lengths)
    assert written[1].tolist() == [0, 0, 0, 1, 2, 3, 4, 5] and written[0, 5:].tolist() == [5, 6, 7]
    assert lengths.tolist() == [3, 5]
    assert rows.lengths.tolist() == [3, 5] and rows.longest == 5 and not rows.equal
    assert rows.shape(True) == (16, False, True)
    assert RowPrompt.of(Prompt(ids, None, mask * torch.tensor([[1], [0]]), None)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_no_call_of_a_warm_process_compiles(kind: str, reads: Reads) -> None:
    """After one prompt of any length, lengths that are new, and those that are captured, come without waiting."""
    device = torch.device("cuda", 0)
    heads = {"num_heads": 16} if kind == "mamba2" else {}
    model = make_talker(kind, hidden_size=64, num_hidden_layers=4, **heads).to(device, torch.bfloat16)
    times = []
    for length in (121, 121, 121, 100, 100, 100, 17, 17, 17, 300, 300, 300, 301, 256, 256, 1948, 1948, 1948):
        ids = random_ids(1, length).to(device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=STEPS, **GREEDY)
        torch.cuda.synchronize()
        times.append((length, time.perf_counter() - start))
    assert len(reads.shapes) > 10
    # chunks of long prompts take kernels of their own, the first time
    assert all(seconds < 2 for length, seconds in times[2:15]), times
    assert all(seconds < 2 for length, seconds in times[16:]), times


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_experts_in_half_precision(device: torch.device, reads: Reads) -> None:
    model = make_talker("moe_mamba", moe_intermediate_size=32).to(device, torch.bfloat16)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    ids = random_ids(2, 37).to(device)
    expected = stock(model, ids, **options).logits[0]
    for _ in range(3):
        logits = generate(model, ids, **options).logits[0]
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert len(reads.shapes) == 2 * captures_prompts(model)


@pytest.mark.gpu
def test_a_million_tokens_in_bounded_memory() -> None:
    device = torch.device("cuda", 0)
    model = make_talker("mamba").to(device)
    peaks = []
    for length in (100_000, 1_000_000):
        ids = random_ids(1, length).to(device)
        model.generate(ids[:, :100], max_new_tokens=2, **GREEDY)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.generate(ids, max_new_tokens=5, **GREEDY)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # ids and mask are 8 bytes a token each, in a few copies
    assert peaks[1] - peaks[0] < 900_000 * 8 * 10


@pytest.mark.gpu
def test_graphs_of_prompts_share_their_memory() -> None:
    device = torch.device("cuda", 0)
    model = make_talker("mamba", hidden_size=256).to(device)
    for _ in range(2):
        model.generate(random_ids(1, 4096).to(device), max_new_tokens=STEPS, **GREEDY)
    reserved = torch.cuda.memory_reserved()
    for length in range(2048, 4096, 256):
        for _ in range(2):
            model.generate(random_ids(1, length).to(device), max_new_tokens=STEPS, **GREEDY)
    (step,) = graphs._graphs[model].steps.values()
    # 2,560 to 4,096 with padding, and 2,048 to 4,096 without
    assert len(step.prompts) == 9
    # one of them takes about 30 MB on the way
    assert torch.cuda.memory_reserved() - reserved < 2**25
