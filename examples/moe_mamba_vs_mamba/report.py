"""Figures, numbers and a verdict on each claim of the MoE-Mamba paper, from what train.py left in a folder.

    python examples/moe_mamba_vs_mamba/report.py runs/moe

writes `report.md`, `loss_against_step.png` and `loss_against_time.png` into that folder. Loss is that of the validation text,
without the routers' losses; a model's loss is the lowest of its run, as a mean over the seeds. Every verdict is computed from
the numbers beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Claim", "Curve", "judge", "main", "read_runs", "write_report"]

FIVE = ("transformer", "mamba", "mamba-mlp", "transformer-moe")
# the paper's first version says that MoE-Mamba beats Mamba from this many experts on
ENOUGH_EXPERTS = 8
# runs as short as this only show that everything works
SMOKE_STEPS = 200
# side_by_side.py leaves it beside its results
SHARED_GPU = "side_by_side.json"
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "undecided", "not measured"


@dataclass
class Curve:
    """Validation loss of one model against its steps and seconds, each a mean over the seeds."""

    model: str
    runs: list[dict[str, Any]]
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    lowest_of_runs: list[float]

    @property
    def lowest(self) -> float:
        """Mean over the seeds of the lowest loss of a run."""
        return sum(self.lowest_of_runs) / len(self.lowest_of_runs)

    @property
    def spread(self) -> float:
        """Between the best and the worst seed."""
        return max(self.lowest_of_runs) - min(self.lowest_of_runs)

    @property
    def best_index(self) -> int:
        return self.losses.index(min(self.losses))

    def first(self, target: float, axis: list[int] | list[float]) -> float | None:
        """Where on `axis` (steps or seconds) the loss first reaches `target`, between evaluations by a straight line."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return float(axis[0])
                share = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                return axis[i - 1] + share * (axis[i] - axis[i - 1])
        return None


@dataclass
class Claim:
    """A sentence of the paper, whether these runs bear it out, and the numbers that say so."""

    text: str
    verdict: str
    evidence: str


