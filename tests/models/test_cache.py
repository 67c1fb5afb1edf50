"""RecurrentCache: its size, copies, batch operations, and going back by exactly as many tokens as asked."""

import copy
import io

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_mamba import RecurrentCache
from hf_mamba.cache import MAX_REPLAY
from hf_mamba.layers import fused_step

from .builders import ALL_MODELS, make_model, make_native, random_ids
from .oracles import TOLERANCE, padded


def states_of(cache) -> list[torch.Tensor]:
    """Every state tensor of a cache, in order."""
    found = [layer.conv_states[0] for layer in cache.layers] + [layer.recurrent_states[0] for layer in cache.layers]
    return [state for state in found if state is not None]


@torch.no_grad()
def fill(model, *pieces: torch.Tensor, recording: bool = False, cache: RecurrentCache | None = None) -> RecurrentCache:
    """A cache that has been fed the pieces one after the other."""
    cache = RecurrentCache(model.config) if cache is None else cache
    if recording:
        cache.activate_past_recording()
    for piece in pieces:
        model(piece, cache=cache)
    return cache


GOING_BACK = pytest.mark.parametrize("replayed", [False, True], ids=["states", "replay"])


def go_back(monkeypatch: pytest.MonkeyPatch, replayed: bool) -> None:
    """Let crop() replay tokens, or take the states after them, which are kept for a few tokens only."""
    if replayed:
        monkeypatch.setattr(fused_step, "MOST_DRAFTED", 0)


