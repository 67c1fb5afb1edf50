"""Draw the loss curves of the packaged demo checkpoints from what their runs logged (needs hf-mamba[bench]).

python examples/demo_curves.py model_cards/demo_curves.svg
"""

import argparse
import json
from pathlib import Path

import hf_mamba
from hf_mamba.demo_checkpoint import DEMO_CHECKPOINTS

__all__ = ["draw", "main"]


def draw(path: Path) -> None:
    """Loss of the training and of the validation text against the tokens seen, and the latter against the seconds."""
    import matplotlib
    from matplotlib.figure import Figure

    # the same file from the same figures
    matplotlib.rcParams["svg.hashsalt"] = "hf_mamba"
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    against_tokens, against_seconds = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate(DEMO_CHECKPOINTS):
        report = json.loads((Path(hf_mamba.demo_checkpoint(name)) / "training_report.json").read_text("utf-8"))
        millions = report["tokens_seen"] / report["steps"] / 1e6
        valid = [entry for entry in report["curves"] if "eval_loss" in entry]
        train = [entry for entry in report["curves"] if "loss" in entry][1:]
        losses = [entry["eval_loss"] for entry in valid]
        colour = f"C{number}"
        against_tokens.plot([e["step"] * millions for e in valid], losses, colour, label=f"{name}, valid")
        against_tokens.plot(
            [e["step"] * millions for e in train], [e["loss"] for e in train], colour, lw=0.5, alpha=0.5
        )
        against_seconds.plot([e["elapsed_seconds"] for e in valid], losses, colour, label=f"{name}, valid")
    against_tokens.set_xlabel("millions of tokens (thin: training loss, with dropout)")
    against_tokens.set_ylabel("nats per token")
    against_seconds.set_xlabel("seconds, three models on one GPU")
    for axes in (against_tokens, against_seconds):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="the .svg or .png to write")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    main()
