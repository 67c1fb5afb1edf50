"""Training steps on random weights of the published shapes: ours with each option, and its peers with the same weights.

A step is forward, loss, backward and a fused AdamW update; all tokens of a batch count. Before anything is timed, the losses
before and after the first update have to be those of the first contender of ours (of the first with adapters, for those with
adapters). Peak memory is that of a step with weights and optimiser state, as torch counts it on a GPU and the kernel on Linux. One
contender after the other is on the device; ours come first at every shape, then the peers.

MFU is what the model has to compute in a step (`train_bench.step_flops`) over what the datasheet says the device could have done in that time.
What is computed twice, to save memory, does not count.

What is not run, because a step would take longer than the cap, memory or time were short, is a row that says so. The record is written
after every row.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import (
    CLASSES,
    OWN_KINDS,
    SIZES,
    parse_names,
    parse_numbers,
    parse_peers,
)
from benchmarks.op_contenders import is_installed
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.train_bench import (
    BARE,
    CHECKPOINTED,
    LEAN_SHARE,
    LORA,
    MAMBA_SSM,
    NATIVE,
    OURS,
    TARGETS,
    TOLERANCES,
    Bench,
    Contender,
    has_adapters,
    peak_flops,
    target_of,
)

__all__ = ["train"]

PEERS = (NATIVE, MAMBA_SSM, BARE)
# what ours can be asked to do, and the name that asks for nothing
OPTIONS = (
    "eager",
    "skip_logits",
    "graph",
    "lean",
    "part_lean",
    "part_checkpointing",
    "checkpointing",
    "compile",
    "compile_graphs",
    "lora",
    "lora_16bit",
)
PLAIN = "plain"
# tokens of a step where --batch does not say otherwise
TOKENS = {"cuda": 16384, "cpu": 2048}


def train(
    models: Annotated[str, typer.Option(help=f"Out of {', '.join(OWN_KINDS)}, separated by commas.")] = ",".join(
        OWN_KINDS
    ),
    sizes: Annotated[
        str | None, typer.Option(help=f"Out of {', '.join(SIZES)}; 130m, 370m and 1.4b on a GPU, else small.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences of a step; as many as make 16384 tokens on a GPU, else 2048.", min=1)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", "--length", help="Tokens of a sequence; 2048,16384 on a GPU, else 512.")
    ] = None,
    options: Annotated[
        str,
        typer.Option(
            help=f"Contenders of ours: {PLAIN}, or options out of {', '.join(OPTIONS)} joined by +. What each changes is set "
            "against the one before."
        ),
    ] = "plain,skip_logits,graph,graph+lean,graph+part_checkpointing,graph+checkpointing,skip_logits+compile,graph+lora,graph+lora_16bit",
    against: Annotated[
        str, typer.Option(help="Peers, or none; those that are not installed are named and left out.")
    ] = ",".join(PEERS),
    precision: Annotated[
        str | None,
        typer.Option(help="bfloat16 (weights too), autocast (weights in fp32) or float32, which a CPU takes."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
    layers: Annotated[int | None, typer.Option(help="Layers; those of the checkpoints when left out.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also list the kernels of a step of ours with the last options.")
    ] = False,
    cell_seconds: Annotated[float, typer.Option(help="Time for each contender, three steps at least.")] = 3.0,
    cap_seconds: Annotated[float, typer.Option(help="A step expected to take longer is not run.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="What is not measured after this time is left out.")] = 300.0,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: in benchmarks/results.")] = None,
) -> None:
    """Time whole training steps by model, size and option: tokens/s, peak memory, MFU, and what each option changes."""
    console = table_console(170)
    start = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    try:
        kinds = parse_names(models, "--models", OWN_KINDS)
        chosen = parse_names(sizes or ("130m,370m,1.4b" if on_gpu else "small"), "--sizes", tuple(SIZES))
        tokens = parse_numbers(lengths or ("2048,16384" if on_gpu else "512"), "--lengths")
        if tokens[0] < 2:
            raise ValueError("--lengths takes at least 2 tokens, or there is nothing to predict.")
        own = parse_options(options)
        peers = parse_peers(against, PEERS)
        wanted = precision or ("bfloat16" if on_gpu else "float32")
        if wanted not in TOLERANCES:
            raise ValueError(f"--precision takes one of {', '.join(TOLERANCES)}, got {wanted!r}.")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not is_installed(MAMBA_SSM):
        if MAMBA_SSM in peers:
            console.print("mamba_ssm is not installed and left out")
        # then transformers has no packages anyway
        peers = [peer for peer in peers if peer != MAMBA_SSM and (peer != BARE or NATIVE not in peers)]
    record = Record(
        "train" if on_gpu else "cpu-train",
        settings={
            "optimizer": "AdamW, fused",
            "lora": LORA,
            "part_checkpointing": f"every {CHECKPOINTED}rd block",
            "part_lean": LEAN_SHARE,
            "backend": backend,
            "layers": layers,
            "peak_flops": peak_flops(device),
            "targets": {" ".join(map(str, key)): asdict(target) for key, target in TARGETS.items()},
        },
        commit=commit,
    )
    benches = [
        Bench(
            kind,
            size,
            layers,
            {"B": batch or max(1, TOKENS[device.type] // length), "L": length},
            device,
            wanted,
            backend,
        )
        for size, kind, length in itertools.product(chosen, kinds, tokens)
    ]
    # ours first: whatever ends the run early leaves those
    ours = [Contender(OURS, asked) for asked in own]
    for contenders in (ours, list(with_adapters(peers, own))):
        for bench in benches:
            for contender in contenders:
                if contender.who != OURS and CLASSES[bench.kind].native is None:
                    continue
                console.print(f"[dim]{bench.name} {bench.shape_text}, {contender.name}[/]")
                row = Row(bench.name, contender.name, bench.shape, wanted, "step", status="out of time")
                if time.perf_counter() - start < seconds:
                    bench.fill(row, contender, cell_seconds, cap_seconds)
                record.rows.append(row)
                record.save(output)
            if profile and on_gpu and contenders is ours and time.perf_counter() - start < seconds:
                record.settings.setdefault("kernels", []).append(bench.kernels(contenders[-1]))
                record.save(output)
            bench.release()
    record.rows.sort(key=lambda row: [bench.key for bench in benches].index((row.subject, tuple(row.shape.values()))))
    record.summary = [entry for bench in benches for entry in ablation(record.rows, bench.key)]
    print_table(console, record)
    record.print_summary(console, "what each option of ours changes")
    for entry in record.settings.get("kernels", []):
        print_kernels(console, entry)
    console.print(f"written to {record.save(output)}", soft_wrap=True)
    wrong = [f"{row.subject} ({row.contender})" for row in record.rows if row.status.startswith("refused")]
    if wrong:
        console.print(f"[red]the gate is red: {', '.join(wrong)}[/]")
        raise typer.Exit(1)


def with_adapters(peers: Iterable[str], own: Iterable[tuple[str, ...]]) -> Iterable[Contender]:
    """The peers, and transformers with adapters too if one of ours has them."""
    wanted = any(has_adapters(options) for options in own)
    for peer in peers:
        yield Contender(peer)
        if wanted and peer != MAMBA_SSM:
            yield Contender(peer, ("lora",))


def parse_options(text: str) -> list[tuple[str, ...]]:
    """The contenders of ours: tuples of options, plain first, since it is what the others are compared with.

    Raises:
        ValueError: an unknown option.
    """
    found: list[tuple[str, ...]] = [()]
    for part in text.split(","):
        names = tuple(name.strip() for name in part.split("+") if name.strip() != PLAIN)
        unknown = [name for name in names if name not in OPTIONS]
        if unknown:
            raise ValueError(
                f"--options takes {PLAIN} and options out of {', '.join(OPTIONS)} joined by +, separated by commas, got {text!r}."
            )
        if names not in found:
            found.append(names)
    return found


def ablation(rows: list[Row], key: tuple[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """For each contender of ours at one shape, speed and memory against those without options and those of the row before."""
    own = [row for row in rows if (row.subject, tuple(row.shape.values())) == key and row.contender.startswith(OURS)]

    def ratio(value: float | None, base: float | None) -> float | None:
        return None if value is None or base is None else value / base

    plain = next(row for row in own if row.contender == OURS)
    return [
        {
            "model": row.subject,
            "L": str(row.shape["L"]),
            "contender": row.contender,
            "tokens/s": row.tokens_per_s,
            "times plain": ratio(row.tokens_per_s, plain.tokens_per_s),
            "times the row before": ratio(row.tokens_per_s, before.tokens_per_s),
            "GB": gigabytes(row),
            "of plain": ratio(row.peak_memory_mib, plain.peak_memory_mib),
        }
        for before, row in zip([own[0], *own], own, strict=False)
    ]


def gigabytes(row: Row) -> float | None:
    """Peak memory in units of 10⁹ bytes, as targets are."""
    return None if row.peak_memory_mib is None else row.peak_memory_mib * 2**20 / 1e9


def print_table(console: Console, record: Record) -> None:
    """A line for each contender; one table a model. Percentiles of tokens/s are those of the steps, the slow ones first."""
    device = "cpu" if record.benchmark.startswith("cpu") else "cuda"
    for _, group in itertools.groupby(record.rows, lambda row: (row.subject, *row.shape.values())):
        rows = list(group)
        shape, precision = rows[0].shape, rows[0].dtype
        title = f"{rows[0].subject}, B{shape['B']} L{shape['L']}, {precision}"
        table = Table(title=title, title_justify="left")
        table.add_column("contender", no_wrap=True)
        for name in ("tokens/s p20", "p50", "p80", "target", "step ms", "GB", "target", "MFU", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note")
        for row in rows:
            target = target_of(row, device, record.settings["layers"])
            tokens = shape["B"] * shape["L"]
            speeds = [None if t is None else 1000 * tokens / t for t in (row.p80_ms, row.p50_ms, row.p20_ms)]
            table.add_row(
                row.contender,
                *map(_thousands, speeds),
                _met(_thousands, row.tokens_per_s, None if target is None else target.tokens_per_s, at_least=True),
                format_number(row.p50_ms),
                format_number(gigabytes(row)),
                _met(format_number, gigabytes(row), None if target is None else target.gigabytes, at_least=False),
                "-" if row.mfu is None else f"{row.mfu:.1%}",
                "-" if row.error is None else f"{row.error:.0e}",
                "" if row.status == "measured" else row.status,
            )
        console.print(table)


def print_kernels(console: Console, entry: dict[str, Any]) -> None:
    """Where the GPU spends the time of a step."""
    title = f"{entry['model']}, {entry['contender']}: {entry['kernels ms']:.1f} ms of kernels in a step of {entry['step ms']:.1f} ms"
    table = Table(
        title=f"{title}; host {entry['host ms']:.1f} ms, {entry['launches']:.0f} launches", title_justify="left"
    )
    for name in ("kernel", "ms", "launches"):
        table.add_column(name)
    for line in entry["longest"]:
        table.add_row(line["kernel"], f"{line['ms']:.2f}", f"{line['launches']:.0f}")
    console.print(table)


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _met(show: Callable[[float | None], str], value: float | None, target: float | None, *, at_least: bool) -> str:
    if target is None or value is None:
        return show(target)
    return f"{show(target)} {'✓' if (value >= target) == at_least or value == target else '✗'}"
