"""Where drafts come from: what followed the same tokens before, or an assistant, which is a smaller model.

A source is what a call of generate() says about its drafts; a drafter holds the buffers and does the work, inside of a CUDA
graph. Which draft it is makes no difference to the tokens.

Symbols: T tokens of a step (a draft of T - 1), S places for the text, G longest match.
"""

import weakref
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import RecurrentCache, name_of_cache
from ..cache_layer import held_states
from . import graphs

__all__ = ["Assistant", "Lookup", "Text"]

# arguments of the main model that say how an assistant has to read the prompt
OF_THE_PROMPT = ("use_cache", "logits_to_keep")


class Text:
    """The text so far and the tokens to be read next, on the device.

    Attributes:
        ids: (1, T) int64, the last token of the text and the draft after it.
        padded: (front + S,) int64, the text after places that match no token.
        tokens: (S,) int64, the text itself, a view; -1 where nothing is yet.
        length: (1,) int64, how long it is.
        offsets: (T,) int64, 0, 1, ….
    """

    def __init__(self, tokens: int, capacity: int, front: int, device: torch.device):
        self.ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        self.padded = torch.full((front + capacity,), -1, dtype=torch.int64, device=device)
        self.tokens = self.padded[front:]
        # what is read while capturing has to be in the vocabulary
        self.tokens[:1] = 0
        self.length = torch.ones(1, dtype=torch.int64, device=device)
        self.offsets = torch.arange(tokens, device=device)

    def begin(self, input_ids: Tensor) -> None:
        """Start with a prompt (1, L)."""
        length = input_ids.shape[1]
        self.tokens.fill_(-1)
        self.tokens[:length] = input_ids[0]
        self.length.fill_(length)
        self.ids.zero_()
        self.ids[0, :1].copy_(input_ids[0, -1:])

    def append(self, chosen: Tensor, count: Tensor | int) -> None:
        """Write tokens (n,) behind the text, the first `count` of which belong to it; what is behind them is never looked at."""
        self.tokens.index_copy_(0, self.length + self.offsets[: len(chosen)], chosen)
        # steps that run ahead of the host's notice to stop must not leave the buffer
        torch.clamp(self.length + count, max=len(self.tokens) - len(self.offsets), out=self.length)


class LookupDrafter:
    """Drafts what followed the last tokens where they stood before: of the longest matches the latest.

    Where that reaches the end of the text, it goes on periodically.
    """

    # of the main model's steps, how many a draft takes as long as
    cost = 0.0
    nbytes = 0

    def __init__(self, text: Text, longest: int):
        self.text, self.longest = text, longest
        self.places = torch.arange(len(text.tokens), device=text.ids.device)

    def decoding(self) -> AbstractContextManager:
        """What to be in while steps are captured."""
        return nullcontext()

    def begin(self, states: None) -> None:
        """Nothing: all it knows is the text."""

    def draft(self) -> None:
        """Write the draft into `text.ids`."""
        text, longest, capacity = self.text, self.longest, len(self.places)
        end = text.length - 1
        last = text.tokens.index_select(0, end)
        matches = torch.ones_like(self.places, dtype=torch.bool)
        score = torch.zeros_like(self.places)
        for back in range(longest):
            wanted = text.padded.index_select(0, end + (longest - back))
            matches = matches & (text.padded[longest - back : longest - back + capacity] == wanted)
            score = score + matches
        ranked = torch.where(self.places < end, score * capacity + self.places, -1)
        place = ranked.argmax(dim=0, keepdim=True)
        period = (end - place).clamp(min=1)
        drafted = text.tokens.index_select(0, place + 1 + text.offsets[:-1] % period)
        # with no text before the last token there is nothing to find
        text.ids[0, 1:].copy_(torch.where(drafted < 0, last, drafted))

    def accept(self, count: Tensor) -> None:
        """Nothing: the text has grown."""

    def catch_up(self, tokens: int) -> None:
        """Nothing, likewise."""


