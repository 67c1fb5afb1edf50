"""`hf-mamba card`: the model card of a saved model or adapter, filled from its files, its training report and the options."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_mamba.cli.console import fail, report_console, result_console

if TYPE_CHECKING:
    from hf_mamba.integrations.cards import CardFacts

__all__ = ["card", "facts_of_options"]

LICENSE_HELP = "One of the Hub's identifiers, such as apache-2.0."
BASE_HELP = "Id on the Hub of the model that this one was trained from."


def card(
    folder: Annotated[Path, typer.Argument(help="The folder that save_pretrained() wrote.")],
    name: Annotated[str | None, typer.Option(help="The heading; the folder's name when left out.")] = None,
    license: Annotated[str | None, typer.Option(help=LICENSE_HELP)] = None,
    base_model: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Id on the Hub of the training data; may repeat.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639 code, such as en; may be repeated.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="training_report.json with measured results; the folder's own when left out."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md; its metadata are carried over.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check whether the README.md there could be uploaded.")
    ] = False,
) -> None:
    """Write FOLDER/README.md: architecture, size of the state, how to use it, what was measured; nothing that was not."""
    from hf_mamba.integrations.card_rules import validate_card
    from hf_mamba.integrations.cards import CARD, card_of_folder, facts_of_card, is_placeholder, read_card

    file = folder / CARD
    try:
        old = read_card(file) if file.is_file() else None
        if check:
            if old is None:
                fail(f"{folder} has no {CARD}; `hf-mamba card {folder}` writes one.")
            validate_card(old)
            result_console().print(f"{file} can be uploaded.", soft_wrap=True, markup=False)
            return
        if old is not None and not overwrite and not is_placeholder(old):
            fail(f"{file} exists; --overwrite replaces it, --check checks it.")
        facts = facts_of_options(license, base_model, dataset, language).over(_reported(folder, report))
        if old is not None:
            facts = facts.over(facts_of_card(old))
        new = card_of_folder(folder, name, facts)
    except ValueError as error:
        fail(str(error))
    new.save(file)
    result_console().print(f"Written to {file}.", soft_wrap=True, markup=False)
    if facts_of_card(new).license is None:
        report_console().print("[dim]It states no licence yet, which uploading needs: --license.[/]")


def facts_of_options(
    license: str | None, base_model: str | None, dataset: list[str] | None, language: list[str] | None
) -> "CardFacts":
    """What the options that `card` and `push` share say of a model."""
    from hf_mamba.integrations.cards import CardFacts

    return CardFacts(
        license=license, base_model=base_model, datasets=tuple(dataset or ()), language=tuple(language or ())
    )


def _reported(folder: Path, report: Path | None) -> "CardFacts":
    from hf_mamba.integrations.cards import CardFacts, facts_of_report

    file = report or folder / "training_report.json"
    if report is None and not file.is_file():
        return CardFacts()
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        fail(f"the report {file} cannot be read: {error}.")
    return facts_of_report(content)
