"""`hf-mamba env`: what hf_mamba finds on this machine, as tables or as JSON."""

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hf_mamba.cli.console import report_console, result_console
from hf_mamba.env import Environment, collect

__all__ = ["env"]


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, devices, the backend of each op, and what is missing with the command that repairs it."""
    if as_json:
        typer.echo(json.dumps(collect().as_dict(), indent=2))
        return
    with report_console().status("Looking at this machine"):
        environment = collect()
    console = result_console()
    console.print(_machine(environment))
    console.print(_models(environment))
    console.print(_problems(environment), soft_wrap=True)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _machine(environment: Environment) -> Table:
    table = _table("Machine")
    table.add_row("hf_mamba", environment.hf_mamba)
    table.add_row("Python", environment.python)
    table.add_row("system", environment.system)
    table.add_row("CPU", f"{environment.cpu}, {environment.cores} cores")
    for device in environment.devices:
        capability = f", capability {device.capability}" if device.capability else ""
        memory = f", {device.memory_gib} GiB" if device.memory_gib else ""
        table.add_row("GPU", f"{device.name} ({device.type}{capability}{memory})")
    if not environment.devices:
        table.add_row("GPU", "none that torch can use")
    table.add_row("GPU driver", environment.driver or "none found")
    for name, version in environment.packages.items():
        build = f" ({environment.torch_build} build)" if name == "torch" and environment.torch_build else ""
        table.add_row(name, f"{version}{build}" if version else "not installed")
    return table


def _models(environment: Environment) -> Table:
    table = _table("\nBackends and models")
    if environment.forced_backend is not None:
        table.add_row("HF_MAMBA_BACKEND", environment.forced_backend)
    for op, backend in environment.backends.items():
        table.add_row(op, backend)
    for model_type, registered in environment.registered.items():
        table.add_row(model_type, "registered with the Auto classes" if registered else "not registered")
    return table


def _problems(environment: Environment) -> str:
    if not environment.problems:
        return "\n[green]Nothing is missing.[/]"
    lines = [f"\n[bold yellow]{len(environment.problems)} to repair[/]"]
    for problem in environment.problems:
        lines.append(f"- {escape(problem.what)}: {escape(problem.consequence)}.")
        lines.append(f"  [bold]{escape(problem.command)}[/]")
    return "\n".join(lines)
