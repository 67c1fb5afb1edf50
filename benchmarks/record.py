"""What is written down: one row per contender and shape, with everything that is needed to measure it again."""

import datetime
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Outcome, Timing
from hf_mamba.env import collect

__all__ = ["RESULTS", "Record", "Row", "commit", "format_number", "table_console"]

RESULTS = Path(__file__).parent / "results"
# None in the record says that a peer ran without it
PEERS = ("mambapy", "mamba-ssm", "causal-conv1d", "flash-linear-attention")


@dataclass
class Row:
    """One contender at one shape. Times are milliseconds; a row without them says why in `status`."""

    subject: str
    contender: str
    shape: dict[str, int]
    dtype: str
    mode: str
    status: str = "measured"
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    best_ms: float | None = None
    best_cpu_ms: float | None = None
    runs: int = 0
    peak_memory_mib: float | None = None
    error: float | None = None
    tokens_per_s: float | None = None
    # what the host needs to issue a call; what the bytes need that have to be moved; what is aimed at
    host_ms: float | None = None
    floor_ms: float | None = None
    target_ms: float | None = None
    # what the model has to compute, whoever computes it; and that over what the device could do in the time
    flops: float | None = None
    mfu: float | None = None
    # of the whole model; what has to be known beside the numbers
    parameters: int | None = None
    note: str | None = None

    def fill(self, outcome: Outcome, tokens: int | None = None) -> "Row":
        """Take over what `timing.compare` found; `tokens` per run gives tokens per second of the median run."""
        self.error = outcome.error
        self.peak_memory_mib = outcome.peak_memory_mib
        if outcome.timing is None:
            self.status = outcome.refusal or "not run"
        else:
            self.fill_times(outcome.timing, tokens)
        return self

    def fill_times(self, timing: Timing, tokens: int | None = None) -> "Row":
        """Take over percentiles; `tokens` per run gives tokens per second of the median run."""
        self.p20_ms, self.p50_ms, self.p80_ms = timing.p20, timing.p50, timing.p80
        self.best_ms, self.best_cpu_ms, self.runs = timing.best, timing.best_cpu, len(timing.times_ms)
        if tokens is not None:
            self.tokens_per_s = 1000 * tokens / timing.p50
        return self


@dataclass
class Record:
    """The result of one command: its rows, notes and the machine they were measured on."""

    benchmark: str
    rows: list[Row] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    # for a copy of the files without their .git
    commit: str | None = None

    def machine(self) -> dict[str, Any]:
        """Device, driver, versions, commit, date and command."""
        environment = collect()
        gpus = [device.name for device in environment.devices]
        return {
            "device": gpus[0] if gpus and not self.benchmark.startswith("cpu") else environment.cpu,
            "cpu": environment.cpu,
            "cores": environment.cores,
            "threads": torch.get_num_threads(),
            "driver": environment.driver,
            "system": environment.system,
            "python": environment.python,
            "packages": {**environment.packages, **{name: _version(name) for name in PEERS}},
            "torch_build": environment.torch_build,
            "commit": self.commit or commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        }

    def save(self, path: Path | None) -> Path:
        """Write the JSON file, under `benchmarks/results/` unless `path` says otherwise, and return its path."""
        machine = self.machine()
        if path is None:
            device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
            path = RESULTS / f"{self.benchmark}-{device}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.benchmark,
            "machine": machine,
            "settings": self.settings,
            "summary": self.summary,
            "rows": [asdict(row) for row in self.rows],
        }
        # whoever reads the file meanwhile finds the old one or the new one
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path

    def print_rows(self, console: Console) -> None:
        """Every row, the slow, the refused and those that were not run included; one table per subject and mode."""
        for title, rows in itertools.groupby(self.rows, lambda row: f"{row.subject}, {row.mode}, {row.dtype}"):
            table = Table(title=title, title_justify="left")
            for name in ("shape", "contender"):
                table.add_column(name, no_wrap=True)
            for name in ("p20 ms", "p50 ms", "p80 ms", "best CPU ms", "tokens/s", "MiB", "error"):
                table.add_column(name, justify="right", no_wrap=True)
            table.add_column("note")
            previous = ""
            for row in rows:
                shape = " ".join(f"{key}={value}" for key, value in row.shape.items())
                if previous and shape != previous:
                    table.add_section()
                previous = shape
                numbers = (row.p20_ms, row.p50_ms, row.p80_ms, row.best_cpu_ms, row.tokens_per_s, row.peak_memory_mib)
                error = "-" if row.error is None else f"{row.error:.0e}"
                note = "" if row.status == "measured" else row.status
                table.add_row(shape, row.contender, *map(format_number, numbers), error, note)
            console.print(table)

    def print_summary(self, console: Console, title: str) -> None:
        """The derived figures of the command, such as ratios between lengths."""
        if not self.summary:
            return
        table = Table(title=title, title_justify="left")
        for name in self.summary[0]:
            table.add_column(name)
        for entry in self.summary:
            table.add_row(*(value if isinstance(value, str) else format_number(value) for value in entry.values()))
        console.print(table)


def format_number(value: float | None) -> str:
    """Three digits, or all of them before the point; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def table_console(width: int = 150) -> Console:
    """A console wide enough for the tables when the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def commit() -> str | None:
    """The commit of the checkout, with `-dirty` when files differ from it; None outside a repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{found}-dirty" if changed else found
