"""`hf-mamba push`: upload a saved model or adapter to the Hub, checked first, as one commit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_mamba.cli.card import BASE_HELP, LICENSE_HELP, facts_of_options
from hf_mamba.cli.console import fail, first_line, report_console, result_console

__all__ = ["push"]


def push(
    folder: Annotated[Path, typer.Argument(help="The folder that save_pretrained() wrote: a model or an adapter.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub, or a name in your own namespace.")],
    license: Annotated[str | None, typer.Option(help=LICENSE_HELP)] = None,
    base_model: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Id on the Hub of the training data; may repeat.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="ISO 639 code, such as en; may be repeated.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, made if there is none; main when left out.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="The commit's message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the files, list them, and send nothing.")] = False,
) -> None:
    """Upload FOLDER to REPO: weights, configuration, tokenizer and card; what is wrong is said before anything is sent."""
    report_console().print(f"[dim]Checking {escape(str(folder))}[/]", soft_wrap=True)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from hf_mamba.integrations.cards import CARD
    from hf_mamba.integrations.hub import check_private, publishable_files, push_folder

    facts = facts_of_options(license, base_model, dataset, language)
    try:
        if dry_run:
            files = publishable_files(folder, base_model)
            # the card may be replaced by that of the repository
            check_private({name: content for name, content in files.items() if name != CARD})
            for name in files:
                result_console().print(name, soft_wrap=True, markup=False)
            return
        commit = push_folder(
            folder,
            repo,
            facts=facts,
            # False would make a repository public where an organisation's default is private
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
        )
    except HFValidationError as error:
        fail(f"{repo!r} is no name of a repository: {error}")
    except HfHubHTTPError as error:
        fail(f"the Hub did not take it: {first_line(error)}.{_advice(error)} {folder} is as it was.")
    except (RuntimeError, OSError) as error:
        fail(f"the upload broke off: {first_line(error.__cause__ or error)}. {folder} is as it was; push again.")
    except ValueError as error:
        fail(str(error))
    result_console().print(f"Uploaded to {commit.pr_url or commit.commit_url}", soft_wrap=True, markup=False)


def _advice(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return " Run `hf auth login`, or set HF_TOKEN to a token that may write."
    return " Your token may not write there: check the name and the token's rights." if status == 403 else ""
