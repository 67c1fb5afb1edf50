"""The ops against their peers: `python -m benchmarks ops`. The gate first, then the clock.

Every contender of a row is compared with the fp64 reference at the full shape (`op_gate`); one that is wrong is not timed. Then
all of them run in turns. Times are those of the device between two events, after the L2 cache was cleared; `host ms` is what
the host needs to issue a call when it does not wait. Kernels are compiled in fresh processes before (`op_process`).
"""

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import parse_names, parse_numbers, parse_peers
from benchmarks.op_contenders import EAGER, OURS, PEERS, Implementation, implementation, is_installed, offers
from benchmarks.op_gate import TOLERANCES, Gate
from benchmarks.op_process import FirstCall, first_calls
from benchmarks.op_rows import OPS, ROWS, OpRow, floor_bytes, rows_at
from benchmarks.op_variants import variant, variants_of
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.timing import copy_bandwidth, host_ms, measure, peak_memory_mib

__all__ = ["ops"]

# a token at a time, each in several launches: longer sequences take minutes
EAGER_LONGEST = 2048
FIRST_CALL_TARGET_S = 5.0
# most of a cell's time: enough for 50 rounds of a millisecond
CELL_SECONDS = 0.25
# fresh processes at a time
PROCESSES = max(1, min(12, (os.cpu_count() or 1) - 2))


