"""Train the packaged demo checkpoints: Mamba, Mamba-2 and MoE-Mamba side by side on one GPU, with the same tokens.

    python examples/prepare_text.py
    python examples/train_demo.py --output_dir out --minutes 5      # the whole run, evaluation included

First all three run for a few steps together. The slowest of them says how many steps fit into the time, and all three then
take that many, so that they see the same windows in the same order. FOLDER/mamba, FOLDER/mamba2 and FOLDER/moe_mamba hold
what goes into hf_mamba/demo; FOLDER/log.txt what was printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["NAMES", "main", "run_side_by_side", "seconds_per_step", "steps_that_fit"]

HERE = Path(__file__).resolve().parent
NAMES = ("mamba", "mamba2", "moe_mamba")
PROBE_STEPS = 100
# per step of training: evaluations and checkpoints on top, and some caution
OVERHEAD = 1.07
# evaluation of the finished models and their samples, which the probe leaves out, and what stays unused of the time
FINISHING_SECONDS = 20.0


def run_side_by_side(folder: Path, tokenizer: Path, options: list[str], deadline: float) -> dict[str, str]:
    """Train every model into FOLDER/<name>; what each printed. A run that is not over at `deadline` is killed.

    Args:
        deadline: by `time.monotonic()`.
    """
    running = {}
    for name in NAMES:
        # relative, since the card shows the command
        script, settings = (
            os.path.relpath(HERE / file) for file in ("train_language_model.py", f"demo_checkpoints/{name}.json")
        )
        command = [sys.executable, script, settings]
        command += ["--output_dir", str(folder / name), "--tokenizer", str(tokenizer), "--overwrite", "True", *options]
        log = (folder / f"{name}.log").open("w")
        environment = {"OMP_NUM_THREADS": "4", **os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    printed = {}
    for name, process in running.items():
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        lines = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        status = f"exit status {process.returncode}" if process.returncode else "finished"
        printed[name] = "\n".join([f"== {name}: {status}", *filter(str.strip, lines)])
    return printed


def seconds_per_step(report: dict) -> float:
    """Of the later half of the probe, so that compiling the kernels does not count."""
    entries = [entry for entry in report["curves"] if "loss" in entry]
    first, last = entries[-2], entries[-1]
    return (last["elapsed_seconds"] - first["elapsed_seconds"]) / (last["step"] - first["step"])


def steps_that_fit(seconds: float, slowest: float, most: int) -> int:
    """How many steps of `slowest` seconds fit into `seconds` with their evaluations."""
    return max(1, min(most, int(seconds / (OVERHEAD * slowest))))


def main() -> None:
    """Entry point of the script."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="for everything, from the first import to the cards"
    )
    parser.add_argument("--most_steps", type=int, default=8000, help="steps to take at most")
    parser.add_argument("--data_dir", type=Path, default=Path(".data"), help="what prepare_text.py wrote")
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer of all three (default: train one)")
    parser.add_argument("--probe_steps", type=int, default=PROBE_STEPS, help="steps that measure the speed")
    arguments, options = parser.parse_known_args()
    options += ["--data_dir", str(arguments.data_dir)]
    folder, end = arguments.output_dir, started + 60 * arguments.minutes
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = arguments.tokenizer
    if tokenizer is None:
        sys.path.insert(0, str(HERE))
        from language_modeling import read_documents, train_tokenizer

        tokenizer = folder / "tokenizer"
        size = json.loads((HERE / "demo_checkpoints/mamba.json").read_text(encoding="utf-8"))["vocab_size"]
        train_tokenizer(read_documents(arguments.data_dir / "train.txt"), size).save_pretrained(tokenizer)

    probe = folder / "probe"
    probe.mkdir(exist_ok=True)
    few = [f"--steps={arguments.probe_steps}", f"--eval_steps={arguments.probe_steps}", "--evaluate=False"]
    began = time.time()
    printed = list(run_side_by_side(probe, tokenizer, [*options, *few], end).values())
    speeds, around = {}, 0.0
    for name in NAMES:
        file = probe / name / "training_report.json"
        if file.is_file():
            report = json.loads(file.read_text(encoding="utf-8"))
            speeds[name] = seconds_per_step(report)
            # imports and reading the text
            around = max(around, file.stat().st_mtime - began - report["training_seconds"])
    print("seconds a step, side by side:", {name: round(speed, 4) for name, speed in speeds.items()}, flush=True)
    shutil.rmtree(probe)
    if len(speeds) < len(NAMES):
        (folder / "log.txt").write_text("\n".join(printed) + "\n", encoding="utf-8")
        print("\n".join(printed), file=sys.stderr)
    if speeds:
        left = end - time.monotonic() - around - FINISHING_SECONDS
        steps = steps_that_fit(left, max(speeds.values()), arguments.most_steps)
        print(f"{steps} steps in {left:.0f} s of training, {around:.0f} s around it", flush=True)
        # the learning rate comes to zero at the last step, or at the end of the time if the probe was too hopeful
        long = [f"--steps={steps}", f"--max_minutes={max(left, 1) / 60:.3f}"]
        printed += run_side_by_side(folder, tokenizer, [*options, *long], end).values()
    (folder / "log.txt").write_text("\n".join(printed) + "\n", encoding="utf-8")
    finished = [name for name in NAMES if (folder / name / "training_report.json").is_file()]
    for name in finished:
        report = json.loads((folder / name / "training_report.json").read_text(encoding="utf-8"))
        test = report["results"]["test"]
        print(
            f"{name:10} test perplexity {test['perplexity']:.3f}, {test['bits_per_byte']:.4f} bits/byte, "
            f"{report['tokens_seen']:,} tokens in {report['training_seconds']} s",
            flush=True,
        )
    if len(finished) < len(NAMES):
        sys.exit(f"error: {', '.join(set(NAMES) - set(finished))} did not finish: see {folder / 'log.txt'}")


if __name__ == "__main__":
    main()
