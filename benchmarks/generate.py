"""generate() on random weights of the published shapes, ours and its peers: time to the first token and time a token.

The time of a call with one new token is the time to the first token; what a call with more takes beyond that, divided by their
number, is the time a token. Both are wall time as a user has it, tokenizer and streaming left out. The floor is the time to
read every weight once and every state twice (read and written) at the speed of a copy; of routed experts, those that the batch can
choose.

Ours is measured first, at all shapes; then, in the same order, transformers' loop around our model and the peers. The record is
written after every row, so whatever ends a run early leaves what was measured. `python -m benchmarks plot` draws ms a token against
the length of the prompt.
"""

import contextlib
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hf_mamba
from benchmarks.contenders import (
    CLASSES,
    KINDS,
    OWN_KINDS,
    SIZES,
    make_mamba_ssm,
    native_without_packages,
    parse_names,
    parse_numbers,
    parse_peers,
)
from benchmarks.op_contenders import is_installed
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.timing import Timing, copy_bandwidth, disagreement, peak_memory_mib, synchronize
from hf_mamba.models.moe_mamba.experts import StackedExperts

__all__ = ["generate"]

OURS, STOCK_LOOP, NATIVE, BARE = "hf_mamba", "stock-loop", "transformers", "transformers-bare"
MAMBA_SSM, ATTENTION = "mamba_ssm", "attention"
# the quick ones first
PEERS = (MAMBA_SSM, ATTENTION, STOCK_LOOP, NATIVE, BARE)
# those that have no MoE-Mamba
OTHER_CLASSES = (NATIVE, BARE, MAMBA_SSM)
# a Transformer of the same size: the shapes of Pythia (arXiv 2304.01373, table 1)
PYTHIA = {
    "130m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "370m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "1.4b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
}
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


def generate(
    models: Annotated[str, typer.Option(help=f"Out of {', '.join(OWN_KINDS)}, separated by commas.")] = ",".join(
        OWN_KINDS
    ),
    sizes: Annotated[str, typer.Option(help=f"Out of {', '.join(PYTHIA)}.")] = "130m,370m,1.4b,2.8b",
    prompts: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "128,2048",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,64,256",
    new_tokens: Annotated[int, typer.Option(help="New tokens of a timed call.", min=2)] = 64,
    against: Annotated[
        str, typer.Option(help="Peers, or none; those that are not installed are named and left out.")
    ] = ",".join(PEERS),
    rounds: Annotated[int, typer.Option(help="Timed calls of each contender.", min=1)] = 3,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the kernels of a token of ours.")] = False,
    layers: Annotated[int | None, typer.Option(help="Layers; those of the checkpoints when left out.")] = None,
    seconds: Annotated[float, typer.Option(help="What is not measured after this time is left out.")] = 300.0,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: in benchmarks/results.")] = None,
) -> None:
    """Time greedy generate() by model, size, prompt and batch: first token, time a token, memory, share of the floor."""
    console = table_console()
    start = time.perf_counter()
    try:
        kinds = parse_names(models, "--models", OWN_KINDS)
        chosen = parse_names(sizes, "--sizes", tuple(PYTHIA))
        peers = parse_peers(against, PEERS)
        lengths, rows = parse_numbers(prompts, "--prompts"), parse_numbers(batches, "--batches")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if not is_installed(MAMBA_SSM):
        if MAMBA_SSM in peers:
            console.print("mamba_ssm is not installed and left out")
        # then transformers has no packages anyway
        peers = [peer for peer in peers if peer != MAMBA_SSM and (peer != BARE or NATIVE not in peers)]
    bandwidth = copy_bandwidth(device)
    record = Record(
        "generate" if device.type == "cuda" else "cpu-generate-peers",
        settings={"new_tokens": new_tokens, "rounds": rounds, "copy_bytes_per_s": bandwidth},
        commit=commit,
    )
    deadline = start + seconds
    benches = [
        Bench(kind, size, device, dtype, new_tokens, rounds, layers, console) for size in chosen for kind in kinds
    ]
    for names in ((OURS,), peers):
        for bench in benches:
            for name in names:
                # one transformer stands beside all models of a size
                alone = name == ATTENTION and bench.kind != kinds[0]
                if alone or (bench.kind not in KINDS and name in OTHER_CLASSES):
                    continue
                for cells in bench.contender(name, lengths, rows, bandwidth, deadline):
                    record.rows += cells
                    record.save(output)
            if profile and OURS in names and device.type == "cuda" and time.perf_counter() < deadline:
                record.summary += [entry for batch in rows for entry in bench.kernels(lengths[0], batch)]
                record.save(output)
            bench.release()
    subjects = [bench.name for bench in benches]
    record.rows.sort(key=lambda row: subjects.index(row.subject))
    print_table(console, record)
    record.print_summary(console, "Kernels of a token")
    console.print(f"written to {record.save(output)}", soft_wrap=True)


