"""Greedy decoding and sampling as replayed CUDA graphs, with the results of transformers' own loop.

The prompt is one replay, if one like it was read before. A step is two: the model, and the choice of the next tokens. The host
launches them ahead of the GPU and learns a few steps later which tokens came out, so that neither waits for the other. Where a
step too many would show (states that are handed back, criteria that the host decides) it waits for each step.

Symbols: B batch, L length of the prompt, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria

from ..cache import ONE_NAME, RecurrentCache
from ..cache_names import CACHE_NAMES
from . import graphs
from .prompt import Prompt
from .prompt_graphs import PromptShape, RowPrompt, read_launched, rows_to_read
from .sampling import TokenSampler, processor_key

__all__ = ["GraphLoop", "plan", "stops"]

# steps that may be in flight before the host looks at the results of the oldest
RUN_AHEAD = 8
# fewer new tokens than this do not pay for a graph that has to be captured first
WORTH_CAPTURING = 4
# the buffer of ids grows in powers of two from here, so that few lengths need a graph of their own
SMALLEST_CAPACITY = 256

# arguments of the model that the prompt has used up; anything else keeps its meaning in later steps
USED_UP = {*CACHE_NAMES, "attention_mask", "use_cache", "inputs_embeds", "position_ids", "logits_to_keep"}


@dataclass
class GraphLoop:
    """What is known of a call of `generate()` before its prompt is read.

    Attributes:
        sampler_key: what the sampler's graph depends on besides the model.
        max_length: tokens at which to stop, prompt included.
        host_criteria: stopping criteria to be asked after each step.
    """

    model: Any
    sampler_key: tuple
    logits_processors: list[Any]
    generation_config: Any
    eos_token_ids: list[int]
    max_length: int
    host_criteria: list[Any]
    streamer: Any

    def read(self, prompt: Prompt, cache: RecurrentCache) -> "tuple[Ready | None, Any]":
        """Read a prompt padded to one of a few lengths; by a graph, if one of that length was read before.

        Args:
            prompt: what `cache` has not seen; anywhere padded.
            cache: states to go on from, or none yet.

        Returns:
            What follows a graph, which leaves `cache` alone, or None; and, if there was no graph, the output of the model,
            with the states in `cache`. (None, None) if nothing was read.
        """
        rows = rows_to_read(self.model, prompt, cache, self.generation_config.prefill_chunk_size)
        if rows is None:
            return None, None
        seen = cache.get_seq_length() + prompt.length
        shape = rows.shape(fresh=cache.batch_size == -1)
        with torch.inference_mode(False), torch.no_grad(), graphs.CAPTURING:
            ready = self._at_once(rows, shape, cache, seen)
            if ready is None:
                store = graphs.graphs_of(self.model)
                if store is None or graphs.PROMPTS in store.refused:
                    return None, None
                ready = self._by_graph(store, rows, shape, cache, seen)
        if ready is not None:
            return ready, None
        outputs = read_launched(self.model, cache, shape, rows)
        cache._seen = seen
        return None, outputs

    def _at_once(self, rows: RowPrompt, shape: PromptShape, cache: RecurrentCache, seen: int) -> "Ready | None":
        """Replay a graph that there is, and look for changes of the model while the GPU works; None if there was one."""
        store = graphs.last_graphs_of(self.model)
        step = None if store is None else store.step_for(cache, rows.input_ids.shape[0])
        if store is None or step is None or shape not in step.prompts or self._sampler_key() not in step.samplers:
            return None
        ready = self._lock(store, step, seen)
        if ready is None:
            return None
        try:
            if not shape.fresh:
                step.cache.copy_from(cache)
            step.prompt(shape).read(rows)
            assert store.watch is not None
            if store.watch.unchanged():
                return ready
        except BaseException:
            step.lock.release()
            raise
        step.lock.release()
        return None

    def _by_graph(
        self, store: graphs.Graphs, rows: RowPrompt, shape: PromptShape, cache: RecurrentCache, seen: int
    ) -> "Ready | None":
        """Replay a graph of this shape, if there is one or a prompt of this shape was read before."""
        batch = rows.input_ids.shape[0]
        known = store.seen_before((batch, cache.ssm_dtype, shape))
        step = store.step_for(cache, batch)
        if step is None or not (known or shape in step.prompts):
            return None
        ready = self._lock(store, step, seen)
        if ready is None:
            return None
        try:
            graph = graphs.attempt(store, graphs.PROMPTS, lambda: step.prompt(shape), "the prompt", again=False)
            if graph is None:
                step.lock.release()
                return None
            if not shape.fresh:
                step.cache.copy_from(cache)
            graph.read(rows)
        except BaseException:
            step.lock.release()
            raise
        return ready

    def take_over(self, prompt_logits: Tensor, cache: RecurrentCache, new_tokens: int) -> "Ready | None":
        """Go on after a prompt that the model has read.

        Args:
            prompt_logits: (B, V), for the token after it.
            cache: the states after it; not changed.
            new_tokens: how many can follow.

        Returns:
            None if nothing could be captured.
        """
        # buffers of inference mode could not be written to outside of it later
        with torch.inference_mode(False), torch.no_grad(), graphs.CAPTURING:
            # takes up to a millisecond, in which the GPU still reads the prompt
            store = graphs.graphs_of(self.model)
            if store is None or (not store.has_step(cache) and new_tokens < WORTH_CAPTURING):
                return None
            step = graphs.attempt(
                store, graphs.step_key(cache), lambda: store.step(self.model, cache), "a decoding step"
            )
            ready = None if step is None else self._lock(store, step, prompt_length=cache.get_seq_length())
            if ready is not None:
                try:
                    step.cache.copy_from(cache)
                    step.logits.copy_(prompt_logits)
                except BaseException:
                    step.lock.release()
                    raise
        return ready

    def run(self, ready: "Ready", input_ids: Tensor, cache: RecurrentCache, kept: bool) -> Any:
        """Generate.

        Args:
            ready: from `read` or `take_over`.
            input_ids: (B, L), the prompt.
            cache: what the caller knows; moved on to the end if `kept`.
            kept: whether anyone reads `cache` afterwards.

        Returns:
            What `GenerationMixin._sample` returns.
        """
        step, sampler = ready.step, ready.sampler
        with torch.inference_mode(False), torch.no_grad():
            try:
                sampler.begin(input_ids, self.logits_processors)
                progress = _Progress(self, step, sampler, kept)
                for index in range(self.max_length - input_ids.shape[1]):
                    if index:
                        step.graph.replay()
                        progress.model_stepped()
                    ready.sampler_graph.replay()
                    if progress.token_chosen():
                        break
                count = progress.drain()
                sequences = sampler.ids[:, : input_ids.shape[1] + count].clone()
                if kept:
                    progress.hand_back(cache, ready.prompt_length + count - 1)
            finally:
                step.lock.release()
        if self.streamer is not None:
            self.streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if progress.scores is None else tuple(progress.scores),
            logits=None if progress.logits is None else tuple(progress.logits),
            **{"cache" if ONE_NAME else "past_key_values": cache},
        )

    def _lock(self, store: graphs.Graphs, step: graphs.DecodeStep, prompt_length: int) -> "Ready | None":
        """The step, locked, with its sampler; None if they cannot be had."""
        # a locked step is decoding for another thread
        if not step.lock.acquire(blocking=False):
            return None
        key = self._sampler_key()
        try:
            found = graphs.attempt(
                store, key, lambda: step.sampler(key, lambda: self._make_sampler(step, key[0])), "a decoding step"
            )
        except BaseException:
            step.lock.release()
            raise
        if found is None:
            step.lock.release()
            return None
        sampler, sampler_graph = found
        return Ready(step, sampler, sampler_graph, prompt_length)

    def _sampler_key(self) -> tuple:
        """The capacity of the sampler and what else its graph depends on."""
        return max(SMALLEST_CAPACITY, 1 << (self.max_length - 1).bit_length()), *self.sampler_key

    def _make_sampler(self, step: graphs.DecodeStep, capacity: int) -> TokenSampler:
        pad = self.generation_config._pad_token_tensor
        return TokenSampler(
            logits=step.logits,
            next_ids=step.ids,
            capacity=capacity,
            logits_processors=self.logits_processors,
            do_sample=self.generation_config.do_sample,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=0 if pad is None else int(pad),
        )


@dataclass
class Ready:
    """A prompt has been read: its states and logits are in `step`, which is locked for this call.

    Attributes:
        prompt_length: tokens that a cache has seen then.
    """

    step: graphs.DecodeStep
    sampler: TokenSampler
    sampler_graph: Any
    prompt_length: int


@dataclass
class _Progress:
    """What the host knows of a running loop: results come back a few steps late, in order."""

    loop: GraphLoop
    step: graphs.DecodeStep
    sampler: TokenSampler
    kept: bool
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    tokens: int = 0
    stopped_at: int | None = None
    pending: deque = field(default_factory=deque)
    # rows that ended while others went on, with their states then
    ended: dict[int, RecurrentCache] = field(default_factory=dict)
    ending: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.loop.generation_config
        if config.return_dict_in_generate:
            self.scores = [] if config.output_scores else None
            self.logits = [] if config.output_logits else None
        stops_early = bool(self.loop.eos_token_ids) or bool(self.loop.host_criteria)
        waits = bool(self.loop.host_criteria) or (self.kept and stops_early)
        self.run_ahead = 0 if waits else RUN_AHEAD
        self.free = self.sampler.host_slots(self.run_ahead + 1)

    def model_stepped(self) -> None:
        """After the model has read a token of every row: rows for which that was the end token are done."""
        for row in self.ending:
            self.ended[row] = self.step.cache.select([row])
        self.ending = []

    def token_chosen(self) -> bool:
        """After a token was chosen for every row; whether all rows are known to have finished."""
        if self.logits is not None:
            self.logits.append(self.step.logits.clone())
        if self.scores is not None:
            self.scores.append(self.sampler.scores.clone())
        self.tokens += 1
        if self.loop.host_criteria:
            self._ask_criteria()
        report, event = self.free.pop()
        report.copy_(self.sampler.report, non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(self.sampler.ids.device))
        self.pending.append((report, event))
        while self.pending and self.stopped_at is None and (len(self.pending) > self.run_ahead or self._arrived()):
            self._take()
        return self.stopped_at is not None

    def _arrived(self) -> bool:
        event = self.pending[0][1]
        return event is None or event.query()

    def _take(self) -> None:
        """Look at the results of the oldest step in flight."""
        report, event = self.pending.popleft()
        if event is not None:
            event.synchronize()
        index = self.tokens - len(self.pending) - 1
        if self.loop.streamer is not None:
            self.loop.streamer.put(report[0].clone())
        finished = report[1].tolist()
        self.free.append((report, event))
        if all(finished):
            self.stopped_at = index
        elif self.kept:
            self.ending = [row for row, done in enumerate(finished) if done and row not in self.ended]

    def _ask_criteria(self) -> None:
        ids = self.sampler.ids[:, : self.sampler.prompt_length + self.tokens]
        scores = None if self.scores is None else tuple(self.scores)
        for criterion in self.loop.host_criteria:
            done = torch.as_tensor(criterion(ids, scores), device=ids.device)
            self.sampler.finished.logical_or_(done)
        self.sampler.report[1].copy_(self.sampler.finished)

    def drain(self) -> int:
        """Wait for all steps in flight; the number of tokens that count."""
        while self.pending and self.stopped_at is None:
            self._take()
        return self.tokens if self.stopped_at is None else self.stopped_at + 1

    def hand_back(self, cache: RecurrentCache, seen: int) -> None:
        """Leave in `cache` the states after `seen` tokens."""
        states = self.step.cache
        for row, ended in self.ended.items():
            states.insert([row], ended)
        cache.copy_from(states)
        cache._seen = seen


def plan(
    model: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool,
    streamer: Any,
    model_kwargs: dict[str, Any],
    cache: Any,
) -> GraphLoop | None:
    """How to decode by graphs, or None where transformers' own loop has to do it."""
    if not graphs.allows_graphs(model, generation_config) or synced_gpus or generation_config.is_assistant:
        return None
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return None
    if not isinstance(cache, RecurrentCache) or cache.recording or not model_kwargs.get("use_cache"):
        return None
    if any(name not in USED_UP and value is not None for name, value in model_kwargs.items()):
        return None
    keys = [processor_key(processor) for processor in logits_processor]
    if any(key is None for key in keys):
        return None
    max_length, eos_token_ids, host_criteria = stops(stopping_criteria)
    if max_length is None:
        return None
    pad = generation_config._pad_token_tensor
    return GraphLoop(
        model=model,
        sampler_key=(
            tuple(keys),
            bool(generation_config.do_sample),
            tuple(eos_token_ids),
            None if pad is None else int(pad),
        ),
        logits_processors=list(logits_processor),
        generation_config=generation_config,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        host_criteria=host_criteria,
        streamer=streamer,
    )


def stops(stopping_criteria: Any) -> tuple[int | None, list[int], list[Any]]:
    """The length at which to stop, if there is one, the end tokens, and the criteria that say nothing but yes or no."""
    max_length, eos_token_ids, others = None, [], []
    for criterion in stopping_criteria:
        if type(criterion) is MaxLengthCriteria:
            max_length = criterion.max_length if max_length is None else min(max_length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_token_ids += criterion.eos_token_id.tolist()
        else:
            others.append(criterion)
    return max_length, eos_token_ids, others
