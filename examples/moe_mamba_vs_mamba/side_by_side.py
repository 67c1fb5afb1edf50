"""Train all models of train.py at the same time on one GPU, with as many steps and seeds as fit into the time.

    python examples/moe_mamba_vs_mamba/side_by_side.py --output_dir runs/moe --minutes 5

First every model runs for a few steps beside all the others. The slowest of them says how many of the steps of the
configuration fit; if all do, more seeds are run as long as there is time. What is written is as train.py writes it; the
seconds in it are those of models that share one GPU.
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
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from architectures import architecture_names  # noqa: E402
from train import keep_settings, load_tokenizer, read_documents, read_settings  # noqa: E402

__all__ = ["fit", "main", "run", "seconds_per_step"]

MOST_SEEDS = 3
# what stays unused of the time, and what is added to the measured seconds of a step
SPARE_SECONDS = 6.0
OVERHEAD = 1.06


def run(names: list[str], output: Path, settings: dict[str, Any], data: Path, deadline: float) -> None:
    """Train every model in a process of its own; one that is not over at `deadline` (`time.monotonic()`) is killed."""
    config = output / "side_by_side.json"
    config.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    running = {}
    for name in names:
        command = [sys.executable, str(HERE / "train.py"), "--config", str(config), "--output_dir", str(output)]
        command += ["--data_dir", str(data), "--models", name, "--checkpoint_steps", "0"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        log = (output / f"{name}.log").open("w")
        running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    for name, process in running.items():
        try:
            process.wait(max(0.5, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode:
            print(f"{name}: exit status {process.returncode}", flush=True)
            print("\n".join((output / f"{name}.log").read_text(errors="replace").splitlines()[-15:]), flush=True)


def seconds_per_step(result: dict[str, Any]) -> float:
    """Of the later half of a probe, evaluations included, so that compiling the kernels does not count."""
    entries = [entry for entry in result["log"] if "loss" in entry]
    first, last = entries[-2], entries[-1]
    return (last["elapsed_seconds"] - first["elapsed_seconds"]) / (last["step"] - first["step"])


def fit(settings: dict[str, Any], seconds: float, slowest: float) -> dict[str, Any]:
    """The settings with the steps, or else the seeds, that fit into `seconds` at `slowest` seconds a step."""
    possible = int(seconds / (OVERHEAD * slowest))
    seeds = max(1, min(MOST_SEEDS, possible // settings["steps"]))
    return settings | {
        "steps": max(1, min(settings["steps"], possible)),
        "seeds": list(range(seeds)),
        # a run that is slower than foreseen ends by its time, with the learning rate at zero
        "max_minutes": round(seconds / seeds / 60, 3),
    }


def main() -> None:
    """Entry point of the script."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="gpu", help="gpu, cpu, or the path of a JSON file with the same fields")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data_dir", type=Path, default=Path(".data"), help="what prepare_text.py wrote")
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything")
    parser.add_argument("--probe_steps", type=int, default=60, help="steps that measure the speed")
    parser.add_argument("--tokenizer", type=Path, help="a saved tokenizer to use (default: train one)")
    arguments = parser.parse_args()
    settings, output = read_settings(arguments.config), arguments.output_dir
    end, names = started + 60 * arguments.minutes, architecture_names(settings)

    probe = output / "probe"
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir(parents=True)
    if arguments.tokenizer is not None:
        shutil.copytree(arguments.tokenizer, output / "tokenizer", dirs_exist_ok=True)
    load_tokenizer(settings, read_documents(arguments.data_dir / "train.txt"), output)
    shutil.copytree(output / "tokenizer", probe / "tokenizer")
    half = max(1, arguments.probe_steps // 2)
    began = time.time()
    run(names, probe, settings | {"steps": 2 * half, "eval_steps": half, "seeds": [0]}, arguments.data_dir, end)
    speeds, around = {}, 0.0
    for name in names:
        file = probe / f"{name}-seed0.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            speeds[name] = seconds_per_step(result)
            trained = max(entry["elapsed_seconds"] for entry in result["log"])
            # imports, reading the text and all else that is no training
            around = max(around, file.stat().st_mtime - began - trained)
    print("seconds a step, side by side:", {name: round(speed, 4) for name, speed in speeds.items()}, flush=True)
    if not speeds:
        sys.exit("error: no model ran.")

    left = end - time.monotonic() - around - SPARE_SECONDS
    settings = fit(settings, left, max(speeds.values()))
    print(
        f"{settings['steps']} steps, seeds {settings['seeds']}, {left:.0f} s of training, {around:.0f} s around it",
        flush=True,
    )
    keep_settings(settings, output)
    run(list(speeds), output, settings, arguments.data_dir, end)
    # the mark of results that shared a GPU
    (output / "side_by_side.json").write_text(
        json.dumps({"seconds_per_step": speeds}, indent=1) + "\n", encoding="utf-8"
    )
    missing = [name for name in names if not (output / f"{name}-seed0.json").is_file()]
    if missing:
        sys.exit(f"error: {', '.join(missing)} did not finish; their logs are in {output}.")


if __name__ == "__main__":
    main()
