"""generate() on random weights of the published shapes, ours and its peers: time to the first token and time a token.

The time of a call with one new token is the time to the first token; what a call with more takes beyond that, divided by their
number, is the time a token. Both are wall time as a user has it, tokenizer and streaming left out. The floor is the time to
read every weight once and every state twice (read and written) at the speed of a copy; of routed experts, those that the batch can
choose; of a transformer, weights and keys and values once.

Ours is measured first, at all shapes; then, in the same order, transformers' loop around our model and the peers. `transformer` is
a Pythia of the same size: measured once, shown with every model of the size. The record is written after every row, so whatever
ends a run early leaves what was measured. `python -m benchmarks plot` draws ms a token against the length of the prompt.
"""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import (
    KINDS,
    OWN_KINDS,
    PYTHIA,
    TRANSFORMER,
    parse_names,
    parse_numbers,
    parse_peers,
)
from benchmarks.generate_bench import BARE, DRAFTED, MAMBA_SSM, NATIVE, OURS, REPEATING, STOCK_LOOP, Bench
from benchmarks.op_contenders import is_installed
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.timing import copy_bandwidth

__all__ = ["generate"]

# the quick ones first
PEERS = (MAMBA_SSM, TRANSFORMER, STOCK_LOOP, NATIVE, BARE)
# those that have no MoE-Mamba
OTHER_CLASSES = (NATIVE, BARE, MAMBA_SSM)


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
    drafted: Annotated[
        bool, typer.Option("--drafted", help="Also time ours on a repeating text, with and without prompt lookup.")
    ] = False,
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
    own = (OURS, REPEATING, DRAFTED) if drafted else (OURS,)
    for group in (own, peers):
        for bench in benches:
            for name in group:
                # one transformer stands beside all models of a size
                again = name == TRANSFORMER and bench.kind != kinds[0]
                if again or (bench.kind not in KINDS and name in OTHER_CLASSES):
                    continue
                others = [other.name for other in benches if other.size == bench.size and other is not bench]
                batches_of = [1] if name in (REPEATING, DRAFTED) else rows
                for cells in bench.contender(name, lengths, batches_of, bandwidth, deadline):
                    record.rows += cells
                    if name == TRANSFORMER:
                        note = f"measured once, with {bench.name}"
                        record.rows += [replace(row, subject=other, note=note) for other in others for row in cells]
                    record.save(output)
            if profile and group is own and device.type == "cuda" and time.perf_counter() < deadline:
                record.summary += [entry for batch in rows for entry in bench.kernels(lengths[0], batch)]
                record.save(output)
            bench.release()
    subjects = [bench.name for bench in benches]
    names = [*own, *peers]
    record.rows.sort(key=lambda row: (subjects.index(row.subject), names.index(row.contender)))
    print_table(console, record)
    record.print_summary(console, "Kernels of a token")
    console.print(f"written to {record.save(output)}", soft_wrap=True)


def print_table(console: Console, record: Record) -> None:
    """A line for each contender, prompt and batch; one table a model."""
    for subject, rows in itertools.groupby(record.rows, lambda row: row.subject):
        table = Table(title=subject, title_justify="left")
        for name in ("prompt", "batch", "contender"):
            table.add_column(name, no_wrap=True)
        for name in (
            "M params",
            "first token ms",
            "target",
            "ms a token",
            "target",
            "of floor",
            "tokens/s",
            "MiB",
            "error",
        ):
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
                format_number(None if decode.parameters is None else decode.parameters / 1e6),
                format_number(prefill.p50_ms if prefill is not decode else None),
                format_number(prefill.target_ms),
                format_number(decode.p50_ms),
                format_number(decode.target_ms),
                share,
                format_number(decode.tokens_per_s),
                format_number(decode.peak_memory_mib),
                "-" if decode.error is None else f"{decode.error:.0e}",
                (decode.note or "") if decode.status == "measured" else decode.status,
            )
        console.print(table)
