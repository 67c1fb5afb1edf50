"""The projections of a decoding step: our kernel with different tunings beside the library's, at the shapes of published models.

A CUDA graph launches each of them many times with weights that no cache holds, as a decoding step does. The floor is the time
to read the weight at the speed of a copy.
"""

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

import mamba_kernels
from benchmarks.contenders import parse_numbers
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.timing import Timing, copy_bandwidth, disagreement
from mamba_kernels.decode.reference import fused_linear_ref

__all__ = ["projections"]

# inputs, outputs, and what is fused into them
SHAPES: dict[str, tuple[int, int, str]] = {
    "mamba-130m in_proj": (768, 3072, "norm"),
    "mamba-130m out_proj": (1536, 768, "residual"),
    "mamba-130m head": (768, 50280, ""),
    "mamba-2.8b in_proj": (2560, 10240, "norm"),
    "mamba-2.8b x_proj": (5120, 192, ""),
    "mamba-2.8b out_proj": (5120, 2560, "residual"),
    "mamba2-2.7b out_proj": (5120, 2560, "gated residual"),
}
# rows and columns of the weight that a program reads at a time, and its warps
TUNINGS = ((2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (8, 1024, 8), (4, 2048, 8), (4, 512, 2))
# bytes of weights to walk through, several times what the L2 cache holds
WALK = 400 << 20
TOLERANCE = 1e-2
LIBRARY = "torch"


def projections(
    batches: Annotated[str, typer.Option(help="Rows of x.")] = "1",
    repeats: Annotated[int, typer.Option(help="Replays of each graph.", min=3)] = 10,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: in benchmarks/results.")] = None,
) -> None:
    """Time fused_linear with every tuning and torch's linear, in microseconds a launch, on a GPU."""
    console = table_console()
    try:
        rows = parse_numbers(batches, "--batches")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not torch.cuda.is_available():
        raise typer.BadParameter("projections measures CUDA graphs and needs a GPU.")
    device = torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    record = Record("projections", settings={"copy_bytes_per_s": bandwidth}, commit=commit)
    for (name, (inputs, outputs, fused)), batch in itertools.product(SHAPES.items(), rows):
        floor_ms = 1000 * inputs * outputs * 2 / bandwidth
        found: list[tuple[float, str]] = []
        calls = make_calls(inputs, outputs, fused, batch, device)
        for contender, (call, expected) in calls.items():
            row = Row(
                name, contender, {"B": batch, "K": inputs, "O": outputs}, "bfloat16", "decode", floor_ms=floor_ms
            )
            try:
                row.error = disagreement([call(0)], [expected])
                if row.error > TOLERANCE:
                    row.status = f"refused: differs by {row.error:.1e}"
                else:
                    row.fill_times(Timing(time_graph(call, copies(inputs, outputs), repeats, device)))
                    assert row.p50_ms is not None
                    found.append((row.p50_ms, contender))
            except Exception as error:
                row.status = f"failed: {type(error).__name__}: {str(error)[:100]}"
            record.rows.append(row)
        best = ", ".join(f"{contender} {1000 * time_ms:.2f}" for time_ms, contender in sorted(found)[:4])
        library = next((1000 * t for t, contender in found if contender == LIBRARY), None)
        console.print(
            f"{name} B{batch}: floor {1000 * floor_ms:.2f} us, torch {format_number(library)}, best {best}",
            soft_wrap=True,
        )
        record.save(output)
    console.print(f"written to {record.save(output)}", soft_wrap=True)


def copies(inputs: int, outputs: int) -> int:
    """How many weights of this shape make up `WALK`."""
    return max(2, min(64, WALK // (inputs * outputs * 2)))


def make_calls(
    inputs: int, outputs: int, fused: str, batch: int, device: torch.device
) -> dict[str, tuple[Callable[[int], Tensor], Tensor]]:
    """By contender: a call with the i-th weight, and the fp64 result for the first."""
    torch.manual_seed(0)
    weights = [
        torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
        for _ in range(copies(inputs, outputs))
    ]
    x = torch.randn(batch, inputs, device=device, dtype=torch.float32 if fused == "norm" else torch.bfloat16)
    options: dict[str, Any] = {}
    if fused:
        options["norm_weight"] = (
            torch.randn(inputs, device=device, dtype=torch.bfloat16) if "residual" != fused else None
        )
    if "residual" in fused:
        options["residual"] = torch.randn(batch, outputs, device=device)
    if "gated" in fused:
        options["z"] = torch.randn(batch, inputs, device=device, dtype=torch.bfloat16)
    expected = fused_linear_ref(x, weights[0], **options)
    # triton is not there on every machine that lists the commands
    from mamba_kernels.decode import triton_linear

    def tuned(tuning: tuple[int, int, int]) -> Callable[[int], Tensor]:
        def call(index: int) -> Tensor:
            shipped = triton_linear.choose
            triton_linear.choose = lambda *arguments: triton_linear.Tuning(*tuning)
            try:
                return mamba_kernels.fused_linear(x, weights[index], **options)
            finally:
                triton_linear.choose = shipped

        return call

    found = {"x".join(map(str, tuning)): (tuned(tuning), expected) for tuning in TUNINGS}
    found["shipped"] = (lambda index: mamba_kernels.fused_linear(x, weights[index], **options), expected)
    half = x.to(torch.bfloat16)
    found[LIBRARY] = (
        lambda index: F.linear(half, weights[index]),
        fused_linear_ref(half, weights[0]),
    )
    return found


def time_graph(call: Callable[[int], Tensor], launches: int, repeats: int, device: torch.device) -> list[float]:
    """Milliseconds a launch, for each replay of a graph that goes through all weights."""
    for index in range(2):
        call(index)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            call(index)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / launches)
    # the first replay uploads the graph
    return [time_ms for time_ms in times if time_ms <= 2 * statistics.median(times)]
