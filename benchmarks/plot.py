"""Time against length, drawn from a record of `python -m benchmarks ops --lengths …` or `generate --prompts …`."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["curves_of", "plot"]

Curves = dict[tuple[str, str], dict[str, list[tuple[int, float]]]]


def curves_of(record: dict[str, Any]) -> Curves:
    """By op with shape and by mode: for each contender its lengths and median milliseconds, where there are two or more."""
    found: Curves = {}
    for row in record["rows"]:
        if row["p50_ms"] is None or "L" not in row["shape"]:
            continue
        shape = " ".join(f"{name}{size}" for name, size in row["shape"].items() if name != "L")
        panel = found.setdefault((f"{row['subject']} {shape}", row["mode"]), {})
        panel.setdefault(row["contender"], []).append((row["shape"]["L"], row["p50_ms"]))
    several = {
        panel: {name: sorted(points) for name, points in lines.items() if len(points) > 1}
        for panel, lines in found.items()
    }
    return {panel: lines for panel, lines in several.items() if lines}


def plot(
    record: Annotated[Path, typer.Argument(help="The JSON file of a benchmark with several lengths.", exists=True)],
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: the record's name, .png.")] = None,
) -> None:
    """Draw the median time of every contender against the length, a panel for each op and mode."""
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise typer.BadParameter("plot needs matplotlib: pip install 'hf-mamba[bench]'") from None
    content = json.loads(record.read_text(encoding="utf-8"))
    curves = curves_of(content)
    if not curves:
        raise typer.BadParameter(
            f"{record} has nothing at two lengths; measure with python -m benchmarks ops --lengths 512,2048,8192 or "
            "python -m benchmarks generate --prompts 512,2048,8192"
        )
    columns = min(2, len(curves))
    lines = -(-len(curves) // columns)
    figure = figure_module.Figure(figsize=(5.5 * columns, 3.6 * lines), layout="constrained")
    machine = content["machine"]
    figure.suptitle(f"{machine['device']}, torch {machine['packages']['torch']}, {machine['date'][:10]}", fontsize=10)
    for i, ((subject, mode), contenders) in enumerate(curves.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        for name, points in contenders.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_title(f"{subject}, {mode}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of context" if mode == "decode" else "L")
        axes.set_ylabel("ms a token" if mode == "decode" else "ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path = output or record.with_suffix(".png")
    figure.savefig(path, dpi=150)
    typer.echo(f"written to {path}")
