"""What the models return. Shapes: B batch, L length, d model width, V vocabulary, C classes."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from ..cache import RecurrentCache

__all__ = ["RecurrentCausalLMOutput", "RecurrentClassifierOutput", "RecurrentModelOutput", "cache_fields"]


@dataclass
class RecurrentModelOutput(ModelOutput):
    """
    Attributes:
        last_hidden_state: (B, L, d), after the final norm.
        past_key_values: the `RecurrentCache`, if one was used.
        cache_params: the same cache under its other name, or the transformers cache that was passed in.
        hidden_states: one (B, L, d) for the embeddings and one for the output of each layer; the last is
            `last_hidden_state`.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RecurrentCausalLMOutput(ModelOutput):
    """
    Attributes:
        loss: (), mean cross-entropy of the next token, if labels were given.
        logits: (B, L, V) fp32, or only the positions of `logits_to_keep`.
        past_key_values, cache_params, hidden_states: as in `RecurrentModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RecurrentClassifierOutput(ModelOutput):
    """
    Attributes:
        loss: (), if labels were given.
        logits: (B, C) for sequences, (B, L, C) for tokens.
        hidden_states: as in `RecurrentModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def cache_fields(cache: Cache | None) -> dict[str, Cache | None]:
    """The two cache fields of an output.

    A `RecurrentCache` is returned under both names. A stock transformers cache only as `cache_params`: under
    `past_key_values`, generate() would build attention masks for it.
    """
    return {
        "past_key_values": cache if isinstance(cache, RecurrentCache) else None,
        "cache_params": cache,
    }
