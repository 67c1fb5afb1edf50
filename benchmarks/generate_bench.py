"""One shape of model and its contenders, for `python -m benchmarks generate`: built, checked against ours, timed.

A transformer has other weights and gives other tokens; it is timed alone. Its floor is the time to read every weight once and the
keys and values of all tokens so far once. Drafted decoding is timed on a model that goes on with a repeating text as the text does,
beside plain decoding of the same model; both count from the first token of a plain call.
"""

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import hf_mamba
from benchmarks.contenders import (
    CLASSES,
    PERIOD,
    SIZES,
    TRANSFORMER,
    make_mamba_ssm,
    make_repeating,
    make_transformer,
    native_without_packages,
)
from benchmarks.record import Row
from benchmarks.timing import Timing, disagreement, peak_memory_mib, synchronize
from hf_mamba.models.moe_mamba.experts import StackedExperts

__all__ = ["BARE", "DRAFTED", "MAMBA_SSM", "NATIVE", "OURS", "REPEATING", "STOCK_LOOP", "Bench"]

OURS, STOCK_LOOP, NATIVE, BARE = "hf_mamba", "stock-loop", "transformers", "transformers-bare"
MAMBA_SSM = "mamba_ssm"
# ours on a text that repeats, without and with drafts
REPEATING, DRAFTED = "repeating", "repeating-drafted"
DRAFT_TOKENS = 15
# of shared/DESIGN.md, "Numbers to beat": ms a token by (kind, size, batch), ms for a prompt of 2,048 tokens by (kind, size)
DECODE_TARGETS = {
    ("mamba", "130m", 1): 0.5,
    ("mamba", "2.8b", 1): 2.8,
    ("mamba2", "2.8b", 1): 2.8,
    ("mamba", "2.8b", 64): 4.5,
    ("mamba2", "2.8b", 64): 8.0,
}
PREFILL_TARGETS = {("mamba", "130m"): 5.0, ("mamba", "2.8b"): 25.0, ("mamba2", "2.8b"): 25.0}
TARGET_PROMPT = 2048
# logits relative to the largest one: in half precision, kernels that round at other places
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Prepared:
    """A contender that can be timed.

    Args:
        model: the module.
        run: `run(ids, count, logits)` generates `count` tokens; returns their logits if wanted, else the sequences.
        floor_bytes: the least that a token needs to read and write, by length of the prompt and batch; None if that is unknown.
    """

    model: Any
    run: Callable[..., list[Tensor]]
    floor_bytes: Callable[[int, int], int] | None

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class Bench:
    """One shape of model: its contenders with the same weights, one after the other on the device."""

    def __init__(
        self,
        kind: str,
        size: str,
        device: torch.device,
        dtype: torch.dtype,
        new_tokens: int,
        rounds: int,
        layers: int | None,
        console: Console,
    ):
        self.kind, self.size, self.device, self.dtype = kind, size, device, dtype
        self.new_tokens, self.rounds, self.console = new_tokens, rounds, console
        self.shape = dict(SIZES[size][kind]) | ({} if layers is None else {"num_hidden_layers": layers})
        self.layers = layers
        self._ours: Any = None
        # the first logits of ours after each prompt, which the others have to agree with; of a repeating text, the tokens
        self.expected: dict[tuple[int, ...], list[Tensor]] = {}
        self.said: dict[tuple[int, ...], Tensor] = {}

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}"

    @property
    def ours(self) -> Any:
        """Our model; the same weights every time it is built."""
        if self._ours is None:
            classes = CLASSES[self.kind]
            self._ours = self._build(lambda: classes.own(classes.own_config(**self.shape)))
        return self._ours

    def release(self) -> None:
        """Give our model up until it is needed again."""
        self._ours = None
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, make: Callable[[], nn.Module]) -> Any:
        torch.manual_seed(0)
        with torch.device(self.device), _default_dtype(self.dtype):
            return make().eval()

    def contender(
        self, name: str, lengths: list[int], batches: list[int], bandwidth: float, deadline: float
    ) -> Iterator[list[Row]]:
        """The rows of one contender, cell by cell; a failure, such as memory that does not suffice, is a row as well."""
        self.console.print(f"[dim]{self.name}, {name}[/]")
        prepared = None
        try:
            if time.perf_counter() > deadline:
                yield [Row(self.name, name, {}, _short(self.dtype), "decode", status="out of time")]
                return
            prepared = self._prepare(name, max(lengths) + self.new_tokens)
            for length, batch in itertools.product(lengths, batches):
                yield self._cells(name, prepared, length, batch, bandwidth, deadline)
        except Exception as error:
            status = "out of memory"
            if not isinstance(error, torch.OutOfMemoryError):
                status = f"failed: {type(error).__name__}: {str(error)[:120]}"
            yield [Row(self.name, name, {}, _short(self.dtype), "decode", status=status)]
        del prepared
        self._collect()

    def kernels(self, length: int, batch: int, most: int = 12) -> list[dict[str, Any]]:
        """Where the GPU spends the time of a token of ours: the longest kernels, in microseconds a token."""
        ids = self._ids(OURS, length, batch)
        run = self._prepare(OURS, length + self.new_tokens).run
        run(ids, self.new_tokens)
        activity = torch.profiler.ProfilerActivity.CUDA
        # without the prompt, which is the first call
        totals: dict[str, list[float]] = {}
        for sign, count in ((-1, 1), (1, self.new_tokens)):
            with torch.profiler.profile(activities=[activity]) as profiler:
                run(ids, count)
                torch.cuda.synchronize(self.device)
            for event in profiler.key_averages():
                total = totals.setdefault(event.key, [0.0, 0.0])
                total[0] += sign * event.self_device_time_total
                total[1] += sign * event.count
        steps = self.new_tokens - 1
        longest = sorted(totals.items(), key=lambda item: -item[1][0])[:most]
        return [
            {
                "model": f"{self.name}, batch {batch}",
                "kernel": name[:60],
                "us a token": time_us / steps,
                "launches a token": count / steps,
            }
            for name, (time_us, count) in [("all", [sum(v[i] for v in totals.values()) for i in (0, 1)]), *longest]
        ]

    def _ids(self, name: str, length: int, batch: int) -> Tensor:
        """The prompts (B, L): random tokens, or the text that `make_repeating` goes on with."""
        if name in (REPEATING, DRAFTED):
            return (PERIOD + torch.arange(length) % PERIOD).expand(batch, -1).contiguous().to(self.device)
        generator = torch.Generator().manual_seed(length * 1000 + batch)
        most = min(50000, self.shape["vocab_size"])
        return torch.randint(3, most, (batch, length), generator=generator).to(self.device)

    def _prepare(self, name: str, positions: int) -> Prepared:
        """Build a contender that has room for `positions` tokens."""
        if name == MAMBA_SSM:
            return self._mamba_ssm()
        floor: Callable[[int, int], int] | None = self._floor_bytes
        if name in (OURS, STOCK_LOOP):
            model = self.ours
        elif name in (REPEATING, DRAFTED):
            model = self._build(lambda: make_repeating(self.kind, self.shape))
            # a draft reads the weights once for several tokens
            floor = self._floor_bytes if name == REPEATING else None
        elif name == TRANSFORMER:
            # all the memory for keys and values
            self.release()
            model = self._build(lambda: make_transformer(self.size, positions, self.layers))

            def floor(length: int, batch: int) -> int:
                return _transformer_bytes(model, length + self.new_tokens / 2, batch)

        else:
            classes = CLASSES[self.kind]
            make = classes.native if name == NATIVE else native_without_packages(self.kind)
            model = self._build(lambda: make(classes.native_config(**self.shape)))
            model.load_state_dict(self.ours.state_dict())

        def run(ids: Tensor, count: int, logits: bool = False) -> list[Tensor]:
            with _environment("HF_MAMBA_CUDA_GRAPH", "0" if name == STOCK_LOOP else "1"):
                # one token leaves nothing to draft
                drafts = {"prompt_lookup_num_tokens": DRAFT_TOKENS} if name == DRAFTED and count > 1 else {}
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    return_dict_in_generate=logits,
                    output_logits=logits,
                    **drafts,
                )
            return list(out.logits) if logits else [out]

        return Prepared(model, run, floor)

    def _mamba_ssm(self) -> Prepared:
        model = make_mamba_ssm(self.kind, self.shape, self.ours.state_dict(), self.device, self.dtype)
        model.eval()

        def run(ids: Tensor, count: int, logits: bool = False) -> list[Tensor]:
            out = model.generate(
                input_ids=ids,
                max_length=ids.shape[1] + count,
                cg=True,
                top_k=1,
                return_dict_in_generate=True,
                output_scores=logits,
            )
            return [score.float() for score in out.scores] if logits else [out.sequences]

        return Prepared(model, run, self._floor_bytes)

    def _cells(
        self, name: str, prepared: Prepared, length: int, batch: int, bandwidth: float, deadline: float
    ) -> list[Row]:
        """Prefill and decoding for one prompt length and batch size."""
        shape = {"B": batch, "L": length}
        cells = [
            Row(self.name, name, shape, _short(self.dtype), mode, parameters=prepared.parameters)
            for mode in ("prefill", "decode")
        ]
        if time.perf_counter() > deadline:
            for row in cells:
                row.status = "out of time"
            return cells
        run, ids = prepared.run, self._ids(name, length, batch)
        first, whole = [], []
        try:
            error = self._agreement(name, run, ids)
            note = self._repetition(name, run, ids) if name in (REPEATING, DRAFTED) else None
            for row in cells:
                row.error, row.note = error, note
                if error is not None and error > TOLERANCES[self.dtype]:
                    row.status = f"refused: logits differ by {error:.1e}"
            if cells[0].status != "measured":
                return cells
            # kernels compiled, graphs captured
            run(ids, self.new_tokens)
            cells[1].peak_memory_mib = peak_memory_mib(lambda: run(ids, self.new_tokens), self.device)
            for _ in range(self.rounds):
                first.append(self._clock(lambda: run(ids, 1)))
                whole.append(self._clock(lambda: run(ids, self.new_tokens)))
                if time.perf_counter() > deadline:
                    break
        except torch.OutOfMemoryError:
            for row in cells:
                row.status = "out of memory"
        if cells[0].status != "measured":
            # after the exception, which holds on to what its frames had allocated
            self._collect()
            return cells
        # the fastest, so that a slow first token does not make the others look fast
        base = min(first)
        cells[0].fill_times(Timing(first), tokens=batch * length)
        cells[1].fill_times(Timing([(time_ms - base) / (self.new_tokens - 1) for time_ms in whole]), tokens=batch)
        if prepared.floor_bytes is not None:
            cells[1].floor_ms = 1000 * prepared.floor_bytes(length, batch) / bandwidth
        if self.device.type == "cuda" and name not in (TRANSFORMER, REPEATING, DRAFTED):
            cells[1].target_ms = DECODE_TARGETS.get((self.kind, self.size, batch))
            if length == TARGET_PROMPT and batch == 1:
                cells[0].target_ms = PREFILL_TARGETS.get((self.kind, self.size))
        return cells

    def _agreement(self, name: str, run: Callable[..., Any], ids: Tensor) -> float | None:
        """How far the logits of the first two tokens are from ours; None for ours and for other weights."""
        if name in (TRANSFORMER, REPEATING, DRAFTED):
            return None
        logits = run(ids, 2, logits=True)
        key = tuple(ids.shape)
        # the second token of a batch may differ where two logits are nearly equal
        first = [logits[0].float().cpu()]
        if name == OURS:
            self.expected[key] = first
            return None
        if key not in self.expected:
            raise RuntimeError("ours has no logits to compare with")
        return disagreement(first, self.expected[key])

    def _repetition(self, name: str, run: Callable[..., list[Tensor]], ids: Tensor) -> str:
        """Without drafts, whether the text goes on as it has begun; with them, whether the tokens are those without."""
        (text,) = run(ids, self.new_tokens)
        said = text[:, ids.shape[1] :].cpu()
        key = tuple(ids.shape)
        if name == REPEATING:
            self.said[key] = said
            wrong = int((said != PERIOD + torch.arange(ids.shape[1], text.shape[1]) % PERIOD).sum())
            return "text repeats" if wrong == 0 else f"{wrong} of {said.numel()} tokens do not repeat the prompt"
        if key not in self.said:
            return "no tokens to compare with"
        wrong = int((said != self.said[key]).sum())
        return "tokens equal" if wrong == 0 else f"{wrong} of {said.numel()} tokens differ"

    def _clock(self, run: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return 1000 * (time.perf_counter() - start)

    def _floor_bytes(self, length: int, batch: int) -> int:
        """Weights read, states read and written: as much after any prompt."""
        model = self.ours
        weights = _weight_bytes(model)
        for module in model.modules():
            if isinstance(module, StackedExperts):
                chosen = min(module.num_experts, batch * module.config.num_experts_per_tok)
                left = 1 - chosen / module.num_experts
                weights -= int(left * sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)))
        cache = hf_mamba.RecurrentCache(model.config)
        with torch.no_grad():
            model(torch.ones(1, 1, dtype=torch.int64, device=self.device), cache=cache)
        return weights + 2 * batch * cache.nbytes


def _weight_bytes(model: Any) -> int:
    """What a step reads of the parameters: all, but of an embedding that is not the head as well only a few rows."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        weights -= embedding.numel() * embedding.element_size()
    return weights


def _transformer_bytes(model: Any, tokens: float, batch: int) -> int:
    """Weights, and keys and values of `tokens` tokens, which stand for the mean of all steps."""
    config = model.config
    return _weight_bytes(model) + int(
        2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * batch * tokens
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