def print_table(console: Console, record: Record) -> None:
    """A line for each contender, prompt and batch; one table a model."""
    for subject, rows in itertools.groupby(record.rows, lambda row: row.subject):
        table = Table(title=subject, title_justify="left")
        for name in ("prompt", "batch", "contender"):
            table.add_column(name, no_wrap=True)
        for name in ("first token ms", "target", "ms a token", "target", "of floor", "tokens/s", "MiB", "error"):
            table.add_column(name, justify="right")
        table.add_column("note")
        lines: dict[tuple, dict[str, Row]] = {}
        for row in rows:
            key = (row.shape.get("L", 0), row.shape.get("B", 0), row.contender)
            lines.setdefault(key, {})[row.mode] = row
        for (length, batch, contender), cells in sorted(lines.items(), key=lambda item: item[0][:2]):
            decode = cells["decode"]
            prefill = cells.get("prefill", decode)
            share = "-"
            if decode.floor_ms is not None and decode.p50_ms:
                share = f"{decode.floor_ms / decode.p50_ms:.0%}"
            table.add_row(
                str(length),
                str(batch),
                contender,
                format_number(prefill.p50_ms if prefill is not decode else None),
                format_number(prefill.target_ms),
                format_number(decode.p50_ms),
                format_number(decode.target_ms),
                share,
                format_number(decode.tokens_per_s),
                format_number(decode.peak_memory_mib),
                "-" if decode.error is None else f"{decode.error:.0e}",
                "" if decode.status == "measured" else decode.status,
            )
        console.print(table)


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
        # the first logits of ours after each prompt, which the others have to agree with
        self.expected: dict[tuple[int, ...], list[Tensor]] = {}

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
        model = None
        try:
            if time.perf_counter() > deadline:
                yield [Row(self.name, name, {}, _short(self.dtype), "decode", status="out of time")]
                return
            model, run = self._prepare(name)
            for length, batch in itertools.product(lengths, batches):
                yield self._cells(name, run, length, batch, bandwidth, deadline)
        except Exception as error:
            status = "out of memory"
            if not isinstance(error, torch.OutOfMemoryError):
                status = f"failed: {type(error).__name__}: {str(error)[:120]}"
            yield [Row(self.name, name, {}, _short(self.dtype), "decode", status=status)]
        del model
        self._collect()

    def kernels(self, length: int, batch: int, most: int = 12) -> list[dict[str, Any]]:
        """Where the GPU spends the time of a token of ours: the longest kernels, in microseconds a token."""
        ids = torch.randint(3, 50000, (batch, length)).to(self.device)
        _, run = self._prepare(OURS)
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

    def _prepare(self, name: str) -> tuple[Any, Callable[..., Any]]:
        """The model, and `run(ids, count, logits)`, which generates `count` tokens and returns the logits if wanted."""
        if name == MAMBA_SSM:
            return self._mamba_ssm()
        if name in (OURS, STOCK_LOOP):
            model = self.ours
        elif name in (NATIVE, BARE):
            classes = CLASSES[self.kind]
            make = classes.native if name == NATIVE else native_without_packages(self.kind)
            model = self._build(lambda: make(classes.native_config(**self.shape)))
            model.load_state_dict(self.ours.state_dict())
        else:
            shape = PYTHIA[self.size] | ({} if self.layers is None else {"num_hidden_layers": self.layers})
            config = transformers.GPTNeoXConfig(vocab_size=50304, max_position_embeddings=65536, **shape)
            model = self._build(lambda: transformers.GPTNeoXForCausalLM(config))

        def run(ids: Tensor, count: int, logits: bool = False) -> list[Tensor]:
            with _environment("HF_MAMBA_CUDA_GRAPH", "0" if name == STOCK_LOOP else "1"):
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=count,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    return_dict_in_generate=logits,
                    output_logits=logits,
                )
            return list(out.logits) if logits else []

        return model, run

    def _mamba_ssm(self) -> tuple[Any, Callable[..., Any]]:
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
            return [score.float() for score in out.scores] if logits else []

        return model, run

    def _cells(
        self, name: str, run: Callable[..., Any], length: int, batch: int, bandwidth: float, deadline: float
    ) -> list[Row]:
        """Prefill and decoding for one prompt length and batch size."""
        shape = {"B": batch, "L": length}
        cells = [Row(self.name, name, shape, _short(self.dtype), mode) for mode in ("prefill", "decode")]
        if time.perf_counter() > deadline:
            for row in cells:
                row.status = "out of time"
            return cells
        generator = torch.Generator().manual_seed(length * 1000 + batch)
        ids = torch.randint(3, 50000, (batch, length), generator=generator).to(self.device)
        try:
            error = self._agreement(name, run, ids)
            for row in cells:
                row.error = error
                if error is not None and error > TOLERANCES[self.dtype]:
                    row.status = f"refused: logits differ by {error:.1e}"
            if cells[0].status != "measured":
                return cells
            # kernels compiled, graphs captured
            run(ids, self.new_tokens)
            cells[1].peak_memory_mib = peak_memory_mib(lambda: run(ids, self.new_tokens), self.device)
            first, whole = [], []
            for _ in range(self.rounds):
                first.append(self._clock(lambda: run(ids, 1)))
                whole.append(self._clock(lambda: run(ids, self.new_tokens)))
                if time.perf_counter() > deadline:
                    break
        except torch.OutOfMemoryError:
            for row in cells:
                row.status = "out of memory"
            return cells
        base = statistics.median(first)
        cells[0].fill_times(Timing(first), tokens=batch * length)
        cells[1].fill_times(Timing([(time_ms - base) / (self.new_tokens - 1) for time_ms in whole]), tokens=batch)
        if name != ATTENTION:
            cells[1].floor_ms = 1000 * self._floor_bytes(batch) / bandwidth
            if self.device.type != "cuda":
                return cells
            cells[1].target_ms = DECODE_TARGETS.get((self.kind, self.size, batch))
            if length == TARGET_PROMPT and batch == 1:
                cells[0].target_ms = PREFILL_TARGETS.get((self.kind, self.size))
        return cells

    def _agreement(self, name: str, run: Callable[..., Any], ids: Tensor) -> float | None:
        """How far the logits of the first two tokens are from ours; None for ours and for another architecture."""
        if name == ATTENTION:
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

    def _clock(self, run: Callable[[], Any]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return 1000 * (time.perf_counter() - start)

    def _floor_bytes(self, batch: int) -> int:
        model = self.ours
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for module in model.modules():
            if isinstance(module, StackedExperts):
                chosen = min(module.num_experts, batch * module.config.num_experts_per_tok)
                left = 1 - chosen / module.num_experts
                weights -= int(left * sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)))
        if not model.config.tie_word_embeddings:
            embedding = model.get_input_embeddings().weight
            weights -= embedding.numel() * embedding.element_size()
        cache = hf_mamba.RecurrentCache(model.config)
        with torch.no_grad():
            model(torch.ones(1, 1, dtype=torch.int64, device=self.device), cache=cache)
        return weights + 2 * batch * cache.nbytes


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