@dataclass
class Budget:
    """The `--seconds` of a run, counted from its start."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)


def ops(
    op: Annotated[str, typer.Option(help="Ops, separated by commas; all when left out.")] = ",".join(OPS),
    against: Annotated[
        str,
        typer.Option(
            help="Contenders, separated by commas, or none; those that are not installed are named and left out."
        ),
    ] = ",".join([*PEERS, EAGER]),
    rows: Annotated[str, typer.Option(help="Only rows whose label holds this text, such as L65536.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The first row of each op alone.")] = False,
    lengths: Annotated[str | None, typer.Option(help="Instead of the rows: a curve over these lengths.")] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Compare the settings in op_variants as well.")] = False,
    seconds: Annotated[float, typer.Option(help="What is not measured after this time is left out.")] = 120.0,
    first_call: Annotated[bool, typer.Option(help="Time the first call in fresh processes.")] = True,
    cache: Annotated[
        Path | None, typer.Option(help="Keep compiled kernels here; what lies there shortens first calls.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: in benchmarks/results.")] = None,
) -> None:
    """Check and time the ops at the shapes of the "Numbers to beat", forward and forward + backward, in bf16."""
    console = table_console(width=190)
    budget = Budget(seconds)
    try:
        names = parse_names(op, "--op", tuple(OPS))
        peers = parse_peers(against, (*PEERS, EAGER))
        chosen = ROWS if lengths is None else rows_at(parse_numbers(lengths, "--lengths"))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    chosen = tuple(row for row in chosen if row.op in names and rows in row.label)
    if quick:
        chosen = tuple({row.op: row for row in reversed(chosen)}.values())[::-1]
    if not chosen:
        raise typer.BadParameter(f"no row of {', '.join(names)} holds {rows!r}.", param_hint="--rows")
    missing = [peer for peer in peers if peer != EAGER and not is_installed(peer)]
    if missing:
        console.print(f"[dim]not installed, so not compared: {', '.join(missing)}[/]")
    present = [OURS, *(peer for peer in peers if peer not in missing)]

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record("ops", settings={"seconds": seconds, "not installed": missing}, commit=commit)
    cells = [
        (row, [OURS, *(variants_of(row.op) if variants else []), *(n for n in present[1:] if offers(row.op, n))])
        for row in chosen
    ]
    kernels = Path(tempfile.mkdtemp(prefix="hf-mamba-bench-")) if cache is None else cache.resolve()
    before = {name: os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TRITON_CACHE_AUTOTUNING")}
    try:
        if device.type == "cuda":
            # what a peer's autotuning found in one process serves the others
            os.environ |= {"TRITON_CACHE_DIR": str(kernels), "TRITON_CACHE_AUTOTUNING": "1"}
            _compile(record, cells, kernels, first_call)
            _print_first_calls(record, console)
        bandwidth = copy_bandwidth(device)
        record.settings["copy GB/s"] = bandwidth / 1e9
        for row, contenders in cells:
            _measure_row(record, row, contenders, device, bandwidth, budget)
            gc.collect()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if cache is None:
            shutil.rmtree(kernels, ignore_errors=True)
        _print_rows(record, console)
        console.print(f"written to {record.save(output)}", soft_wrap=True)
    wrong = sorted({f"{row.subject} ({row.contender})" for row in record.rows if row.status.startswith("refused")})
    if any(entry.endswith(f"({OURS})") for entry in wrong):
        console.print(f"[red]the gate is red: {', '.join(wrong)}[/]")
        raise typer.Exit(1)


def _compile(record: Record, cells: Sequence[tuple[OpRow, list[str]]], cache: Path, timed: bool) -> None:
    """Fill the kernel cache: first one row of each op, which gives the times of first calls, then everything else."""
    rows_of: dict[tuple[str, str], list[OpRow]] = {}
    for row, contenders in cells:
        for name in contenders:
            if name != EAGER:
                rows_of.setdefault((row.op, name), []).append(row)
    first = [(rows[:1], name) for (_, name), rows in rows_of.items() if name in (OURS, *PEERS)]
    found = first_calls(first, cache, PROCESSES)
    if timed:
        record.summary = [
            _first_call_entry(row, name, took) for ((row,), name), took in zip(first, found, strict=True)
        ]
    later = [(rows[1:] if name in (OURS, *PEERS) else rows, name) for (_, name), rows in rows_of.items()]
    first_calls([(rows, name) for rows, name in later if rows], cache, PROCESSES)


def _first_call_entry(row: OpRow, contender: str, took: FirstCall) -> dict[str, str | float | None]:
    forward, both = (None, None) if isinstance(took, str) else took
    return {
        "op": row.op,
        "contender": contender,
        "first forward, s": forward,
        "then first forward + backward, s": both,
        "target, s": FIRST_CALL_TARGET_S,
        "note": took if isinstance(took, str) else "",
    }


def _measure_row(
    record: Record, row: OpRow, contenders: Sequence[str], device: torch.device, bandwidth: float, budget: Budget
) -> None:
    """Gate and time all contenders of one row; adds two lines of the record for each, one for an update."""
    modes = ("forward",) if OPS[row.op].updates is not None else ("forward", "forward + backward")
    lines = {(name, mode): Row(row.op, name, row.shape, "bfloat16", mode) for mode in modes for name in contenders}
    record.rows += lines.values()
    implementations: dict[str, Implementation] = {}
    gate = Gate(row, device) if budget.left > 0 else None
    for name in contenders:
        error: float | None = None
        refusal: str | None = f"not run: --seconds {budget.seconds:g} were over"
        if gate is not None and budget.left > 0:
            error, refusal = _admit(row, name, implementations, gate)
        for mode in modes:
            lines[name, mode].error = error
            if refusal is not None:
                lines[name, mode].status = refusal
    if gate is None:
        return
    operands = gate.operands
    del gate
    floors = floor_bytes(row, operands)
    targets = (row.forward_target, row.both_target)
    for i, mode in enumerate(modes):
        runs: dict[str, Callable[[], object]] = {}
        for name, item in implementations.items():
            prepared = {key: value.detach() for key, value in item.prepare(operands).items()}
            runs[name] = _forward(item, prepared) if i == 0 else _both(item, prepared)
        for name, run in runs.items():
            run()
            line = lines[name, mode]
            line.peak_memory_mib = peak_memory_mib(run, device)
            line.host_ms = host_ms(run, device)
            line.floor_ms = 1000 * floors[i] / bandwidth
            line.target_ms = targets[i]
        for name, timing in measure(runs, device, CELL_SECONDS, min_rounds=5).items():
            lines[name, mode].fill_times(timing)


def _admit(
    row: OpRow, name: str, implementations: dict[str, Implementation], gate: Gate
) -> tuple[float | None, str | None]:
    """Put a contender that passes the gate into `implementations`; its largest error, and why it is refused if it is."""
    if name == EAGER and row.op in ("selective_scan", "ssd_chunk_scan") and row.shape["L"] > EAGER_LONGEST:
        return None, f"not run: L is more than {EAGER_LONGEST}"
    try:
        item = variant(row.op, name) or implementation(row.op, name)
        if item is None:
            return None, f"not run: {name} has no {row.op}"
        errors = gate.errors(item)
    except Exception as problem:
        # a peer that cannot be imported or crashes is a line of the table, not the end of the run
        return None, f"refused: {type(problem).__name__}: {str(problem).strip().splitlines()[-1][:100]}"
    worst, error = max(errors.items(), key=lambda entry: entry[1])
    tolerance = TOLERANCES[name.startswith(OURS) or name == EAGER]
    if not error <= tolerance:
        return error, f"refused: {worst} differs by {error:.1e}, more than {tolerance:.0e}"
    implementations[name] = item
    return error, None


def _forward(item: Implementation, prepared: dict[str, torch.Tensor]) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        with item.applied():
            item.call(prepared)

    return run


def _both(item: Implementation, prepared: dict[str, torch.Tensor]) -> Callable[[], object]:
    leaves = {name: value.requires_grad_() for name, value in prepared.items()}
    with torch.no_grad(), item.applied():
        weights = [torch.randn_like(output) for output in item.call(leaves)]

    def run() -> None:
        with item.applied():
            torch.autograd.grad(item.call(leaves), list(leaves.values()), weights)

    return run


def _print_first_calls(record: Record, console: Console) -> None:
    record.print_summary(console, f"first call in a fresh process, {PROCESSES} at a time")


def _print_rows(record: Record, console: Console) -> None:
    """One table: every row, slower contenders and refused ones included."""
    table = Table(title=f"ops, bf16; copy {record.settings.get('copy GB/s', 0):.0f} GB/s", title_justify="left")
    for name in ("op", "shape", "contender", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("p20 ms", "p50 ms", "p80 ms", "target", "of floor", "host ms", "MiB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    previous = None
    for line in record.rows:
        shape = " ".join(f"{name}{size}" for name, size in line.shape.items())
        if previous not in (None, (line.subject, shape)):
            table.add_section()
        previous = (line.subject, shape)
        share = None if line.floor_ms is None or line.p50_ms is None else line.floor_ms / line.p50_ms
        target = "-" if line.target_ms is None else format_number(line.target_ms)
        if line.contender == OURS and line.target_ms is not None and line.p50_ms is not None:
            target += " ✓" if line.p50_ms <= line.target_ms else " ✗"
        table.add_row(
            line.subject,
            shape,
            line.contender,
            "fwd" if line.mode == "forward" else "fwd + bwd",
            *map(format_number, (line.p20_ms, line.p50_ms, line.p80_ms)),
            target,
            "-" if share is None else f"{share:.0%}",
            format_number(line.host_ms),
            format_number(line.peak_memory_mib),
            "-" if line.error is None else f"{line.error:.0e}",
            "" if line.status == "measured" else line.status,
        )
    console.print(table)
