"""What the models return. Shapes: B batch, L length, d model width, V vocabulary, C classes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from ..cache import name_of_cache
from ..cache_names import OLD_CACHE_NAMES

__all__ = ["RecurrentCausalLMOutput", "RecurrentClassifierOutput", "RecurrentModelOutput"]


class CachedOutput(ModelOutput):
    """An output whose `cache` is also found under `past_key_values` and `cache_params`, its names before transformers 5.24.

    There `generate()` looks for the first of the two that is `in` an output, and passes the cache on under that name.
    """

    if not hasattr(ModelOutput, "cache_params"):

        @property
        def past_key_values(self) -> Any:
            return self.cache if "past_key_values" in self else None

        @property
        def cache_params(self) -> Any:
            return self.cache

        def __contains__(self, key: object) -> bool:
            if key not in OLD_CACHE_NAMES:
                return super().__contains__(key)
            return self.cache is not None and key in ("cache_params", name_of_cache(self.cache))

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__("cache" if key in OLD_CACHE_NAMES and key in self else key)

        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self else default


@dataclass
class RecurrentModelOutput(CachedOutput):
    """
    Attributes:
        last_hidden_state: (B, L, d), after the final norm.
        cache: the `RecurrentCache` that was used, or the transformers cache that was passed in; also to be had as
            `past_key_values` and `cache_params`.
        hidden_states: one (B, L, d) for the embeddings and one for the output of each layer; the last is
            `last_hidden_state`.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RecurrentCausalLMOutput(CachedOutput):
    """
    Attributes:
        loss: (), mean cross-entropy of the next token, if labels were given.
        logits: (B, L, V) fp32, or only the positions of `logits_to_keep`; none with `skip_logits`.
        cache, hidden_states: as in `RecurrentModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
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
