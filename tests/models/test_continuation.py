"""One sequence, three ways: the whole at once, prompt and single steps, and in chunks of any size."""

import pytest
import torch

from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, make_model, random_ids

LENGTH = 131


def run_in_pieces(model, ids: torch.Tensor, sizes: list[int], **kwargs) -> torch.Tensor:
    cache = RecurrentCache(model.config)
    with torch.no_grad():
        logits = [model(part, cache=cache, **kwargs).logits for part in ids.split(sizes, dim=1)]
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits, dim=1)


def pieces(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


@ALL_MODELS
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_chunks_equal_full_forward(kind: str, size: int) -> None:
    model = make_model(kind)
    ids = random_ids(2, LENGTH if size > 1 else 23)
    with torch.no_grad():
        expected = model(ids).logits
    actual = run_in_pieces(model, ids, pieces(ids.shape[1], size))
    assert (actual - expected).abs().max().item() <= 1e-5


@ALL_MODELS
@pytest.mark.parametrize("prompt", [1, 2, 5, 65])
def test_prompt_then_steps_equals_full_forward(kind: str, prompt: int) -> None:
    model = make_model(kind)
    ids = random_ids(2, prompt + 20)
    with torch.no_grad():
        expected = model(ids).logits
    actual = run_in_pieces(model, ids, [prompt] + [1] * 20)
    assert (actual - expected).abs().max().item() <= 1e-5


@ALL_MODELS
@pytest.mark.parametrize("width", [1, 2, 3, 6])
def test_every_convolution_width(kind: str, width: int) -> None:
    model = make_model(kind, conv_kernel=width)
    ids = random_ids(2, 19)
    with torch.no_grad():
        expected = model(ids).logits
    actual = run_in_pieces(model, ids, [1, 1, 2, 3, 1, 11])
    assert (actual - expected).abs().max().item() <= 1e-5


@ALL_MODELS
def test_continuation_with_gradients_enabled(kind: str) -> None:
    model = make_model(kind)
    ids = random_ids(1, 10)
    cache = RecurrentCache(model.config)
    parts = [model(part, cache=cache).logits for part in ids.split([6, 1, 3], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model(ids).logits, atol=1e-5)
    # each part has its own graph: the states between them are detached
    parts[2].sum().backward()
    assert model.lm_head.weight.grad is not None


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_chunks_equal_the_rows_alone(kind: str, side: str) -> None:
    """Rows of different lengths, padded in every piece, give each row's own logits and states."""
    model = make_model(kind, use_bias=True)
    rows = [random_ids(1, n, seed=n) for n in (9, 14)]
    masks, padded = [], []
    for row in rows:
        gap = 14 - row.shape[1]
        cut = {"left": 0, "right": row.shape[1], "middle": 4}[side]
        fill = torch.zeros(1, gap, dtype=torch.long)
        padded.append(torch.cat([row[:, :cut], fill, row[:, cut:]], dim=1))
        ones, zeros = torch.ones_like(row), fill
        masks.append(torch.cat([ones[:, :cut], zeros, ones[:, cut:]], dim=1))
    ids, mask = torch.cat(padded), torch.cat(masks)
    cache = RecurrentCache(model.config)
    with torch.no_grad():
        outputs = []
        for start, stop in ((0, 6), (6, 7), (7, 14)):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
            outputs.append(out.logits)
        logits = torch.cat(outputs, dim=1)
        for index, row in enumerate(rows):
            alone = RecurrentCache(model.config)
            expected = model(row, cache=alone).logits[0]
            assert (logits[index][mask[index].bool()] - expected).abs().max().item() <= 1e-5
            for layer, single in zip(cache.layers, alone.layers, strict=True):
                if single.has_previous_state[0]:
                    assert torch.allclose(layer.conv_states[0][index], single.conv_states[0][0], atol=1e-5)
                    assert torch.allclose(layer.recurrent_states[0][index], single.recurrent_states[0][0], atol=1e-5)
