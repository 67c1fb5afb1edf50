"""Generation the slow way: the whole sequence through the model for every token, one row at a time, no cache."""

import torch
from torch import Tensor

from .builders import make_model

TOLERANCE = 1e-5
GREEDY = {"do_sample": False, "eos_token_id": None}


def make_talker(kind: str, **overrides):
    """A tiny language model whose greedy text varies: with tied embeddings, a random one repeats its last token for ever."""
    model = make_model(kind, tie_word_embeddings=False, **overrides)
    model.made_from = (kind, *sorted(overrides.items()))
    return model


_known: dict[tuple, tuple[Tensor, Tensor]] = {}


@torch.no_grad()
def greedy_loop(model, row: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The tokens (steps,) that argmax appends to `row` (L,) without padding, and the logits (steps, V) they came from.

    Remembered for equal models from `make_talker`: many tests ask for the same text.
    """
    key = (model.made_from, tuple(row.tolist()), steps)
    if key not in _known:
        ids, logits = row[None], []
        for _ in range(steps):
            logits.append(model(ids, use_cache=False).logits[0, -1])
            ids = torch.cat([ids, logits[-1].argmax()[None, None]], dim=1)
        _known[key] = ids[0, row.shape[0] :], torch.stack(logits)
    return _known[key]


def assert_continues(model, rows: list[Tensor], prompt: Tensor, steps: int, **kwargs):
    """generate() appends to each row of `prompt` what the slow loop appends to the same entry of `rows`; returns its output."""
    output = model.generate(
        prompt,
        max_new_tokens=steps,
        **{"return_dict_in_generate": True, "output_logits": True, **GREEDY, **kwargs},
    )
    assert len(output.logits) == steps and output.sequences.shape[0] == len(rows)
    logits = torch.stack(output.logits, dim=1)
    for index, row in enumerate(rows):
        tokens, expected = greedy_loop(model, row, steps)
        assert torch.equal(output.sequences[index, -steps:], tokens)
        assert (logits[index] - expected).abs().max().item() <= TOLERANCE
    return output


def padded(rows: list[Tensor], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as (B, L) with padding on one side or, for "middle", after the second token; and its mask."""
    width = max(row.shape[0] for row in rows)
    ids, masks = [], []
    for row in rows:
        cut = {"left": 0, "right": row.shape[0], "middle": min(2, row.shape[0] - 1)}[side]
        gap = width - row.shape[0]
        ids.append(torch.cat([row[:cut], row.new_full((gap,), pad), row[cut:]]))
        masks.append(torch.cat([torch.ones(cut), torch.zeros(gap), torch.ones(row.shape[0] - cut)]).long())
    return torch.stack(ids), torch.stack(masks)
