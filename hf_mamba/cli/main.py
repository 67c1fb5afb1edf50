"""The Typer application: one `app.command` per sub-command."""

from typing import Annotated

import typer

from hf_mamba.cli.card import card
from hf_mamba.cli.convert import convert
from hf_mamba.cli.environment import env
from hf_mamba.cli.generate import generate
from hf_mamba.cli.inspect_experts import inspect_experts
from hf_mamba.cli.push import push
from hf_mamba.version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="hf-mamba",
    help="Mamba, Mamba-2, Falcon-Mamba and MoE-Mamba for Hugging Face transformers.",
    epilog="Try: hf-mamba generate demo 'It was a bright morning and'",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-mamba {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mamba, Mamba-2, Falcon-Mamba and MoE-Mamba for Hugging Face transformers."""


# a blank line in an epilog starts a new line of the help text
ENV_EXAMPLES = """\
Examples:

hf-mamba env

hf-mamba env --json > environment.json
"""

GENERATE_EXAMPLES = """\
Examples:

hf-mamba generate demo "The ship"

hf-mamba generate state-spaces/mamba-130m-hf "Mamba is" --temperature 0.8 --seed 1

cat story.txt | hf-mamba generate ./my-model --dtype bfloat16 --device cuda
"""

CONVERT_EXAMPLES = """\
Examples:

hf-mamba convert state-spaces/mamba2-130m ./mamba2-130m --tokenizer EleutherAI/gpt-neox-20b --verify

hf-mamba convert step_100000.pt --dry-run

hf-mamba convert ./my-model ./for-mamba-ssm --to mamba_ssm
"""

INSPECT_EXAMPLES = """\
Examples:

hf-mamba inspect-experts ./my-moe-mamba "The ship sailed at dawn."

hf-mamba inspect-experts ./my-moe-mamba - --json < story.txt
"""

CARD_EXAMPLES = """\
Examples:

hf-mamba card ./my-model --license apache-2.0 --dataset roneneldan/TinyStories

hf-mamba card ./my-model --check
"""

PUSH_EXAMPLES = """\
Examples:

hf-mamba push ./my-model me/my-model --license apache-2.0 --private

hf-mamba push ./my-adapter me/my-adapter --base-model me/my-model --license mit

hf-mamba push ./my-model me/my-model --dry-run
"""

app.command(epilog=CARD_EXAMPLES)(card)
app.command(epilog=CONVERT_EXAMPLES)(convert)
app.command(epilog=ENV_EXAMPLES)(env)
app.command(epilog=GENERATE_EXAMPLES)(generate)
app.command("inspect-experts", epilog=INSPECT_EXAMPLES)(inspect_experts)
app.command(epilog=PUSH_EXAMPLES)(push)
