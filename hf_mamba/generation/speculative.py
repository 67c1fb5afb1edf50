"""Prompt lookup and assisted decoding as a replayed CUDA graph: drafting, verifying and accepting several tokens are one launch
for the host.

A step drafts what may come after the last token (drafting.py), feeds both, takes the model's own choice after each, and accepts
the draft as far as it agrees. The states of every layer after each token are kept (`RecurrentCache.for_verifying`), and the next
step starts at those of the last token accepted, so nothing is ever copied back or fed again.

A step of several tokens takes longer than one of a single token. Where drafts are refused, the host therefore goes over to plain
steps for a while, on states of their own; two small graphs carry the states from one to the other.

Symbols: T tokens of a step (a draft of T - 1), S places for the text, V vocabulary.
"""

import inspect
import math
import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from ..cache import ONE_NAME, RecurrentCache
from ..layers.fused_step import MOST_DRAFTED
from . import graph_loop, graphs
from .drafting import Assistant, Lookup, Text
from .prompt_graphs import takes_layouts

__all__ = ["Speculation", "plan_speculation"]

# steps that may be in flight before the host looks at the results of the oldest
RUN_AHEAD = 2
# drafted steps after which drafts are judged, and how many of their tokens must at least have been accepted to go on
JUDGED, ENOUGH = 4, 4
# plain steps before drafts are tried again: more where drafts cost more, and twice as many each time they are refused
SHORTEST_PAUSE, LONGEST_PAUSE = 16, 256
# steps that are kept for a model
MAX_STEPS = 2
# options of other kinds of draft, or of another choice among the drafted tokens
OTHER_DRAFTS = ("assistant_early_exit", "assistant_ensemble_weight", "speculation_type", "use_mtp")


