"""Forward and backward on the CPU against the length: ours, transformers' own classes and mambapy.

transformers' Mamba-1 is quadratic in the length without compiled kernels; a cell that would take longer than the cap is
not run and the table says so.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import mamba_kernels.dispatch
from benchmarks.contenders import KINDS, has_mambapy, make_models, parse_names, parse_numbers
from benchmarks.record import Record, Row, table_console
from benchmarks.timing import Contender, compare, predict_seconds

__all__ = ["cpu_training"]

CPU = torch.device("cpu")
# logits and all gradients, relative to the largest value of each tensor
TOLERANCE = 1e-3


def cpu_training(
    models: Annotated[str, typer.Option(help="mamba, mamba2 or both, separated by a comma.")] = "mamba,mamba2",
    lengths: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "128,256,512,1024,2048",
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 1,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads of torch; its own choice when left out.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each cell.")] = 3.0,
    cap_seconds: Annotated[float, typer.Option(help="A step expected to take longer is not run.")] = 20.0,
    ours: Annotated[
        bool, typer.Option("--ours", help="Time hf_mamba alone, checked against the fp64 oracle.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON file; default: in benchmarks/results.")] = None,
) -> None:
    """Time one training step (forward, loss, backward) in fp32 against the sequence length."""
    console = table_console()
    try:
        kinds = parse_names(models, "--models", KINDS)
        sizes = parse_numbers(lengths, "--lengths")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads is not None:
        torch.set_num_threads(threads)
    record = Record("cpu-training", settings={"batch": batch, "layers": layers, "hidden_size": 256})
    for kind in kinds:
        _measure_kind(record, console, kind, sizes, batch, layers, seconds, cap_seconds, ours)
    for kind in kinds:
        record.summary += _ratios(record.rows, kind, sizes)
    record.print_rows(console)
    record.print_summary(console, "processor time at a length over that at half of it (2 is linear, 4 is quadratic)")
    if not has_mambapy():
        console.print("mambapy is not installed and was not timed: pip install hf-mamba[bench]")
    console.print(f"written to {record.save(output)}", soft_wrap=True)


def _measure_kind(
    record: Record,
    console: Console,
    kind: str,
    lengths: list[int],
    batch: int,
    layers: int,
    seconds: float,
    cap_seconds: float,
    ours: bool,
) -> None:
    contenders = make_models(kind, "small", layers=layers, mambapy=has_mambapy())
    if ours:
        contenders = {"hf_mamba": contenders["hf_mamba"]}
    history: dict[str, list[tuple[int, float]]] = {name: [] for name in contenders}
    for length in lengths:
        console.print(f"[dim]{kind}, L={length}[/]")
        tokens = torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(length))
        rows = {
            name: Row(kind, name, {"B": batch, "L": length, "layers": layers}, "float32", "forward+backward")
            for name in contenders
        }
        chosen = []
        for name, model in contenders.items():
            expected = predict_seconds(history[name], length)
            if expected is not None and expected > cap_seconds:
                rows[name].status = f"not run: about {expected:.0f} s a step expected, the cap is {cap_seconds:.0f} s"
            else:
                chosen.append(_contender(name, model, tokens))
        # where no peer runs, the fp64 oracle stands in, so that nothing is timed unchecked
        alone = [item.name for item in chosen] == ["hf_mamba"]
        reference = _oracle(contenders["hf_mamba"], tokens) if alone else None
        for outcome in compare(chosen, CPU, TOLERANCE, seconds, reference) if chosen else []:
            rows[outcome.name].fill(outcome, tokens=batch * length)
            if outcome.timing is not None:
                history[outcome.name].append((length, outcome.timing.best / 1000))
        record.rows += rows.values()


def _step(model: nn.Module, tokens: Tensor) -> Tensor:
    """One training step; returns the logits (B, L, vocabulary) and leaves the gradients in the model."""
    model.zero_grad(set_to_none=True)
    output: Any = model(tokens)
    logits = output if isinstance(output, Tensor) else output.logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return logits


def _contender(name: str, model: nn.Module, tokens: Tensor) -> Contender:
    model.train()

    def outputs() -> Sequence[Tensor]:
        logits = _step(model, tokens)
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        return [logits, *(gradients[key] for key in sorted(gradients))]

    return Contender(name, lambda: _step(model, tokens), outputs)


def _oracle(model: nn.Module, tokens: Tensor) -> Callable[[], Sequence[Tensor]]:
    def outputs() -> Sequence[Tensor]:
        with mamba_kernels.dispatch.backend("reference"):
            return _contender("reference", model, tokens).outputs()

    return outputs


def _ratios(rows: list[Row], kind: str, lengths: list[int]) -> list[dict[str, Any]]:
    """For each contender, the best processor time over that at half the length: the least disturbed figures there are."""
    times = {(row.contender, row.shape["L"]): row.best_cpu_ms for row in rows if row.subject == kind}
    summary = []
    for name in dict.fromkeys(row.contender for row in rows if row.subject == kind):
        entry: dict[str, Any] = {"model": kind, "contender": name}
        for length in lengths:
            if length // 2 in lengths and length % 2 == 0:
                longer, shorter = times[name, length], times[name, length // 2]
                ratio = "not run" if longer is None or shorter is None else longer / shorter
                entry[f"{length}/{length // 2}"] = ratio
        summary.append(entry)
    return summary
