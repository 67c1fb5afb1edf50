"""Checks of what is passed to a model's `forward`: each error names the argument, what was given and the way out.

Symbols: B batch, L length, d model width, n packed sequences, W convolution width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

__all__ = [
    "check_cache",
    "check_labels",
    "check_metadata",
    "check_token_inputs",
    "embed_tokens",
    "refuse_unknown",
    "same_lengths",
    "select_cache",
]

INDEX_DTYPES = (torch.int64, torch.int32)


def refuse_unknown(name: str, kwargs: dict[str, Any]) -> None:
    """Raise for arguments nobody reads; None and False mean that nothing was asked for."""
    asked = {key: value for key, value in kwargs.items() if value is not None and value is not False}
    if "output_attentions" in asked:
        raise ValueError(f"{name} has no attention weights to return; drop `output_attentions=True`.")
    if asked:
        raise TypeError(f"{name} got arguments it does not know: {', '.join(sorted(asked))}; check their spelling.")


def check_token_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> None:
    """Raise unless exactly one of the two is given, with the right type and shape."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in INDEX_DTYPES:
            raise TypeError(f"`input_ids` must be an int64 or int32 tensor, got {_kind(input_ids)}.")
        if input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must have shape (B, L), got {tuple(input_ids.shape)}.")
        return
    if not isinstance(inputs_embeds, Tensor) or not inputs_embeds.is_floating_point():
        raise TypeError(f"`inputs_embeds` must be a floating-point tensor, got {_kind(inputs_embeds)}.")
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden_size:
        raise ValueError(f"`inputs_embeds` must have shape (B, L, {hidden_size}), got {tuple(inputs_embeds.shape)}.")


def embed_tokens(embeddings: nn.Module, input_ids: Any) -> Tensor:
    """Call `embeddings` on the tensor `input_ids` (B, L), with an error that says which ids it does not have."""
    weight = getattr(embeddings, "weight", None)
    # an offloaded embedding moves its inputs by itself
    if weight is not None and not hasattr(embeddings, "_hf_hook") and weight.device != input_ids.device:
        raise ValueError(
            f"`input_ids` is on {input_ids.device} but the model is on {weight.device}; move it with "
            "input_ids.to(model.device)."
        )
    if torch.compiler.is_compiling():
        return embeddings(input_ids)
    try:
        return embeddings(input_ids)
    except IndexError as error:
        size = getattr(embeddings, "num_embeddings", "the vocabulary size")
        raise ValueError(
            f"`input_ids` must lie between 0 and {size} - 1, got values from {int(input_ids.min())} to "
            f"{int(input_ids.max())}; use the tokenizer of this model, or resize_token_embeddings() after adding tokens."
        ) from error


def check_metadata(device: torch.device, **arguments: Tensor | None) -> None:
    """Raise unless every given argument is a tensor on `device`, where the token embeddings are."""
    for name, value in arguments.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {_kind(value)}; wrap it in torch.tensor(...).")
        if value.device != device:
            raise ValueError(
                f"`{name}` is on {value.device} but the inputs are on {device}; move it with {name}.to({str(device)!r})."
            )


def check_labels(labels: Any, shape: tuple[int, ...], advice: str = "", name: str = "labels") -> Tensor:
    """`labels` as int64, which losses take; raise unless it is an integer tensor of `shape`."""
    if not isinstance(labels, Tensor) or labels.dtype not in INDEX_DTYPES:
        raise TypeError(f"`{name}` must be an int64 or int32 tensor, got {_kind(labels)}.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"`{name}` must have the shape {shape} of the logits, got {tuple(labels.shape)}{advice}.")
    return labels.to(torch.int64)


def select_cache(*given: Cache | None) -> Cache | None:
    """The one cache among those given under each of its names.

    Raises:
        ValueError: several caches.
        TypeError: something else than a cache.
    """
    caches = [cache for cache in given if cache is not None]
    if not caches:
        return None
    cache = caches[0]
    if any(other is not cache for other in caches):
        raise ValueError(
            "`cache`, `past_key_values` and `cache_params` are names for one cache, but several caches were given; pass "
            "only one of them."
        )
    if not isinstance(cache, Cache):
        raise TypeError(f"`cache` must be a transformers Cache, got {type(cache).__name__}.")
    return cache


def check_cache(cache: Cache, layers: nn.ModuleList) -> None:
    """Raise unless `cache` was made for a model with these layers, as far as its first states tell.

    Raises:
        ValueError: another number of layers, layers of another kind, or states of another shape.
    """
    advice = "; it belongs to another model. Pass RecurrentCache(model.config), or none."
    if len(cache.layers) != len(layers):
        raise ValueError(f"The cache holds {len(cache.layers)} layers, but the model has {len(layers)}{advice}")
    for states, layer in zip(cache.layers, layers, strict=True):
        mixer = getattr(layer, "mixer", None)
        if mixer is None:
            continue
        if not isinstance(states, LinearAttentionLayer):
            raise ValueError(f"The cache holds a {type(states).__name__}, which has no recurrent state{advice}")
        if states.has_previous_state[0]:
            conv_shape, ssm_shape = mixer.state_shapes
            conv_given, ssm_given = (
                () if state is None else tuple(state.shape[1:])
                for state in (states.conv_states[0], states.recurrent_states[0])
            )
            # native classes keep W columns of the W - 1 that are read
            channels, context = conv_shape
            if conv_given not in (conv_shape, (channels, context + 1)) or ssm_given != ssm_shape:
                raise ValueError(
                    f"The cache holds states of shapes {conv_given} and {ssm_given} a row, but the model's are "
                    f"{conv_shape} and {ssm_shape}{advice}"
                )
        return


def same_lengths(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Tensor | None:
    """The one (n + 1,) given under either name."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None or cu_seq_lens_q is cu_seq_lens_k:
        return cu_seq_lens_q if cu_seq_lens_q is not None else cu_seq_lens_k
    if cu_seq_lens_q.shape != cu_seq_lens_k.shape or (
        not torch.compiler.is_compiling() and not torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    ):
        raise ValueError(
            "`cu_seq_lens_q` and `cu_seq_lens_k` must be equal: a recurrent model has one sequence, not two."
        )
    return cu_seq_lens_q


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
