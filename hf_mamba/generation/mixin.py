"""`generate()` on a recurrent cache: which cache it gets and which tokens it feeds."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from ..cache import RecurrentCache

__all__ = ["RecurrentGenerationMixin"]

# a recurrent cache has a constant size, so these two ask for nothing that it does not do already
OWN_CACHE = (None, "dynamic")


class RecurrentGenerationMixin(GenerationMixin):
    """Gives `generate()` a `RecurrentCache` under `past_key_values`.

    transformers looks for a Mamba model's cache under `cache_params`, where it neither counts tokens nor slices the prompt.
    A stock transformers cache (`cache_implementation="static"` and the like) stays there.
    """

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        given = {name: model_kwargs.pop(name, None) for name in ("past_key_values", "cache_params")}
        caches = [cache for cache in given.values() if cache is not None]
        if len(caches) == 2 and caches[0] is not caches[1]:
            raise ValueError(
                "`past_key_values` and `cache_params` are two names for one cache; give only one of them."
            )
        if caches:
            if not isinstance(caches[0], Cache):
                raise TypeError(f"`past_key_values` must be a RecurrentCache, got {type(caches[0]).__name__}.")
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"`cache_implementation={generation_config.cache_implementation!r}` asks for a new cache, but "
                    "`past_key_values` was given; use only one of the two."
                )
            caches[0]._is_user_defined = True
            model_kwargs["past_key_values" if isinstance(caches[0], RecurrentCache) else "cache_params"] = caches[0]
            return
        if generation_config.use_cache is False:
            return
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "`cache_implementation='quantized'` compresses growing key/value pairs; a recurrent cache has a constant "
                "size and none of them. Leave `cache_implementation` out."
            )
        if generation_config.cache_implementation not in OWN_CACHE:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
            return
        cache = RecurrentCache(self.config)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice the prompt to the tokens the cache has not seen.

        Raises:
            ValueError: the cache has seen the whole prompt already.
        """
        if next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"The cache has seen {past_key_values.get_seq_length() if past_key_values is not None else 0} tokens, so a "
                f"prompt of {input_ids.shape[1]} tokens holds nothing new. Pass the full sequence including at least one "
                "token more, or a new cache."
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )
