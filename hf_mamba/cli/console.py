"""What all commands share: the two consoles and how a user's mistake ends the program."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["fail", "first_line", "report_console", "result_console"]


def result_console() -> Console:
    """For results, on standard output."""
    return Console(highlight=False)


def report_console() -> Console:
    """For progress, reports and errors, on standard error, so that results can be piped."""
    return Console(stderr=True, highlight=False)


def fail(message: str) -> NoReturn:
    """End the command with exit code 1 and one message that says what was given and what to do; no traceback."""
    report_console().print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(code=1)


def first_line(error: BaseException) -> str:
    """What an error says first, without a full stop, to be part of a message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