class SpeculativeStep:
    """One step as a graph: `text` grows by the accepted tokens.

    Args:
        model: the language model.
        cache: states of the right shapes.
        source: of the drafts.
        prompt: what `source` knows of the prompt.
        capacity: S.

    Attributes:
        report: (T + 1,) int64: how many drafted tokens were accepted, and the model's choice after each token.
        drafted, plain: the graphs of a step with a draft and of one without.
        to_plain, to_drafted: those that carry the states over.
    """

    def __init__(self, model: Any, cache: RecurrentCache, source: Lookup | Assistant, prompt: Any, capacity: int):
        self.model = weakref.ref(model)
        device, tokens = model.device, source.tokens
        self.tokens = tokens
        self.cache, self.single = cache.for_verifying(tokens), cache.empty()
        self.single.copy_from(cache)
        self.accepted = self.cache.drafts()[0].accepted
        self.text = Text(tokens, capacity, source.longest, device)
        self.drafter = source.drafter(model, self.text, prompt)
        self.report = torch.zeros(tokens + 1, dtype=torch.int64, device=device)
        self.lock = threading.Lock()
        pinned = device.type == "cuda"
        self.slots = [
            (torch.zeros(tokens + 1, dtype=torch.int64, pin_memory=pinned), torch.cuda.Event() if pinned else None)
            for _ in range(RUN_AHEAD + 1)
        ]
        with model._optimize_model_for_decode(), self.drafter.decoding():
            self.drafted = graphs.capture(self._drafted_step, device)
            self.plain = graphs.capture(self._plain_step, device)
        self.to_plain = graphs.capture(self._to_plain, device)
        self.to_drafted = graphs.capture(self._to_drafted, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the states and the logits."""
        model = self.model()
        vocab_size = 0 if model is None else model.config.vocab_size
        drafts = sum(drafts.nbytes for drafts in self.cache.drafts())
        return drafts + self.single.nbytes + self.drafter.nbytes + 4 * self.tokens * vocab_size

    def begin(self, input_ids: Tensor, cache: RecurrentCache, prompt: Any = None) -> None:
        """Start with a prompt (1, L) of which `cache` has seen all but the last token, and `prompt` is what the source knows."""
        self.text.begin(input_ids)
        self.cache.take_for_verifying(cache)
        self.drafter.begin(prompt)

    def catch_up(self, tokens: int) -> None:
        """Go over to drafts after `tokens` plain steps."""
        self.drafter.catch_up(tokens)
        self.to_drafted.replay()

    def _choices(self, ids: Tensor, cache: RecurrentCache) -> Tensor:
        model = self.model()
        assert model is not None
        return model(input_ids=ids, cache=cache, return_dict=True).logits[0].argmax(dim=-1)

    def _drafted_step(self) -> None:
        self.drafter.draft()
        chosen = self._choices(self.text.ids, self.cache)
        agrees = (chosen[:-1] == self.text.ids[0, 1:]).long()
        count = agrees.cumprod(dim=0).sum(dim=0, keepdim=True)
        self.accepted.copy_(count)
        self.text.append(chosen, count + 1)
        self.text.ids[0, :1].copy_(chosen.index_select(0, count))
        self.drafter.accept(count)
        self.report[:1].copy_(count)
        self.report[1:].copy_(chosen)

    def _plain_step(self) -> None:
        chosen = self._choices(self.text.ids[:, :1], self.single)
        self.text.append(chosen, 1)
        self.text.ids[0, :1].copy_(chosen)
        self.report[:1].zero_()
        self.report[1:2].copy_(chosen)

    def _to_plain(self) -> None:
        for drafts, (conv_state, ssm_state) in zip(self.cache.drafts(), self.single.states(), strict=True):
            places = self.accepted + 1 + torch.arange(conv_state.shape[2], device=conv_state.device)
            conv_state.copy_(drafts.history.index_select(1, places).mT)
            ssm_state.copy_(drafts.states.index_select(1, self.accepted)[:, 0])

    def _to_drafted(self) -> None:
        self.cache.take_for_verifying(self.single)


# they are dropped together with the other graphs of a model, when something in it changes
_steps: "weakref.WeakKeyDictionary[graphs.Graphs, OrderedDict]" = weakref.WeakKeyDictionary()


@dataclass
class Speculation:
    """What is known of a call of `generate(prompt_lookup_num_tokens=…)` or `generate(assistant_model=…)`.

    Attributes:
        source: of the drafts.
        max_length: tokens at which to stop, prompt included.
    """

    model: Any
    source: Lookup | Assistant
    generation_config: Any
    eos_token_ids: list[int]
    max_length: int
    streamer: Any

    def run(self, input_ids: Tensor, cache: RecurrentCache, kept: bool) -> Any:
        """Generate after a prompt of which the cache has seen all but the last token.

        Args:
            input_ids: (1, L), the prompt.
            cache: moved on to the end if `kept`.
            kept: whether anyone reads `cache` afterwards.

        Returns:
            What `GenerationMixin._assisted_decoding` returns, or None if nothing could be captured; then nothing has changed.
        """
        length = input_ids.shape[1]
        fits = cache.batch_size == 1 and cache.get_seq_length() == length - 1 and not cache.pending_length
        if not fits or self.max_length - length < graph_loop.WORTH_CAPTURING:
            return None
        with torch.inference_mode(False), torch.no_grad():
            step, prompt = self._prepare(input_ids, cache)
            if step is None:
                return None
            try:
                step.begin(input_ids, cache, prompt)
                tokens, states, last = self._loop(step, self.max_length - length, 0 if kept else RUN_AHEAD)
                if kept:
                    if states.verifying:
                        states.give_verified(cache, last)
                    else:
                        cache.copy_from(states)
                    cache._seen = length + len(tokens) - 1
            finally:
                step.lock.release()
        if self.streamer is not None:
            self.streamer.end()
        sequences = torch.cat([input_ids, input_ids.new_tensor([tokens])], dim=1)
        if not self.generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **{"cache" if ONE_NAME else "past_key_values": cache})

    def _prepare(self, input_ids: Tensor, cache: RecurrentCache) -> tuple[SpeculativeStep | None, Any]:
        """The step, locked for this call, and what the source knows of the prompt; None if it cannot be had."""
        tokens = self.source.tokens
        capacity = max(graph_loop.SMALLEST_CAPACITY, 1 << (self.max_length + 2 * tokens - 1).bit_length())
        with graphs.CAPTURING:
            store, source_key = graphs.graphs_of(self.model), self.source.key()
            key = (source_key, capacity, graphs.step_key(cache))
            if store is None or source_key is None or key in store.refused:
                return None, None
            prompt = self.source.read(input_ids)
            steps = _steps.setdefault(store, OrderedDict())
            step = graphs.attempt(store, key, lambda: self._step(steps, key, cache, prompt), self.source.name)
            # a locked step is decoding for another thread
            return (step if step is not None and step.lock.acquire(blocking=False) else None), prompt

    def _step(self, steps: OrderedDict, key: tuple, cache: RecurrentCache, prompt: Any) -> SpeculativeStep:
        """The step of this key; captured the first time."""
        # with an assistant that has gone or changed since
        for old in [old for old in steps if any(isinstance(p, weakref.ref) and p() is None for p in old[0])]:
            del steps[old]
        step = steps.pop(key, None)
        if step is None:
            capacity = key[1]
            drafted = cache.nbytes + (0 if prompt is None else prompt.nbytes)
            budget = graphs.MEMORY_SHARE * graphs.device_memory(self.model.device) - self.source.tokens * drafted
            while steps and (len(steps) >= MAX_STEPS or sum(s.nbytes for s in steps.values()) > budget):
                steps.popitem(last=False)
            step = SpeculativeStep(self.model, cache, self.source, prompt, capacity)
        steps[key] = step
        return step

    def _steps_to_spare(self, step: SpeculativeStep, wanted: int, pending: int, drafting: bool) -> int:
        """How many steps may be in flight when the next is launched: one too many at the end costs time, most with an assistant."""
        if not drafting:
            return RUN_AHEAD
        return 0 if step.tokens * pending >= wanted else self.source.run_ahead

    def _loop(self, step: SpeculativeStep, most: int, run_ahead: int) -> tuple[list[int], RecurrentCache, int]:
        """The new tokens, and where the states before the last one are: in which cache, after which of the tokens fed last."""
        tokens: list[int] = []
        free = list(step.slots[: run_ahead + 1])
        pending: deque = deque()
        pace = _Pace(step.tokens, step.drafter.cost)
        while True:
            drafting = pace.next(step)
            (step.drafted if drafting else step.plain).replay()
            report, event = free.pop()
            report.copy_(step.report, non_blocking=True)
            if event is not None:
                event.record(torch.cuda.current_stream(step.text.ids.device))
            pending.append((report, event, drafting))
            while pending:
                spare = min(run_ahead, self._steps_to_spare(step, most - len(tokens), len(pending), drafting))
                oldest = pending[0][1]
                if len(pending) <= spare and oldest is not None and not oldest.query():
                    break
                report, done, drafted = pending.popleft()
                if done is not None:
                    done.synchronize()
                count, *chosen = report.tolist()
                free.append((report, done))
                if drafted:
                    pace.judge(count)
                new = chosen[: min(count + 1, most - len(tokens))]
                ends = [index for index, token in enumerate(new) if token in self.eos_token_ids]
                if ends:
                    new = new[: ends[0] + 1]
                tokens += new
                if self.streamer is not None:
                    self.streamer.put(torch.tensor([new]))
                if ends or len(tokens) == most:
                    return tokens, step.cache if drafted else step.single, len(new) - 1


@dataclass
class _Pace:
    """Whether the next step drafts: not for a while after drafts were refused.

    Attributes:
        tokens: T.
        cost: of plain steps, how many a draft takes as long as.
        enough: tokens of `JUDGED` drafts that must have been accepted to go on.
        pause: plain steps after the next refusal.
    """

    tokens: int
    cost: float
    enough: int = field(init=False)
    pause: int = field(init=False)
    drafting: bool = True
    accepted: int = 0
    judged: int = 0
    left: int = 0
    plain: int = 0

    def __post_init__(self) -> None:
        # drafts that are always right are gone on with, whatever they cost
        self.enough = max(ENOUGH, min(JUDGED * (self.tokens - 1), math.ceil(JUDGED * self.cost)))
        self.pause = self._shortest_pause()

    def _shortest_pause(self) -> int:
        return min(LONGEST_PAUSE, math.ceil(SHORTEST_PAUSE * (1 + self.cost)))

    def judge(self, accepted: int) -> None:
        """Take note of how many tokens of a draft were accepted."""
        self.accepted += accepted
        self.judged += 1

    def next(self, step: SpeculativeStep) -> bool:
        """Whether to draft now; the states are where they have to be for it."""
        if self.drafting and self.judged >= JUDGED:
            if self.accepted < self.enough:
                self.left, self.drafting, self.plain = self.pause, False, 0
                self.pause = min(2 * self.pause, LONGEST_PAUSE)
                step.to_plain.replay()
            else:
                self.pause = self._shortest_pause()
            self.accepted = self.judged = 0
        elif not self.drafting and self.left == 0:
            # what came back since was drafted before the pause
            self.accepted = self.judged = 0
            self.drafting = True
            step.catch_up(self.plain)
        self.left -= 1
        self.plain += 1
        return self.drafting


def plan_speculation(model: Any, input_ids: Tensor, cache: Any, options: dict[str, Any]) -> Speculation | None:
    """How to decode by graphs, or None where transformers' own loop has to do it.

    Args:
        model: the language model.
        input_ids: (B, L), the prompt.
        cache: the cache of the call.
        options: the keyword arguments of `_assisted_decoding`, those of the model among them.
    """
    config = options["generation_config"]
    if config.do_sample or any(getattr(config, name, None) for name in OTHER_DRAFTS):
        return None
    if not graphs.allows_graphs(model, config) or options.get("synced_gpus") or config.is_assistant:
        return None
    if config.output_attentions or config.output_hidden_states:
        return None
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return None
    if not isinstance(cache, RecurrentCache) or cache.recording or not options.get("use_cache"):
        return None
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 2 or options.get("inputs_embeds") is not None:
        return None
    names = set(inspect.signature(GenerationMixin._assisted_decoding).parameters)
    arguments = {name: value for name, value in options.items() if name not in names}
    if any(name not in graph_loop.USED_UP and value is not None for name, value in arguments.items()):
        return None
    if len(options.get("logits_processor") or ()):
        return None
    max_length, eos_token_ids, host_criteria = graph_loop.stops(options.get("stopping_criteria") or ())
    source = _source_of_drafts(model, config, options, arguments)
    if max_length is None or host_criteria or source is None:
        return None
    return Speculation(
        model=model,
        source=source,
        generation_config=config,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        streamer=options.get("streamer"),
    )


def _source_of_drafts(
    model: Any, config: Any, options: dict[str, Any], model_kwargs: dict[str, Any]
) -> Lookup | Assistant | None:
    """Where the drafts of a call come from, or None where no graph can make them."""
    assistant, looked_up = options.get("assistant_model"), config.prompt_lookup_num_tokens
    if options.get("assistant_tokenizer") is not None or (assistant is None) == (looked_up is None):
        return None
    if assistant is None:
        return None if looked_up < 1 else Lookup(min(looked_up + 1, MOST_DRAFTED), config.max_matching_ngram_size or 2)
    if not isinstance(assistant, GenerationMixin) or not takes_layouts(assistant):
        return None
    if assistant.device != model.device or assistant.config.vocab_size != model.config.vocab_size:
        return None
    # the assistant's own number is what transformers' loop looks at
    drafted = assistant.generation_config.num_assistant_tokens or config.num_assistant_tokens
    if not drafted or drafted < 1:
        return None
    return Assistant(assistant, min(drafted + 1, MOST_DRAFTED), config, model_kwargs)
