"""From logits to the next tokens without the host: what a CUDA graph of a decoding step holds after the model.

Nothing here may depend on Python values that change from step to step: the number of tokens so far is a tensor. Processors
of transformers that are functions of the scores (and of the ids so far) are called as they are.

Symbols: B batch, V vocabulary, S columns of the buffer of ids.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

__all__ = ["TokenSampler", "processor_key"]

# functions of the scores alone
STATELESS = tuple(
    getattr(processors, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
    )
)
# functions of the scores and of the set of ids so far; what stands twice counts once
READS_IDS = (processors.RepetitionPenaltyLogitsProcessor,)
# no end token before a length
MINIMUM = (processors.MinLengthLogitsProcessor, processors.MinNewTokensLengthLogitsProcessor)


def processor_key(processor: Any) -> tuple | None:
    """What the graph of a processor depends on, to be compared; None if it cannot run inside a graph.

    Subclasses and unknown types may read anything, so only the exact types listed above are taken.
    """
    kind = type(processor)
    if kind in MINIMUM:
        # lengths are in a tensor
        return kind, tuple(processor.eos_token_id.tolist())
    if kind not in STATELESS + READS_IDS or getattr(processor, "prompt_ignore_length", None):
        return None
    values = []
    for name, value in sorted(vars(processor).items()):
        if isinstance(value, Tensor):
            value = tuple(value.flatten().tolist())
        values.append((name, repr(value)))
    return kind, tuple(values)


class TokenSampler:
    """Processes scores, chooses the next tokens, and keeps ids, lengths and finished rows in tensors of fixed addresses.

    Args:
        logits: (B, V) fp32, where the model leaves its logits.
        next_ids: (B, 1) int64, where the model reads its next tokens.
        capacity: S, the most tokens a row can have, the prompt included.
        logits_processors: those for which `processor_key` is not None, in order.
        do_sample: draw from the distribution, else take the maximum.
        eos_token_ids: end tokens, maybe none.
        pad_token_id: what follows the end of a row.
    """

    def __init__(
        self,
        logits: Tensor,
        next_ids: Tensor,
        capacity: int,
        logits_processors: list[Any],
        do_sample: bool,
        eos_token_ids: list[int],
        pad_token_id: int,
    ):
        batch, vocab_size = logits.shape
        device = logits.device
        self.logits, self.next_ids = logits, next_ids
        self.logits_processors, self.do_sample, self.pad_token_id = logits_processors, do_sample, pad_token_id
        self.prompt_length = 0
        self.ids = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device) if eos_token_ids else None
        # what the host wants to know of a step: the tokens and which rows have finished
        self.report = torch.zeros(2, batch, dtype=torch.int64, device=device)
        # where reports wait for the host, each with an event that says when it has arrived; made when they are needed
        self.slots: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self.scores = torch.zeros_like(logits)
        # for each minimum: below which length which tokens are forbidden
        self.minimums: dict[int, tuple[Tensor, Tensor]] = {}
        for index, processor in enumerate(logits_processors):
            if type(processor) in MINIMUM:
                forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
                known = processor.eos_token_id.to(device)
                forbidden[known[known < vocab_size]] = True
                self.minimums[index] = torch.zeros(1, dtype=torch.int64, device=device), forbidden

    def begin(self, input_ids: Tensor, logits_processors: list[Any]) -> None:
        """Start with a prompt (B, L); the processors may have other minimum lengths than those of the graph."""
        length = input_ids.shape[1]
        self.ids[:, :length] = input_ids
        if length:
            # columns not reached yet repeat a token of their row, so that they add nothing to the set of its ids
            self.ids[:, length:] = input_ids[:, :1]
        self.prompt_length = length
        self.length.fill_(length)
        self.finished.fill_(False)
        for index, (least, _) in self.minimums.items():
            least.fill_(minimum_length(logits_processors[index]))

    def host_slots(self, count: int) -> list[tuple[Tensor, "torch.cuda.Event | None"]]:
        """`count` places (2, B) in memory of the host that copies need not wait for, kept for the next call."""
        pinned = self.report.device.type == "cuda"
        while len(self.slots) < count:
            place = torch.zeros(self.report.shape, dtype=self.report.dtype, pin_memory=pinned)
            self.slots.append((place, torch.cuda.Event() if pinned else None))
        return self.slots[:count]

    def __call__(self) -> None:
        """One token for each row from `logits`."""
        scores = self.logits
        for index, processor in enumerate(self.logits_processors):
            if index in self.minimums:
                least, forbidden = self.minimums[index]
                scores = torch.where(forbidden & (self.length < least), -torch.inf, scores)
            else:
                scores = processor(self.ids, scores)
        self.scores.copy_(scores)
        if self.do_sample:
            probabilities = torch.softmax(scores, dim=-1)
            # what torch.multinomial does for one sample, without its look at the values from the host
            chosen = (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(dim=-1)
        else:
            chosen = scores.argmax(dim=-1)
        if self.eos is not None:
            chosen = torch.where(self.finished, self.pad_token_id, chosen)
            self.finished.logical_or_((chosen[:, None] == self.eos).any(dim=1))
        self.ids.index_copy_(1, self.length, chosen[:, None])
        self.length.add_(1)
        self.next_ids.copy_(chosen[:, None])
        self.report[0].copy_(chosen)
        self.report[1].copy_(self.finished)


def minimum_length(processor: Any) -> int:
    """Tokens, the prompt included, before which no end token is allowed."""
    if isinstance(processor, processors.MinNewTokensLengthLogitsProcessor):
        return processor.prompt_length_to_skip + processor.min_new_tokens
    return processor.min_length
