"""`generate()` on a recurrent cache: which cache it gets and which tokens it feeds.

Symbols: B batch, L length.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from ..cache import MAX_REPLAY, RecurrentCache, name_of_cache
from ..cache_names import CACHE_NAMES
from ..models.inputs import select_cache
from .graph_loop import USED_UP, plan
from .prompt import Prompt, unseen_length
from .prompt_reader import read_by_graph
from .speculative import plan_speculation

__all__ = ["RecurrentGenerationMixin"]

# a recurrent cache has a constant size, so these two ask for nothing that it does not do already
OWN_CACHE = (None, "dynamic")

# tokens of a batch that are read at once: what a prompt needs besides its ids is then bounded, 2 to 4 GB for 2.8 B parameters in
# half precision, whatever its length
MAX_PREFILL_TOKENS = 2**15

# in the arguments of a generate() that hands out its cache: the end tokens and the length of the prompt
ENDS = "_ends_of_rows"

# in the arguments of a generate() whose prompt has been read already: the model's output for it
PREFILLED = "_output_for_the_prompt"


class RecurrentGenerationMixin(GenerationMixin):
    """Gives `generate()` a `RecurrentCache`, under the name that counts tokens and slices prompts.

    Before 5.24, transformers keeps a Mamba model's cache under `cache_params`, where it does neither; a stock transformers
    cache (`cache_implementation="static"` and the like) stays there. Later versions have one name, `cache`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _keep_signature(cls, "forward")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens as `transformers.GenerationMixin.generate` does, with the same arguments and outputs.

        The cache may be given as `cache`, `past_key_values` or `cache_params`.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: several caches, or other arguments that contradict each other or that nobody reads.
        """
        cache = _take_cache(kwargs)
        if cache is not None:
            kwargs[name_of_cache(cache)] = cache
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        cache = _take_cache(model_kwargs)
        if cache is not None:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"`cache_implementation={generation_config.cache_implementation!r}` asks for a new cache, but "
                    "`cache` was given; use only one of the two."
                )
            cache._is_user_defined = True
        elif generation_config.use_cache is False:
            return
        elif generation_config.cache_implementation == "quantized":
            raise ValueError(
                "`cache_implementation='quantized'` compresses growing key/value pairs; a recurrent cache has a constant "
                "size and none of them. Leave `cache_implementation` out."
            )
        elif generation_config.cache_implementation not in OWN_CACHE:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
            cache = _take_cache(model_kwargs)
            assert cache is not None
        else:
            cache = RecurrentCache(self.config)
        model_kwargs[name_of_cache(cache)] = cache
        if generation_config.is_assistant and isinstance(cache, RecurrentCache):
            cache.activate_past_recording()
            # every token it is about to draft may have to be taken back
            cache.max_snapshots = max(cache.max_snapshots, (generation_config.max_new_tokens or 0) + 1)

    def _get_static_cache_init_shape(self) -> None:
        """None: there are no heads of keys and values to allocate in advance."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching, and `generate_batch` on top of it, pages key/value pairs."""
        raise ValueError(
            "`generate_batch` and continuous batching page key/value pairs, which a recurrent model does not have. Call "
            "generate() with a padded batch and its `attention_mask` instead."
        )

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """None: a recurrent model has no positions, and those of a caller are passed on as they are."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy decoding and sampling: by CUDA graphs where they give the same result, otherwise as transformers does it."""
        cache = _given_cache(model_kwargs)
        loop = plan(
            self,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            model_kwargs=model_kwargs,
            cache=cache,
        )
        if loop is not None:
            assert isinstance(cache, RecurrentCache)
            kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
            ready, outputs = loop.read(self._new_columns(input_ids, generation_config, model_kwargs), cache)
            if ready is None:
                if outputs is None:
                    outputs = self._prefill(input_ids, generation_config, model_kwargs)
                ready = loop.take_over(outputs.logits[:, -1], cache, loop.max_length - input_ids.shape[1])
            if ready is not None:
                return loop.run(ready, input_ids, cache, kept)
            model_kwargs[PREFILLED] = outputs
        return super()._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Feed what the cache has not seen of the prompt, in pieces of `prefill_chunk_size`, or of what memory is planned for.

        Returns:
            The output for the last piece, with the hidden states of all.
        """
        cache = _given_cache(model_kwargs)
        eos = getattr(generation_config, "_eos_token_tensor", None)
        returned = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        if isinstance(cache, RecurrentCache) and returned and eos is not None and len(input_ids) > 1:
            model_kwargs[ENDS] = eos, input_ids.shape[1]
        read = model_kwargs.pop(PREFILLED, None)
        if read is not None:
            return read
        prompt = self._new_columns(input_ids, generation_config, model_kwargs, is_first_iteration).left_padded()
        if generation_config.prefill_chunk_size is not None and cache is None:
            raise ValueError(
                "`prefill_chunk_size` needs a cache to carry the states from piece to piece; drop `use_cache=False`."
            )
        chunk = generation_config.prefill_chunk_size
        if chunk is None:
            chunk = prompt.length if cache is None else max(1, MAX_PREFILL_TOKENS // max(1, len(input_ids)))
        borders = [*range(0, prompt.length, chunk), prompt.length]
        if generation_config.is_assistant and prompt.length > MAX_REPLAY:
            # the last token may be taken back: a snapshot in front of it saves reading the whole prompt again
            borders = sorted({*borders, prompt.length - 1})
        return self._feed(prompt, borders, model_kwargs)

    @staticmethod
    def _new_columns(
        input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Prompt:
        """What the cache has not seen of a prompt."""
        prompt = Prompt(
            input_ids=input_ids,
            # an assistant is called again and again, and drafts after the tokens, not after the first prompt
            inputs_embeds=model_kwargs.get("inputs_embeds") if is_first_iteration else None,
            attention_mask=model_kwargs.get("attention_mask"),
            position_ids=model_kwargs.get("position_ids"),
        )
        return _unseen(prompt, _given_cache(model_kwargs), getattr(generation_config, "_mask_length", None))

    def _feed(self, prompt: Prompt, borders: list[int], model_kwargs: dict[str, Any]) -> Any:
        pieces = []
        for start, stop in pairwise(borders):
            piece = prompt.columns(start, stop)
            columns = {
                "inputs_embeds": piece.inputs_embeds,
                "attention_mask": piece.attention_mask,
                "position_ids": piece.position_ids,
            }
            model_inputs = self.prepare_inputs_for_generation(
                piece.input_ids,
                next_sequence_length=piece.length,
                is_first_iteration=True,
                **{**model_kwargs, **columns},
            )
            outputs = self(**model_inputs, return_dict=True)
            pieces.append(outputs.hidden_states)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                prompt.restore(torch.cat(layer, dim=1)) for layer in zip(*pieces, strict=True)
            )
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of the next forward.

        Args:
            input_ids: (B, L), all tokens so far.
            next_sequence_length: how many of the last tokens to feed; by default those the cache has not seen.
            attention_mask, inputs_embeds: as `forward` takes them.
            is_first_iteration: whether this is the prompt, for which `inputs_embeds` replaces `input_ids`.
            **kwargs: the cache under any of its names, and other arguments of `forward`.

        Raises:
            ValueError: the cache has seen everything already.
        """
        ends = kwargs.pop(ENDS, None)
        cache = _take_cache(kwargs)
        if cache is not None:
            kwargs[name_of_cache(cache)] = cache
        if next_sequence_length is None and isinstance(cache, RecurrentCache):
            prompt = Prompt(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds if is_first_iteration else None,
                attention_mask=attention_mask,
                position_ids=kwargs.get("position_ids"),
            )
            prompt = _unseen(prompt, cache).left_padded()
            input_ids, inputs_embeds, attention_mask = prompt.input_ids, prompt.inputs_embeds, prompt.attention_mask
            kwargs["position_ids"] = prompt.position_ids
        elif cache is not None and not is_first_iteration:
            # what follows the prompt was generated, so it is real but after a row's end; looking at a mask costs a
            # synchronisation
            attention_mask = None if ends is None else _before_the_end(input_ids, *ends)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _assisted_decoding(
        self, input_ids: Tensor, *args: Any, inputs_tensor: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Assisted and prompt-lookup decoding.

        The states are moved up to the last token of the prompt first: the loop would feed the prompt together with the first
        candidates, and to take one of those back would then mean to read the whole prompt again.
        """
        decode = super()._assisted_decoding
        generation_config = kwargs["generation_config"]
        cache = _given_cache(kwargs)
        if not isinstance(cache, RecurrentCache):
            return decode(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)
        recording = cache.recording
        if kwargs.get("inputs_embeds") is not None and input_ids.shape[0] == 1:
            # the loop would cut the mask to the length of the ids
            mask = kwargs.pop("attention_mask", None)
            kwargs["inputs_embeds"] = self._without_padding(input_ids, cache, kwargs["inputs_embeds"], mask)
        # hidden states are wanted for the whole prompt at once
        if (
            input_ids.shape[0] == 1
            and kwargs.get("inputs_embeds") is None
            and not generation_config.output_hidden_states
        ):
            options = inspect.signature(decode).parameters
            self._feed_all_but_last(
                input_ids, generation_config, {k: v for k, v in kwargs.items() if k not in options}
            )
        loop = plan_speculation(self, input_ids, cache, kwargs)
        if loop is not None:
            kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
            result = loop.run(input_ids, cache, kept)
            if result is not None:
                return result
        try:
            return decode(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)
        finally:
            if not recording:
                cache.stop_past_recording()

    @staticmethod
    def _without_padding(input_ids: Tensor, cache: RecurrentCache, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """The real ones of the embeddings (1, L, d), and those the cache has seen."""
        if input_ids.shape[1] > 0:
            raise ValueError(
                "Assisted and prompt-lookup decoding take a prompt as `input_ids` or as `inputs_embeds`, not both; drop one."
            )
        if mask is None:
            return embeds
        keep = mask[0] != 0
        keep[: cache.get_seq_length()] = True
        return embeds[:, keep]

    def _feed_all_but_last(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        prompt = Prompt(
            input_ids=input_ids,
            inputs_embeds=None,
            attention_mask=model_kwargs.get("attention_mask"),
            position_ids=model_kwargs.get("position_ids"),
        )
        prompt = _unseen(prompt, _given_cache(model_kwargs), getattr(generation_config, "_mask_length", None))
        count = prompt.length - 1
        mask = prompt.attention_mask
        # the loop goes on from the last column: with right padding it has to be given the whole prompt
        if count > 0 and (mask is None or bool(mask[0, -1])):
            chunk = generation_config.prefill_chunk_size or MAX_PREFILL_TOKENS
            prompt, cache = prompt.columns(0, count).left_padded(), _given_cache(model_kwargs)
            plain = all(name in USED_UP or value is None for name, value in model_kwargs.items())
            if not (
                plain and isinstance(cache, RecurrentCache) and read_by_graph(self, prompt, cache, generation_config)
            ):
                self._feed(prompt, [*range(0, count, chunk), count], model_kwargs)


def _keep_signature(cls: type, *names: str) -> None:
    """Have the signatures of methods ready, which generate() asks for again and again: each takes it 0.1 ms to find out."""
    for name in names:
        method = vars(cls).get(name)
        if inspect.isfunction(method):
            method.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]


_keep_signature(RecurrentGenerationMixin, "prepare_inputs_for_generation", "_sample")


def _given_cache(model_kwargs: dict[str, Any]) -> Cache | None:
    return select_cache(*(model_kwargs.get(name) for name in CACHE_NAMES))


def _take_cache(model_kwargs: dict[str, Any]) -> Cache | None:
    return select_cache(*(model_kwargs.pop(name, None) for name in CACHE_NAMES))


def _before_the_end(input_ids: Tensor, eos: Tensor, prompt_length: int) -> Tensor:
    """(B, 1), 0 for rows that have ended before the last token: what a batch appends to them would spoil their states."""
    ended = torch.isin(input_ids[:, prompt_length:-1], eos.to(input_ids.device)).any(dim=1, keepdim=True)
    return (~ended).long()


def _unseen(prompt: Prompt, cache: Cache | None, mask_length: int | None = None) -> Prompt:
    """The columns of `prompt` that the cache has not seen; without any mask, `prompt` is the whole sequence."""
    if prompt.attention_mask is not None:
        mask_length = prompt.attention_mask.shape[1]
    elif mask_length is None or prompt.inputs_embeds is not None:
        mask_length = prompt.length
    return prompt.last(unseen_length(cache, prompt.length, mask_length))