@pytest.fixture(params=["states", "replay"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    go_back(monkeypatch, request.param == "replay")


BOTH_WAYS = pytest.mark.usefixtures("both_ways")


@torch.no_grad()
def assert_goes_on(model, cache: RecurrentCache, seen: torch.Tensor, sizes: tuple[int, ...] = (2, 1)) -> None:
    """`cache` behaves as if it had been fed `seen` (B, L) and nothing else."""
    assert cache.get_seq_length() == seen.shape[1]
    new = random_ids(seen.shape[0], sum(sizes), seed=77)
    expected = model(torch.cat([seen, new], dim=1), use_cache=False).logits[:, seen.shape[1] :]
    actual = torch.cat([model(part, cache=cache).logits for part in new.split(sizes, dim=1)], dim=1)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= TOLERANCE


def bytes_by_hand(model, batch: int) -> int:
    config = model.config
    inner = int(config.expand * config.hidden_size)
    if config.model_type == "mamba2":
        conv, ssm = inner + 2 * config.n_groups * config.state_size, inner * config.state_size
    else:
        conv, ssm = inner, inner * config.state_size
    # in MoE-Mamba every other layer is a feed-forward layer without states
    layers = config.num_hidden_layers // 2 if config.model_type == "moe_mamba" else config.num_hidden_layers
    return 4 * batch * layers * (conv * (config.conv_kernel - 1) + ssm)


@ALL_MODELS
def test_size_is_constant_and_known(kind: str) -> None:
    model = make_model(kind)
    cache = RecurrentCache(model.config)
    assert cache.nbytes == 0 and cache.batch_size == -1 and cache.get_seq_length() == 0
    for piece in random_ids(3, 40).split([1, 2, 30, 7], dim=1):
        fill(model, piece, cache=cache)
        assert cache.nbytes == bytes_by_hand(model, 3)
    assert cache.batch_size == 3 and cache.get_seq_length() == 40
    assert cache.get_mask_sizes(5, 0) == (45, 0) and cache.get_max_length() == -1


@BOTH_WAYS
@ALL_MODELS
def test_storage_stays_where_it_is(kind: str) -> None:
    """A captured graph reads the states by address."""
    model = make_model(kind)
    ids = random_ids(2, 12)
    cache = fill(model, ids[:, :3], recording=True)
    addresses = [state.data_ptr() for state in states_of(cache)]
    for change in (
        lambda: fill(model, *ids[:, 3:].split([1, 4, 1, 3], dim=1), cache=cache),
        lambda: cache.crop(-3),
        lambda: fill(model, ids[:, 9:], cache=cache),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.reset(),
        lambda: fill(model, ids, cache=cache),
    ):
        change()
        assert [state.data_ptr() for state in states_of(cache)] == addresses


@ALL_MODELS
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@GOING_BACK
def test_copies_are_independent(kind: str, way: str, replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    go_back(monkeypatch, replayed)
    model = make_model(kind)
    ids = random_ids(2, 9)
    cache = fill(model, ids[:, :5], ids[:, 5:], recording=True)
    cache.crop(-2)
    if way == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_goes_on(model, other, ids[:, :7])
    # the original has not moved, and its snapshots are its own
    assert_goes_on(model, cache, ids[:, :7])
    cache.crop(-4)
    assert_goes_on(model, cache, ids[:, :6])


@ALL_MODELS
def test_batch_operations(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(3, 9)
    cache = fill(model, ids)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    ids = ids[[2, 0, 0]]
    assert_goes_on(model, copy.deepcopy(cache), ids)
    cache.batch_select_indices(torch.tensor([True, True, False]))
    ids = ids[:2]
    assert cache.batch_size == 2
    assert_goes_on(model, copy.deepcopy(cache), ids)
    cache.batch_repeat_interleave(3)
    ids = ids.repeat_interleave(3, dim=0)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([4, 1]))
    assert_goes_on(model, cache, ids[[4, 1]])


@ALL_MODELS
@GOING_BACK
def test_batch_operations_reach_pending_tokens_and_snapshots(
    kind: str, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_back(monkeypatch, replayed)
    model = make_model(kind)
    ids = random_ids(2, 12)
    cache = fill(model, ids[:, :4], ids[:, 4:8], ids[:, 8:], recording=True)
    cache.crop(-2)
    assert cache.pending_length == (2 if replayed else 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    ids = ids[[1, 0]]
    assert_goes_on(model, copy.deepcopy(cache), ids[:, :10])
    cache.crop(-5)
    assert_goes_on(model, cache, ids[:, :5])


@BOTH_WAYS
def test_batch_operations_before_the_first_token() -> None:
    model = make_model("mamba")
    cache = RecurrentCache(model.config)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    cache.crop(0)
    assert_goes_on(model, cache, random_ids(1, 0))


@ALL_MODELS
@pytest.mark.parametrize("cache_class", [RecurrentCache, DynamicCache])
def test_after_a_reset_the_batch_may_differ(kind: str, cache_class: type) -> None:
    model = make_model(kind)
    cache = cache_class(config=model.config)
    with torch.no_grad():
        model(random_ids(1, 5), cache=cache)
        for batch in (3, 1):
            cache.reset()
            ids = random_ids(batch, 6, seed=batch)
            logits = [model(part, cache=cache).logits for part in ids.split([3, 1, 2], dim=1)]
            assert (torch.cat(logits, dim=1) - model(ids).logits).abs().max().item() <= TOLERANCE


@BOTH_WAYS
@ALL_MODELS
@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (4, 4, 3), (1, 7, 1, 2)], ids=str)
@pytest.mark.parametrize("crops", [(-1,), (-3,), (-1, -1, -2), (-3, 0), (-11,)], ids=str)
def test_crop_goes_back_exactly(kind: str, pieces: tuple[int, ...], crops: tuple[int, ...]) -> None:
    model = make_model(kind)
    ids = random_ids(2, 11)
    cache = fill(model, *ids.split(pieces, dim=1), recording=True)
    for count in crops:
        cache.crop(count)
    left = 11 + sum(crops)
    assert_goes_on(model, cache, ids[:, :left])
    if 0 not in crops:
        # and again, over the tokens fed since
        cache.crop(-2)
        new = random_ids(2, 3, seed=77)[:, :1]
        assert_goes_on(model, cache, torch.cat([ids[:, :left], new], dim=1), sizes=(1, 1))


@BOTH_WAYS
@ALL_MODELS
def test_crop_far_back_replays_in_a_forward_of_its_own(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, MAX_REPLAY + 20)
    cache = fill(model, ids, recording=True)
    cache.crop(-5)
    assert cache.pending_length == MAX_REPLAY + 15
    lengths: list[int] = []
    model.backbone.layers[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    fill(model, ids[:, -5:-4], cache=cache)
    assert lengths == [MAX_REPLAY + 15, 1] and cache.pending_length == 0
    assert_goes_on(model, cache, ids[:, :-4], sizes=(1, 2))
    assert cache.recording


@BOTH_WAYS
@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_crop_with_padding_among_the_pending_tokens(kind: str, side: str, count: int) -> None:
    model = make_model(kind, use_bias=True)
    ids, mask = padded([random_ids(5, seed=5), random_ids(8, seed=8)], side)
    new = random_ids(2, 3, seed=4)
    cache, expected = RecurrentCache(model.config), RecurrentCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :1], attention_mask=mask[:, :1], cache=cache)
        model(ids[:, 1:], attention_mask=mask, cache=cache)
        cache.crop(-count)
        left = 8 - count
        model(ids[:, :left], attention_mask=mask[:, :left], cache=expected)
        for part in new.split([2, 1], dim=1):
            logits = [model(part, cache=c).logits for c in (cache, expected)]
            assert (logits[0] - logits[1]).abs().max().item() <= TOLERANCE
    for state, other in zip(states_of(cache), states_of(expected), strict=True):
        assert torch.allclose(state, other, atol=TOLERANCE)


@ALL_MODELS
def test_outputs_leave_out_the_replayed_tokens(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(2, 9)
    cache = fill(model, ids, recording=True)
    cache.crop(-2)
    with torch.no_grad():
        new = random_ids(2, 4, seed=3)
        whole = model(torch.cat([ids[:, :7], new], dim=1), output_hidden_states=True)
        last = copy.deepcopy(cache)
        output = model(new, cache=cache, output_hidden_states=True)
        assert output.logits.shape[1] == 4
        for states, expected in zip(output.hidden_states, whole.hidden_states, strict=True):
            assert states.shape[1] == 4 and torch.allclose(states, expected[:, 7:], atol=TOLERANCE)
        kept = model(new, cache=last, logits_to_keep=1, position_ids=torch.arange(7, 11)[None]).logits
        assert torch.allclose(kept, whole.logits[:, -1:], atol=TOLERANCE)


@BOTH_WAYS
@ALL_MODELS
def test_a_refused_call_loses_no_pending_tokens(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(1, 9)
    cache = fill(model, ids, recording=True)
    cache.crop(-2)
    with pytest.raises(ValueError, match="has 7 tokens to replay"):
        model(random_ids(1, 2), cache=cache, seq_idx=torch.tensor([[0, 1]]))
    assert_goes_on(model, cache, ids[:, :7])


@BOTH_WAYS
def test_snapshots_are_bounded() -> None:
    model = make_model("mamba2")
    ids = random_ids(1, 12)
    cache = RecurrentCache(model.config, max_snapshots=4)
    fill(model, *ids.split(1, dim=1), recording=True, cache=cache)
    assert len(cache._history) == 4
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"cannot go back to token 7: .*raise `max_snapshots`"):
        cache.crop(-5)
    cache.crop(-4)
    assert not cache._history
    assert_goes_on(model, cache, ids[:, :8])
    assert_goes_on(model, before, ids)


@BOTH_WAYS
def test_crop_errors_leave_the_cache_as_it_was() -> None:
    model = make_model("mamba")
    ids = random_ids(1, 6)
    cache = fill(model, ids)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="cannot remove 7 tokens from a cache that has seen 6"):
        cache.crop(-7)
    with pytest.raises(ValueError, match=r"negative number, got 2.*cache.crop\(n - cache"):
        cache.crop(2)
    cache.crop(0)
    assert_goes_on(model, cache, ids)


@GOING_BACK
def test_crop_zero_and_stop_drop_the_snapshots(replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    go_back(monkeypatch, replayed)
    model = make_model("mamba")
    ids = random_ids(1, 6)
    cache = fill(model, *ids.split(2, dim=1), recording=True)
    cache.crop(-1)
    cache.crop(0)
    assert cache.pending_length == (1 if replayed else 0) and cache.recording
    with pytest.raises(ValueError, match="no snapshot"):
        cache.crop(-3)
    assert_goes_on(model, cache, ids[:, :5], sizes=(1, 1))
    cache.stop_past_recording()
    assert not cache.is_recording_past() and not cache._history


@pytest.mark.parametrize(
    ("config", "snapshots", "error", "message"),
    [
        ({"num_hidden_layers": 2}, 4, TypeError, "pass model.config"),
        (None, 4, TypeError, "got NoneType"),
        (transformers.MambaConfig(num_hidden_layers=1), 0, ValueError, "`max_snapshots` must be at least 1, got 0"),
    ],
)
def test_constructor_errors(config, snapshots, error, message) -> None:
    with pytest.raises(error, match=message):
        RecurrentCache(config, max_snapshots=snapshots)


def test_wrong_batch_and_wrong_cache_are_refused() -> None:
    model = make_model("mamba")
    cache = fill(model, random_ids(2, 4))
    with pytest.raises(ValueError, match="batch of 2, but the inputs have a batch of 3"):
        model(random_ids(3, 1), cache=cache)
    with pytest.raises(TypeError, match="must be a transformers Cache, got dict"):
        model(random_ids(2, 1), cache={})
    with pytest.raises(ValueError, match="names for one cache, but several"):
        model(random_ids(2, 1), cache=cache, cache_params=RecurrentCache(model.config))
    with pytest.raises(ValueError, match="use_cache=False"):
        model(random_ids(2, 1), cache=cache, use_cache=False)


@BOTH_WAYS
@ALL_MODELS
def test_a_cache_crosses_inference_mode(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(1, 8)
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    with torch.inference_mode():
        for part in ids.split([5, 1, 2], dim=1):
            model(part, cache=cache)
    cropped, started_again = copy.deepcopy(cache), copy.deepcopy(cache)
    assert_goes_on(model, cache, ids, sizes=(1, 2))
    cropped.crop(-2)
    assert_goes_on(model, cropped, ids[:, :6], sizes=(1, 2))
    started_again.reset()
    assert_goes_on(model, started_again, ids[:, :0], sizes=(1, 2))


@BOTH_WAYS
@ALL_MODELS
def test_states_hold_no_graph(kind: str) -> None:
    model = make_model(kind)
    cache = RecurrentCache(model.config)
    cache.activate_past_recording()
    for part in random_ids(1, 9).split([4, 1, 4], dim=1):
        model(part, cache=cache)
    cache.crop(-2)
    assert not any(state.requires_grad for state in states_of(cache))
    assert not cache._pending[0].requires_grad


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_goes_on_from_a_cache_that_a_native_class_filled(kind: str) -> None:
    """Native classes keep one column more of the convolution's inputs."""
    model = make_model(kind)
    native = make_native(model)
    ids = random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        native(ids[:, :6], cache_params=cache)
        parts = [model(part, cache_params=cache).logits for part in ids[:, 6:].split([1, 2], dim=1)]
        assert (torch.cat(parts, dim=1) - model(ids).logits[:, 6:]).abs().max().item() <= TOLERANCE