def read_runs(folder: Path) -> dict[str, Curve]:
    """The finished runs in a folder, by model, in the order of the paper.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*-seed*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(run["model"], []).append(run)
    if not found:
        raise ValueError(f"{folder} holds no results; run train.py with --output_dir {folder} first.")

    def place(model: str) -> tuple[int, int]:
        return (FIVE.index(model), 0) if model in FIVE else (len(FIVE), experts_of(model))

    return {model: _curve(model, found[model]) for model in sorted(found, key=place)}


def experts_of(model: str) -> int:
    """E of "moe-mamba-E"."""
    return int(model.rpartition("-")[2])


def _curve(model: str, runs: list[dict[str, Any]]) -> Curve:
    evaluations = [{entry["step"]: entry for entry in run["log"] if "eval_loss" in entry} for run in runs]
    # a run that ended by its time has fewer steps than the others
    steps = sorted(set.intersection(*(set(found) for found in evaluations)))

    def mean(field: str, step: int) -> float:
        return sum(found[step][field] for found in evaluations) / len(runs)

    return Curve(
        model,
        runs,
        steps,
        [mean("elapsed_seconds", step) for step in steps],
        [mean("eval_loss", step) for step in steps],
        [min(entry["eval_loss"] for entry in found.values()) for found in evaluations],
    )


def lower(better: Curve, worse: Curve) -> str:
    """Whether the loss of `better` is the lower one by more than the seeds differ."""
    difference = worse.lowest - better.lowest
    if abs(difference) <= max(better.spread, worse.spread):
        return OPEN if difference else FAILS
    return HOLDS if difference > 0 else FAILS


def all_of(verdicts: list[str]) -> str:
    """Holds if everything does, does not if anything does not."""
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def judge(curves: dict[str, Curve]) -> list[Claim]:
    """The claims of the paper, one by one."""
    sweep = {experts_of(model): curve for model, curve in curves.items() if model.startswith("moe-mamba-")}
    mamba, largest = curves.get("mamba"), sweep[max(sweep)] if sweep else None
    return [
        _fewer_steps(mamba, largest),
        _enough_experts(mamba, sweep),
        _predictable(sweep),
        _ordered("Mamba-MLP is worse than Mamba", mamba, curves.get("mamba-mlp")),
        _ordered("MoE-Mamba is better than Transformer-MoE", largest, curves.get("transformer-moe")),
        _ordered("Mamba is better than the Transformer", mamba, curves.get("transformer")),
    ]


def _fewer_steps(mamba: Curve | None, moe: Curve | None) -> Claim:
    text = "MoE-Mamba reaches Mamba's loss in fewer steps (paper: 46 % of them, v1; 1 / 2.35 at 100M, v2)"
    if mamba is None or moe is None:
        return Claim(text, MISSING, "needs mamba and a moe-mamba")
    own, needed = mamba.steps[mamba.best_index], moe.first(min(mamba.losses), moe.steps)
    if needed is None:
        evidence = f"{moe.model} does not reach {min(mamba.losses):.4f}, Mamba's at step {own}; its lowest is {min(moe.losses):.4f}"
        return Claim(text, FAILS, evidence)
    evidence = f"Mamba's {min(mamba.losses):.4f} of step {own} is reached by {moe.model} at step {needed:.0f}: {needed / own:.0%}"
    time = moe.first(min(mamba.losses), moe.seconds)
    if time is not None:
        evidence += f"; in {time / mamba.seconds[mamba.best_index]:.0%} of the wall time"
    return Claim(text, HOLDS if needed < own else FAILS, evidence)


def _enough_experts(mamba: Curve | None, sweep: dict[int, Curve]) -> Claim:
    text = f"MoE-Mamba is better than Mamba from {ENOUGH_EXPERTS} experts on"
    enough = {experts: curve for experts, curve in sweep.items() if experts >= ENOUGH_EXPERTS}
    if mamba is None or not enough:
        return Claim(text, MISSING, f"needs mamba and a moe-mamba of {ENOUGH_EXPERTS} experts or more")
    differences = ", ".join(f"E = {e}: {curve.lowest - mamba.lowest:+.4f}" for e, curve in sweep.items())
    verdict = all_of([lower(curve, mamba) for curve in enough.values()])
    return Claim(text, verdict, f"loss less Mamba's {mamba.lowest:.4f}: {differences}")


def _predictable(sweep: dict[int, Curve]) -> Claim:
    text = "The loss falls predictably with the number of experts"
    if len(sweep) < 3:
        return Claim(text, MISSING, "needs three numbers of experts")
    pairs = list(sweep.values())
    verdict = all_of([lower(more, fewer) for fewer, more in itertools.pairwise(pairs)])
    slope, explained = _line([math.log2(experts) for experts in sweep], [curve.lowest for curve in pairs])
    losses = ", ".join(f"E = {experts}: {curve.lowest:.4f}" for experts, curve in sweep.items())
    return Claim(text, verdict, f"{losses}; {slope:+.4f} for each doubling, a line explains {explained:.0%}")


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and the share of the variance that it explains."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    xx, yy = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    return xy / xx, xy * xy / (xx * yy) if yy else 1.0


def _ordered(text: str, better: Curve | None, worse: Curve | None) -> Claim:
    if better is None or worse is None:
        return Claim(text, MISSING, "needs both models")
    return Claim(text, lower(better, worse), f"{better.model} {better.lowest:.4f}, {worse.model} {worse.lowest:.4f}")


def draw(curves: dict[str, Curve], axis: str, path: Path) -> None:
    """Validation loss against "steps" or "seconds": the five architectures, and the sweep over the experts beside Mamba."""
    from matplotlib.figure import Figure

    sweep = [model for model in curves if model.startswith("moe-mamba-")]
    panels = {
        "architectures": [model for model in curves if model in FIVE] + sweep[-1:],
        "experts of MoE-Mamba": [model for model in curves if model == "mamba"] + sweep,
    }
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (title, models) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for model in models:
            curve = curves[model]
            axes.plot(curve.steps if axis == "steps" else curve.seconds, curve.losses, label=model)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step" if axis == "steps" else "seconds of training and evaluation")
        axes.set_ylabel("validation loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def table(curves: dict[str, Curve]) -> list[str]:
    """One line for each model, in Markdown."""
    lines = [
        "| model | parameters | active | lowest validation loss | spread of the seeds | at step | seconds a step | "
        "router entropy | dropped | largest load |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for curve in curves.values():
        run = curve.runs[0]
        last = next((entry for entry in reversed(run["log"]) if "router_entropy" in entry), {})
        router = [
            f"{last[f'router_{name}']:.3f}" if last else "–" for name in ("entropy", "dropped_fraction", "max_load")
        ]
        cells = [
            curve.model,
            f"{run['total_parameters_without_embeddings']:,}",
            f"{run['active_parameters_without_embeddings']:,}",
            f"{curve.lowest:.4f}",
            f"{curve.spread:.4f}" if len(curve.runs) > 1 else "one seed",
            str(curve.steps[curve.best_index]),
            f"{curve.seconds[-1] / curve.steps[-1]:.3f}",
            *router,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_report(folder: Path) -> list[Claim]:
    """Draw both figures and write `report.md`; the claims with their verdicts."""
    curves = read_runs(folder)
    claims = judge(curves)
    draw(curves, "steps", folder / "loss_against_step.png")
    draw(curves, "seconds", folder / "loss_against_time.png")
    runs = [run for curve in curves.values() for run in curve.runs]
    seeds = sorted({run["seed"] for run in runs})
    machines = sorted({f"{run['hardware']}, {run['precision']}" for run in runs})
    versions = sorted({", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs})
    passes = max(run["tokens_seen"] / run["training_tokens"] for run in runs)
    longest = max(run["steps"] for run in runs)
    smoke = longest < SMOKE_STEPS
    shared = (folder / SHARED_GPU).is_file()
    lines = [
        "# MoE-Mamba against Mamba",
        "",
        f"Hardware: {'; '.join(machines)}. Versions: {'; '.join(versions)}. Seeds: {', '.join(map(str, seeds))}.",
        f"{runs[0]['training_tokens']:,} tokens of training text, {runs[0]['tokens_seen']:,} seen, at most {passes:.1f} passes; "
        "all models of a seed meet the same windows in the same order.",
        *(["All models ran at the same time on one GPU: their seconds are those of a share of it."] if shared else []),
        "",
        *([f"**A smoke test of {longest} steps: the verdicts say nothing about the claims.**", ""] if smoke else []),
        "## Claims",
        "",
        "| claim | verdict | numbers |",
        "| --- | --- | --- |",
        *(f"| {claim.text} | **{claim.verdict}** | {claim.evidence} |" for claim in claims),
        "",
        "A difference counts if it is greater than the spread of the seeds on either side; with one seed there is no spread, "
        "so that every difference counts and none is certain.",
        "",
        "## Models",
        "",
        "Parameters are without embedding and head, router figures those of the last log.",
        "",
        *table(curves),
        "",
        "![validation loss against steps](loss_against_step.png)",
        "![validation loss against time](loss_against_time.png)",
        "",
        "Settings:",
        "",
        "```json",
        (folder / "settings.json").read_text(encoding="utf-8").strip(),
        "```",
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return claims


def main() -> None:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the --output_dir of train.py")
    folder = parser.parse_args().folder
    try:
        claims = write_report(folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; the figures need it: pip install 'hf-mamba[bench]'")
    for claim in claims:
        print(f"{claim.verdict:14} {claim.text}: {claim.evidence}")
    print(f"written to {folder / 'report.md'}")


if __name__ == "__main__":
    main()
