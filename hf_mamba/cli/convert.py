"""`hf-mamba convert`: any known Mamba checkpoint into a folder of transformers' or mamba_ssm's format.

The command line is where the packages meet: this module alone of hf_mamba imports `hf_mamba_conversion`, when it runs.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from hf_mamba.cli.card import LICENSE_HELP
from hf_mamba.cli.console import fail, report_console, result_console

if TYPE_CHECKING:
    from hf_mamba_conversion import ConversionReport

__all__ = ["convert"]

# the stage in which the folder is already in its place
UPLOADING = "Uploading"
HIDDEN_FIELDS = ("architectures", "transformers_version", "model_type", "dtype")


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A checkpoint: a folder, a weight file, or an id on the Hub."),
    ],
    dest: Annotated[
        str | None,
        typer.Argument(metavar="DEST", help="The folder to make; only --dry-run can do without.", show_default=False),
    ] = None,
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="[bold]hf[/], or [bold]mamba_ssm[/] (from Mamba and Mamba-2 only)."),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; the source's when left out."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The largest weight file, such as 500MB; 5GB when left out."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="A folder, file or Hub id with the tokenizer for DEST; the one beside the weights if left out.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A choice that the source's format leaves open, such as activation=silu; --dry-run shows them. May be repeated.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a SOURCE on the Hub.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare logits with an independent forward of the source; keep only a match."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, and write nothing; what is on the Hub is downloaded."),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the finished folder to this repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    license: Annotated[
        str | None, typer.Option(help=f"{LICENSE_HELP} An upload needs it; that of the source's card when left out.")
    ] = None,
) -> None:
    """Convert SOURCE into the new folder DEST, which from_pretrained loads; the source is never changed.

    Its format is detected: mamba_ssm (with experts too), Codestral, transformers' own, llm-random, BlackMamba.

    A run that fails or is interrupted leaves nothing behind.
    """
    options = _options(option or [])
    console = report_console()
    # a plain line: importing torch takes a moment, before there is anything to show
    console.print(f"[dim]Reading {escape(source)}[/]", soft_wrap=True)
    from hf_mamba_conversion import ConversionError
    from hf_mamba_conversion import Progress as Listener
    from hf_mamba_conversion import convert as run

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    class Bar(Listener):
        """Shows each stage with its bytes, and the plan before anything is written."""

        task: Any = None
        title = ""

        def planned(self, report: "ConversionReport") -> None:
            result_console().print(_plan(report))

        def stage(self, title: str, total: int = 0) -> None:
            if self.task is not None:
                bar.remove_task(self.task)
            self.task, self.title = bar.add_task(title, total=total or None), title

        def advance(self, amount: int) -> None:
            bar.advance(self.task, amount)

    listener = Bar()
    _quiet_libraries()
    previous = _unwind_on_termination()
    try:
        with bar:
            report = run(
                source,
                dest,
                to=to,
                dtype=dtype,
                max_shard_size=max_shard_size,
                tokenizer=tokenizer,
                verify=verify,
                dry_run=dry_run,
                push_to_hub=push_to_hub,
                private=private,
                license=license,
                revision=revision,
                options=options,
                progress=listener,
            )
    except ConversionError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error}. Nothing was written.")
    except KeyboardInterrupt:
        if listener.title == UPLOADING:
            fail(
                f"interrupted while uploading; {dest} is complete. Upload it with `hf-mamba push {dest} {push_to_hub}`."
            )
        fail("interrupted; nothing was written.")
    finally:
        signal.signal(signal.SIGTERM, previous)
    _finish(report)


def _options(given: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a dictionary; nothing given twice."""
    options: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            fail(f"--option must be NAME=VALUE, got {text!r}.")
        if name in options:
            fail(f"--option {name} was given twice.")
        options[name] = value
    return options


def _quiet_libraries() -> None:
    """transformers draws a bar of its own when the result is loaded to be verified."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _unwind_on_termination() -> Any:
    """Let SIGTERM raise, so that a half-written folder is removed; the handler that held before."""

    def stop(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    return signal.signal(signal.SIGTERM, stop)


def _plan(report: "ConversionReport") -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("format", escape(report.title))
    table.add_row("becomes", f"{report.class_name} ({'transformers' if report.to == 'hf' else 'mamba_ssm'})")
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("weights", f"{decimal(report.nbytes)}, {', '.join(report.dtypes)}")
    for name, value in report.options.items():
        choice = report.choices[name]
        table.add_row(f"option {name}", escape(f"{value} (of {', '.join(choice.choices)}). {choice.help}"))
    for name, value in report.target_config.items():
        if name not in HIDDEN_FIELDS and value is not None:
            table.add_row(name, escape(_short(value)))
    for note in report.notes:
        table.add_row("note", escape(note))
    return table


def _short(value: object) -> str:
    # transformers' spelling, as JSON has none
    text = str(value).replace("{'__float__': 'Infinity'}", "inf")
    return text if len(text) <= 100 else text[:97] + "…"


def _finish(report: "ConversionReport") -> None:
    console = report_console()
    for warning in report.warnings:
        console.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True)
    result = result_console()
    if report.destination is None:
        result.print("Nothing was written (dry run).")
        return
    if report.verified is not None:
        when = ", before the cast" if report.verified.before_cast else ""
        result.print(
            f"Verified on {report.verified.tokens} tokens in {report.verified.dtype}{when}: the largest difference of logits is "
            f"{report.verified.max_difference:.2g} (largest logit {report.verified.max_logit:.3g}).",
            soft_wrap=True,
        )
    result.print(f"Written to [bold]{escape(str(Path(report.destination)))}[/].", soft_wrap=True)
    if report.url is not None:
        result.print(f"Uploaded to {escape(report.url)}", soft_wrap=True)
