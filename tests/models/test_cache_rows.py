"""Rows of a RecurrentCache: taken out, put in, saved and loaded, as a caller with a batch of its own needs them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_mamba import RecurrentCache
from hf_mamba.layers import fused_step

from .builders import ALL_MODELS, make_model, random_ids
from .test_cache import assert_goes_on, fill, states_of


@ALL_MODELS
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_selected_rows_go_on_by_themselves(kind: str, as_tensor: bool) -> None:
    model, ids = make_model(kind), random_ids(3, 7)
    cache = fill(model, ids)
    rows = [2, 0, 0, 1]
    chosen = cache.select(torch.tensor(rows) if as_tensor else rows)
    assert_goes_on(model, chosen, ids[rows])
    # the cache they were taken from has not moved
    assert_goes_on(model, cache, ids)


@ALL_MODELS
def test_continuous_batching(kind: str) -> None:
    """Row 1 has ended and a new text takes its place; the other rows do not notice."""
    model = make_model(kind)
    old, new = random_ids(3, 9), random_ids(1, 4, seed=9)
    cache = fill(model, old)
    addresses = [state.data_ptr() for state in states_of(cache)]
    cache.insert([1], fill(model, new))
    assert [state.data_ptr() for state in states_of(cache)] == addresses
    assert cache.get_seq_length() == 9
    follow = random_ids(3, 3, seed=4)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache).logits for part in follow.split([1, 2], dim=1)], dim=1)
        for row, seen in enumerate((old[:1], new, old[2:])):
            expected = model(torch.cat([seen, follow[row : row + 1]], dim=1)).logits[0, seen.shape[1] :]
            assert (logits[row] - expected).abs().max().item() <= 1e-5


@ALL_MODELS
def test_a_prefix_is_read_once_for_many_continuations(kind: str) -> None:
    model, prefix = make_model(kind), random_ids(1, 8)
    once = fill(model, prefix)
    for seed in (5, 6):
        ends = random_ids(2, 3, seed=seed)
        cache = fill(model, ends, cache=once.select([0, 0]))
        assert_goes_on(model, cache, torch.cat([prefix.expand(2, -1), ends], dim=1))


@ALL_MODELS
def test_a_saved_conversation_goes_on(kind: str, tmp_path: Path) -> None:
    model, ids = make_model(kind), random_ids(2, 6)
    cache = fill(model, ids)
    path = tmp_path / "talk.safetensors"
    cache.save(path)
    short = path.stat().st_size
    loaded = RecurrentCache.load(path, model.config)
    assert loaded.nbytes == cache.nbytes and cache.nbytes < short < cache.nbytes + 2000
    assert_goes_on(model, loaded, ids)
    more = random_ids(2, 50, seed=3)
    fill(model, more, cache=cache).save(path)
    # one digit more in the header at most
    assert abs(path.stat().st_size - short) <= 8
    assert_goes_on(model, RecurrentCache.load(path, model.config), torch.cat([ids, more], dim=1))
    assert [file.name for file in tmp_path.iterdir()] == ["talk.safetensors"]


@torch.no_grad()
def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mamba")
    empty, cache = RecurrentCache(model.config), fill(model, random_ids(2, 3))
    for rows, message in (
        ([2], "between 0 and 1"),
        ([-1], "between 0 and 1"),
        ([], "row numbers"),
        ([0.5], "row numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.select(rows)
    with pytest.raises(ValueError, match="no states yet"):
        empty.select([0])
    with pytest.raises(ValueError, match="no states yet"):
        empty.save(tmp_path / "no")
    with pytest.raises(ValueError, match="each once, for each of the 2 rows"):
        cache.insert([0, 0], cache.select([0, 1]))
    with pytest.raises(ValueError, match="each once, for each of the 2 rows"):
        cache.insert([0], cache.select([0, 1]))
    wide = make_model("mamba", state_size=9)
    with pytest.raises(ValueError, match="belong to different models"):
        cache.insert([0], fill(wide, random_ids(1, 3)))
    deep = make_model("mamba", num_hidden_layers=3)
    with pytest.raises(ValueError, match="RecurrentCache of 2 layers"):
        cache.insert([0], fill(deep, random_ids(1, 3)))
    path = tmp_path / "talk.safetensors"
    fill(deep, random_ids(1, 3)).save(path)
    with pytest.raises(ValueError, match="model of 3 layers, but `config` has 2"):
        RecurrentCache.load(path, model.config)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
        RecurrentCache.load(path, deep.config)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"not written by RecurrentCache.save\(\)"):
        RecurrentCache.load(path, model.config)
    recorded = fill(model, random_ids(1, 2), random_ids(1, 5), recording=True)
    recorded.crop(-2)
    # the states were at hand
    assert recorded.select([0]).get_seq_length() == 5
    monkeypatch.setattr(fused_step, "MOST_DRAFTED", 0)
    recorded = fill(model, random_ids(1, 2), random_ids(1, 5), recording=True)
    recorded.crop(-2)
    for use in (lambda: recorded.select([0]), lambda: recorded.save(path), lambda: cache.insert([0], recorded)):
        with pytest.raises(ValueError, match="replay after crop"):
            use()


@ALL_MODELS
@torch.no_grad()
def test_states_in_half_precision(kind: str, tmp_path: Path) -> None:
    """Half the memory, and logits that differ by the rounding of the states alone."""
    model, ids = make_model(kind), random_ids(2, 30)
    full, half = RecurrentCache(model.config), RecurrentCache(model.config, ssm_dtype=torch.bfloat16)
    sizes = [9, *[1] * 12, 4, *[1] * 5]
    expected, actual = (
        torch.cat([model(part, cache=cache).logits for part in ids.split(sizes, dim=1)], dim=1)
        for cache in (full, half)
    )
    conv = sum(pair[0].numel() * 4 for pair in full.states())
    assert half.nbytes - conv == (full.nbytes - conv) // 2
    assert {pair[1].dtype for pair in half.states()} == {torch.bfloat16}
    difference = (actual - expected).abs().max().item()
    assert 0 < difference <= 2e-2 * expected.abs().max().item()
    # the first piece is computed before anything is rounded
    assert torch.equal(actual[:, :9], expected[:, :9])
    chosen = half.select([1])
    half.save(tmp_path / "half")
    for cache in (chosen, RecurrentCache.load(tmp_path / "half", model.config)):
        assert {pair[1].dtype for pair in cache.states()} == {torch.bfloat16}


def test_states_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`ssm_dtype` must be torch\.float32"):
        RecurrentCache(make_model("mamba").config, ssm_dtype=torch.int8)
