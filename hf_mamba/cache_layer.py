"""The states of one layer in a cache, and how a mixer reads and writes them.

Symbols: B batch, T drafted tokens, D convolution channels, W convolution width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

__all__ = ["Drafts", "RecurrentLayer", "held_states", "read_states", "write_states"]


@dataclass(frozen=True)
class Drafts:
    """The states of a layer after each of T tokens, of which the first few may turn out to be right.

    Attributes:
        history: (B, K + T, D), the K >= W - 1 inputs of the convolution before the tokens, then those of the tokens.
        states: (B, T, …), the SSM state after each token.
        accepted: (B,) int64, the token after which the next ones come.
    """

    history: Tensor
    states: Tensor
    accepted: Tensor

    @classmethod
    def for_states(cls, conv_state: Tensor, ssm_state: Tensor, tokens: int, accepted: Tensor) -> "Drafts":
        """Buffers for `tokens` tokens after states like these, which still have to be put in."""
        batch, channels, kept = conv_state.shape
        return cls(
            history=conv_state.new_zeros(batch, kept + tokens, channels),
            states=ssm_state.new_zeros(batch, tokens, *ssm_state.shape[1:]),
            accepted=accepted,
        )

    @property
    def tokens(self) -> int:
        return self.states.shape[1]

    @property
    def nbytes(self) -> int:
        return self.history.nbytes + self.states.nbytes

    def after(self, token: int) -> tuple[Tensor, Tensor]:
        """Both states after a token, counted from 0, as views."""
        kept = self.history.shape[1] - self.tokens
        return self.history[:, token + 1 : token + 1 + kept].mT, self.states[:, token]


class RecurrentLayer(LinearAttentionLayer):
    """The convolution state (B, D, W - 1) and the SSM state of one layer.

    `ssm_dtype` is what the SSM state is kept in; None = as it comes.
    """

    def __init__(self, ssm_dtype: torch.dtype | None = None):
        super().__init__()
        self.ssm_dtype = ssm_dtype
        # of the last forward, if it was made to be taken back in part
        self.drafts: Drafts | None = None

    def adopt(self, conv_state: Tensor, ssm_state: Tensor) -> None:
        """Hold these states, which nobody else may hold, instead of copying them into buffers of its own."""
        self.device, self.dtype = conv_state.device, conv_state.dtype
        self.conv_states[0], self.recurrent_states[0] = conv_state, ssm_state
        self.conv_kernel_size[0] = conv_state.shape[-1]
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True

    def _map_states(self, select) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    selected = select(state)
                    # keep the storage where possible: a captured graph reads it by address
                    states[index] = state.copy_(selected) if selected.shape == state.shape else selected

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (B,) of every state."""
        self._map_states(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of every state (integers or a bool mask)."""
        self._map_states(lambda state: state[indices.to(state.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def leave_inference_mode(self) -> None:
        """Replace states made under `torch.inference_mode()`, which may not be changed in place outside it."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None and state.is_inference():
                    states[index] = state.clone()

    def snapshot(self) -> tuple[Tensor, Tensor | None] | None:
        """A copy of the states, or None before the first forward."""
        if not self.has_previous_state[0]:
            return None
        conv_state, ssm_state = self.conv_states[0], self.recurrent_states[0]
        return conv_state.clone(), None if ssm_state is None else ssm_state.clone()

    def go_back(self, token: int) -> None:
        """Copy the states after a drafted token, counted from 0, in place."""
        assert self.drafts is not None
        conv_state, ssm_state = self.drafts.after(token)
        self.conv_states[0].copy_(conv_state)
        self.recurrent_states[0].copy_(ssm_state)

    def restore(self, snapshot: tuple[Tensor, Tensor | None] | None) -> None:
        """Copy the states of `snapshot` back in place."""
        if snapshot is None:
            self.reset()
            return
        conv_state, ssm_state = snapshot
        self.conv_states[0].copy_(conv_state)
        if ssm_state is not None:
            self.recurrent_states[0].copy_(ssm_state)
        self.has_previous_state[0] = True


def read_states(cache: Cache | None, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """The convolution state (B, D, ≥ W - 1) and the SSM state of a layer; (None, None) before the first token."""
    if cache is None:
        return None, None
    layer = cache.layers[layer_idx]
    if getattr(cache, "verifying", False):
        raise RuntimeError("A mixer cannot be called as a module while drafted tokens are verified.")
    if not layer.has_previous_state[0]:
        return None, None
    conv_state, ssm_state = layer.conv_states[0], layer.recurrent_states[0]
    if torch.is_grad_enabled():
        # the buffers are overwritten after this forward, while its backward still needs what was in them
        return conv_state.clone(), ssm_state.clone()
    return conv_state, ssm_state


def write_states(cache: Cache, layer_idx: int, conv_state: Tensor, ssm_state: Tensor) -> None:
    """Store the states of a layer, detached; works on any transformers cache made of linear-attention layers.

    They are written in place where there are buffers for them. The first ones may be kept as they are, so the caller must not
    go on using them.
    """
    layer = cache.layers[layer_idx]
    if isinstance(layer, RecurrentLayer):
        layer.drafts = None
    if isinstance(layer, RecurrentLayer) and not torch.compiler.is_compiling():
        # after reset() the next batch may have another size
        if not layer.is_conv_states_initialized[0] or len(layer.conv_states[0]) != len(conv_state):
            dtype = ssm_state.dtype if layer.ssm_dtype is None else layer.ssm_dtype
            layer.adopt(_owned(conv_state), _owned(ssm_state.to(dtype)))
            return
    conv_state, ssm_state = conv_state.detach(), ssm_state.detach()
    if not layer.is_conv_states_initialized[0] or len(layer.conv_states[0]) != len(conv_state):
        layer.lazy_initialization(conv_states=conv_state)
    if not layer.is_recurrent_states_initialized[0] or len(layer.recurrent_states[0]) != len(ssm_state):
        layer.lazy_initialization(recurrent_states=ssm_state)
    width = conv_state.shape[-1]
    buffer = layer.conv_states[0]
    # a cache that a native class filled keeps W columns; the oldest of them is never read
    buffer[..., buffer.shape[-1] - width :].copy_(conv_state)
    layer.recurrent_states[0].copy_(ssm_state)
    layer.has_previous_state[0] = True


def _owned(state: Tensor) -> Tensor:
    """`state` without its history; a copy where it is part of something larger or a backward may still need it."""
    if torch.is_grad_enabled() or state._base is not None or not state.is_contiguous():
        return state.detach().clone(memory_format=torch.contiguous_format)
    return state


def held_states(layer: RecurrentLayer) -> tuple[Tensor, Tensor] | None:
    """The two states of a layer, not copied; None before the first token."""
    return (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else None
