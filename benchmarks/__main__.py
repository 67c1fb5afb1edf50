"""`python -m benchmarks COMMAND`."""

import typer
from transformers.utils import logging

from benchmarks.cpu_generate import cpu_generate
from benchmarks.cpu_training import cpu_training
from benchmarks.generate import generate
from benchmarks.moe import moe
from benchmarks.ops import ops
from benchmarks.plot import plot
from benchmarks.projections import projections
from benchmarks.train import train

app = typer.Typer(
    help="Side-by-side measurements of hf_mamba and its peers; slower cells are shown too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("cpu-training", epilog="Example: python -m benchmarks cpu-training --lengths 128,256,512")(cpu_training)
app.command("cpu-generate", epilog="Example: python -m benchmarks cpu-generate --models mamba2 --prompts 512")(
    cpu_generate
)
app.command(
    "generate",
    epilog="Example: python -m benchmarks generate --sizes 2.8b --batches 1,64 --against mamba_ssm,transformer",
)(generate)
app.command("moe", epilog="Example: python -m benchmarks moe --experts 32 --blocks 0")(moe)
app.command("ops", epilog="Example: python -m benchmarks ops --op selective_scan --against mamba_ssm,eager")(ops)
app.command("projections", epilog="Example: python -m benchmarks projections --batches 1")(projections)
app.command("train", epilog="Example: python -m benchmarks train --sizes 130m --options plain,skip_logits")(train)
app.command("plot", epilog="Example: python -m benchmarks plot benchmarks/results/ops-nvidia-h100.json")(plot)

if __name__ == "__main__":
    # the native classes warn about each compiled kernel that they miss; the record lists the packages instead
    logging.set_verbosity_error()
    app(prog_name="python -m benchmarks")