class AssistantDrafter:
    """Drafts what another model would say, and keeps its states after each token of a draft, so that a part can be taken back.

    Args:
        model: the assistant.
        cache: states of the right shapes.
        text: what to go on from.
        cost: of the main model's steps, how many a draft takes as long as.

    Attributes:
        slots: T + 1 caches in two tensors: the states before the draft, and those after each token that was read.
        place: (1,) int64, the slot with the states after all of the text but its last token.
        seen: (1,) int64, tokens that those states have seen.
    """

    def __init__(self, model: Any, cache: RecurrentCache, text: Text, cost: float):
        self.model = weakref.ref(model)
        self.text, self.cost = text, cost
        pairs = cache.states()
        if len({tuple((state.shape, state.dtype) for state in pair) for pair in pairs}) != 1:
            raise ValueError("The layers of the assistant hold states of different shapes.")
        count = text.ids.shape[1] + 1
        # those of all layers together, so that a slot is copied by one launch
        self.states = [state.new_zeros(count, len(pairs), *state.shape) for state in pairs[0]]
        self.slots = []
        for number in range(count):
            slot, layer = cache.empty(), 0
            for held, own in zip(cache.layers, slot.layers, strict=True):
                if held_states(held) is not None:
                    own.adopt(self.states[0][number, layer], self.states[1][number, layer])
                    layer += 1
            self.slots.append(slot)
        self.place = torch.zeros(1, dtype=torch.int64, device=text.ids.device)
        self.seen = torch.zeros(1, dtype=torch.int64, device=text.ids.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(states.nbytes for states in self.states)

    def decoding(self) -> AbstractContextManager:
        """What to be in while steps are captured."""
        return self._alive()._optimize_model_for_decode()

    def begin(self, states: RecurrentCache) -> None:
        """Start with the states after all of the text but its last token."""
        self.slots[0].copy_from(states)
        self._is_at_the_end()

    def draft(self) -> None:
        """Write the draft into `text.ids`."""
        model, ids = self._alive(), self.text.ids
        self._go_back()
        for number, slot in enumerate(self.slots[1:]):
            for states in self.states:
                states[number + 1].copy_(states[number])
            token = ids[:, number : number + 1]
            if number + 1 == ids.shape[1]:
                # what it would say next is not asked for, but its states have to be there if everything is accepted
                model.base_model(input_ids=token, cache=slot)
            else:
                logits = model(input_ids=token, cache=slot, return_dict=True).logits
                ids[0, number + 1 : number + 2].copy_(logits[0].argmax(dim=-1))

    def accept(self, count: Tensor) -> None:
        """Go on from the first `count` tokens (1,) of the draft; the text has grown by them and one more."""
        self.place.copy_(count + 1)
        self.seen.copy_(self.text.length - 1)

    def catch_up(self, tokens: int) -> None:
        """Read `tokens` tokens by which the text has grown without this drafter, outside of a graph."""
        self._go_back()
        places = self.seen + torch.arange(tokens, device=self.seen.device)
        # behind the end of the buffer are only steps whose results nobody looks at
        ids = self.text.tokens.index_select(0, places.clamp(max=len(self.text.tokens) - 1)).clamp(min=0)
        self._alive().base_model(input_ids=ids[None], cache=self.slots[0])
        self._is_at_the_end()

    def _alive(self) -> Any:
        model = self.model()
        assert model is not None
        return model

    def _go_back(self) -> None:
        for states in self.states:
            states[0].copy_(states.index_select(0, self.place)[0])

    def _is_at_the_end(self) -> None:
        self.place.zero_()
        self.seen.copy_(self.text.length - 1)


@dataclass
class Lookup:
    """Drafts out of the text.

    Attributes:
        tokens: T.
        longest: G, the most tokens that are compared to find a draft.
    """

    tokens: int
    longest: int

    name = "a step of prompt lookup"
    # drafted steps that may be in flight before the host looks at the results of the oldest
    run_ahead = 2

    def key(self) -> Hashable | None:
        """What a graph depends on besides the main model; None if there can be none."""
        return "prompt lookup", self.tokens, self.longest

    def read(self, input_ids: Tensor) -> Any:
        """What the drafter needs to know of a prompt (1, L)."""

    def drafter(self, model: Any, text: Text, states: Any) -> LookupDrafter:
        """The drafter for drafts to `model`."""
        return LookupDrafter(text, self.longest)


@dataclass
class Assistant:
    """Drafts of another model.

    Attributes:
        model: that model.
        tokens: T.
        generation_config: that of the call.
        model_kwargs: arguments of the call for the main model.
    """

    model: Any
    tokens: int
    generation_config: Any
    model_kwargs: dict[str, Any]

    name = "a step of assisted decoding"
    longest = 0
    # enough to launch a step while the GPU works, and no more to be wasted after an end token
    run_ahead = 1

    def key(self) -> Hashable | None:
        """What a graph depends on besides the main model; None if there can be none."""
        store = graphs.graphs_of(self.model)
        # another one as soon as something in the assistant has changed; a dead reference equals no other
        return None if store is None else ("assistant", self.tokens, weakref.ref(store))

    def read(self, input_ids: Tensor) -> RecurrentCache:
        """The assistant's states after all of a prompt (1, L) but the last token."""
        cache = RecurrentCache(self.model.config)
        options = {name: self.model_kwargs[name] for name in OF_THE_PROMPT if name in self.model_kwargs}
        mask = self.model_kwargs.get("attention_mask")
        if mask is not None and mask.shape == input_ids.shape:
            options["attention_mask"] = mask
        options[name_of_cache(cache)] = cache
        self.model._feed_all_but_last(input_ids, self.generation_config, options)
        return cache

    def drafter(self, model: Any, text: Text, states: Any) -> AssistantDrafter:
        """The drafter for drafts to `model`."""
        return AssistantDrafter(self.model, states, text, self.tokens * _share(self.model, model))


def _share(assistant: Any, model: Any) -> float:
    """Roughly, a step of the assistant in steps of the model: between what their weights and what their launches say."""
    nbytes, layers = ([measure(m) for m in (assistant, model)] for measure in (_bytes_of_weights, _number_of_layers))
    return (nbytes[0] / nbytes[1] + layers[0] / layers[1]) / 2


def _bytes_of_weights(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _number_of_layers(model: Any) -> int:
    return model.config.num_hidden_layers
