"""The residual stack around plain mixers, and a plain routed layer, for the reference forwards of the formats.

Symbols: N tokens, d model width, k experts per token.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .plain_mamba import Getter, precise

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["Part", "getter", "plain_logits", "routed"]

Part = Callable[[Getter, Tensor], Tensor]


def getter(source: "CheckpointSource", prefix: str) -> Getter:
    """Reads tensors of `source` below `prefix`, in fp32; None where there is no such tensor."""

    def get(name: str) -> Tensor | None:
        return precise(source.read(prefix + name)) if prefix + name in source else None

    return get


@torch.no_grad()
def plain_logits(
    source: "CheckpointSource",
    input_ids: Tensor,
    *,
    embedding: str,
    layers: str,
    order: Iterable[int],
    sublayers: Sequence[tuple[Part, Part]],
    final_norm: Part,
    head: str,
) -> Tensor:
    """Logits (batch, length, vocabulary): embedding, `x + part(norm(x))` for each sublayer of each layer, norm, head.

    Args:
        input_ids: (batch, length), int64.
        embedding, head: keys of the two matrices; the same key if they are tied.
        layers: prefix of the layers, before their number.
        order: the layers' numbers, in the order in which they run.
        sublayers: pairs (norm, part), each called with a getter for the layer's tensors.
        final_norm: called with a getter for any tensor.
    """
    hidden = precise(source.read(embedding)[input_ids])
    for index in order:
        get = getter(source, f"{layers}{index}.")
        for norm, part in sublayers:
            hidden = hidden + part(get, norm(get, hidden))
    hidden = final_norm(getter(source, ""), hidden)
    return hidden @ precise(source.read(head)).mT


def routed(tokens: Tensor, indices: Tensor, weights: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Every token (N, d) through its experts: the sum over k of `weights` (N, k) times `run(expert, tokens)`."""
    out = torch.zeros_like(tokens)
    for expert in sorted(set(indices.flatten().tolist())):
        for slot in range(indices.shape[1]):
            chosen = (indices[:, slot] == expert).nonzero().flatten()
            if len(chosen):
                out[chosen] += weights[chosen, slot, None] * run(int(expert), tokens[chosen])
    return out
