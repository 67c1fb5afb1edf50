"""Which columns of a prompt a model still has to read, in an order that ends with each row's last real token.

Symbols: B batch, L length, d model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..cache import RecurrentCache

__all__ = ["Prompt", "unseen_length"]


@dataclass(frozen=True)
class Prompt:
    """The part of a prompt that is to be fed.

    Attributes:
        input_ids: (B, L) integer.
        inputs_embeds: (B, L, d) to feed instead of `input_ids`, or None.
        attention_mask: (B, L), 0 = padding, or None.
        position_ids: (B, L) or (1, L), only if the caller of generate() gave them.
        order: (B, L), where each column stood before `left_padded`; None if nothing was moved.
    """

    input_ids: Tensor
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    order: Tensor | None = None

    @property
    def length(self) -> int:
        return (self.input_ids if self.inputs_embeds is None else self.inputs_embeds).shape[1]

    def columns(self, start: int, stop: int) -> "Prompt":
        """Columns `start` to `stop` of everything."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, start:stop]

        # with embeddings the ids are only those of generated tokens, which have columns of their own
        input_ids = self.input_ids if self.inputs_embeds is not None else self.input_ids[:, start:stop]
        return Prompt(
            input_ids, cut(self.inputs_embeds), cut(self.attention_mask), cut(self.position_ids), cut(self.order)
        )

    def last(self, count: int) -> "Prompt":
        """The last `count` columns; a mask may have more columns than there are tokens."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, values.shape[1] - count :]

        input_ids = self.input_ids if self.inputs_embeds is not None else self.input_ids[:, self.length - count :]
        return Prompt(input_ids, cut(self.inputs_embeds), cut(self.attention_mask), cut(self.position_ids))

    def left_padded(self) -> "Prompt":
        """Padding moved to the left of each row.

        generate() goes on from the last column, so that has to be a real token; to the states it makes no difference where
        the padding is.
        """
        if self.attention_mask is None:
            return self
        real = self.attention_mask != 0
        if not bool((real[:, :-1] & ~real[:, 1:]).any()):
            return self
        order = real.to(torch.int8).argsort(dim=1, stable=True)
        position_ids = self.position_ids
        if position_ids is not None:
            position_ids = position_ids.expand(order.shape[0], -1).gather(1, order)
        embeds = self.inputs_embeds
        return Prompt(
            input_ids=self.input_ids if embeds is not None else self.input_ids.gather(1, order),
            inputs_embeds=None if embeds is None else embeds.take_along_dim(order[..., None], dim=1),
            attention_mask=self.attention_mask.gather(1, order),
            position_ids=position_ids,
            order=order,
        )

    def restore(self, values: Tensor) -> Tensor:
        """Undo `left_padded` on `values` (B, L, d)."""
        return values if self.order is None else values.take_along_dim(self.order.argsort(dim=1)[..., None], dim=1)


def unseen_length(cache: Cache | None, length: int, mask_length: int) -> int:
    """How many of the last columns of a prompt the cache has not seen.

    Args:
        cache: the cache generate() continues from.
        length: tokens given. If the mask has more columns than that, they are new, otherwise they are the whole sequence.
        mask_length: columns of the attention mask.

    Raises:
        ValueError: there is no token to feed, the mask has a wrong length, or the cache does not count its tokens and the
            mask does not tell.
    """
    if length == 0:
        raise ValueError("The prompt is empty: generate() needs at least one token to go on from.")
    seen = cache.get_seq_length() if isinstance(cache, RecurrentCache) else 0
    counted = cache is None or isinstance(cache, RecurrentCache) or not _is_used(cache)
    if mask_length != length and (mask_length < length or (counted and mask_length != seen + length)):
        cached = f" or {seen + length} with the {seen} cached tokens" if seen else ""
        raise ValueError(f"`attention_mask` must have {length} columns{cached}, got {mask_length}.")
    if isinstance(cache, RecurrentCache):
        unseen = length if mask_length > length else length - seen
        if unseen <= 0:
            raise ValueError(
                f"The cache has seen {seen} tokens, so a prompt of {length} tokens holds nothing new. Pass the full sequence "
                "including at least one token more, only the new tokens with an `attention_mask` for all, or a new cache."
            )
        return unseen
    if not counted and mask_length == length:
        raise ValueError(
            f"A `{type(cache).__name__}` does not count the tokens of a recurrent model, so it is unknown how many of the "
            f"{length} tokens of the prompt it has seen. Pass only the new tokens with an `attention_mask` for all, or use "
            "a hf_mamba.RecurrentCache."
        )
    return length


def _is_used(cache: Cache) -> bool:
    return any(any(getattr(layer, "has_previous_state", {}).values()) for layer in cache.layers)
