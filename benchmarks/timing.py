"""How things are timed: agreement first, then rounds in which every contender runs once, percentiles over the rounds."""

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "Contender",
    "Outcome",
    "Timing",
    "compare",
    "copy_bandwidth",
    "disagreement",
    "host_ms",
    "measure",
    "peak_memory_mib",
    "percentile",
    "predict_seconds",
    "synchronize",
]


@dataclass
class Timing:
    """Times of one contender in milliseconds: of the clock on the wall, and of all its threads on the processor."""

    times_ms: list[float]
    cpu_ms: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.times_ms)

    @property
    def best_cpu(self) -> float | None:
        return min(self.cpu_ms, default=None)

    @property
    def p20(self) -> float:
        return percentile(self.times_ms, 20)

    @property
    def p50(self) -> float:
        return percentile(self.times_ms, 50)

    @property
    def p80(self) -> float:
        return percentile(self.times_ms, 80)


@dataclass
class Contender:
    """One implementation of the thing that is measured.

    Args:
        name: as it stands in the table.
        run: what is timed.
        outputs: runs once, untimed, and returns the tensors on which all contenders have to agree.
    """

    name: str
    run: Callable[[], object]
    outputs: Callable[[], Sequence[Tensor]]


@dataclass
class Outcome:
    """What `compare` found for one contender: a timing, or the reason why there is none."""

    name: str
    timing: Timing | None
    error: float | None
    peak_memory_mib: float | None
    refusal: str | None


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the sorted `values`.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("percentile() needs at least one value, got none.")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def disagreement(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any tensor, relative to the largest expected value of that tensor; inf if not finite.

    Raises:
        ValueError: the two lists do not hold tensors of the same shapes.
    """
    if [value.shape for value in actual] != [value.shape for value in expected]:
        raise ValueError("disagreement() compares tensors of the same shapes in the same order; these differ.")
    worst = 0.0
    for got, wanted in zip(actual, expected, strict=True):
        if wanted.numel() == 0:
            continue
        if not torch.isfinite(got).all():
            return math.inf
        scale = wanted.double().abs().max().clamp(min=1e-30)
        worst = max(worst, ((got.double() - wanted.double()).abs().max() / scale).item())
    return worst


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done everything; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_once(run: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Milliseconds of one call: wall time and, on the CPU, processor time, which other processes disturb less.

    On a GPU it is the time between two events. Before the first the L2 cache is cleared, as a model's other work does; while
    the GPU does that, the host gets ahead, so that its share shows only where the GPU has to wait for it.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _larger_than_caches(device).zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end), None
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)


@cache
def _larger_than_caches(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy that no cache holds: the best of ten."""
    source = torch.zeros((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(run_once(lambda: target.copy_(source), device)[0] for _ in range(10))
    return 2 * source.numel() / (best / 1000)


def host_ms(run: Callable[[], object], device: torch.device, calls: int = 20, seconds: float = 0.1) -> float | None:
    """Milliseconds that the host needs to issue a call, the quickest of `calls`; None where it computes itself.

    Slow ones run fewer times, until `seconds` are over.
    """
    if device.type != "cuda":
        return None
    times: list[float] = []
    while len(times) < calls and sum(times) < seconds:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return 1000 * min(times)


def measure(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
) -> dict[str, Timing]:
    """Time several functions in rounds, so that whatever else the machine does falls on all of them.

    A function leaves the rounds once it has used `seconds` and run `min_rounds` times; one that takes longer than
    `seconds` for a single call runs twice, so that its spread can be seen. The caller has run each once before.

    Args:
        runs: the functions by name.
        device: where they compute.
        seconds: time for each function.
    """
    timings = {name: Timing([]) for name in runs}
    active = dict(runs)
    for _ in range(max_rounds):
        for name, run in list(active.items()):
            timing = timings[name]
            wall, cpu = run_once(run, device)
            timing.times_ms.append(wall)
            if cpu is not None:
                timing.cpu_ms.append(cpu)
            enough = 2 if timing.times_ms[0] > 1000 * seconds else min_rounds
            if sum(timing.times_ms) >= 1000 * seconds and len(timing.times_ms) >= enough:
                del active[name]
        if not active:
            break
    return timings


def peak_memory_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The memory that `run()` needs at most beyond what is held before it, in MiB; None where nobody counts.

    On a GPU torch counts, on Linux the kernel: there `run` should have been called before, or its first-time costs count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # what the allocator keeps of earlier runs would hide what this one needs
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            # 5 sets the high-water mark of the resident memory back to what is resident now
            file.write("5")
        resident = _resident_kib("VmRSS")
    except (OSError, AttributeError, TypeError):
        run()
        return None
    run()
    return max(0.0, (_resident_kib("VmHWM") - resident) / 1024)


def _resident_kib(field: str) -> float:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return float(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def predict_seconds(history: Sequence[tuple[int, float]], length: int) -> float | None:
    """Seconds to expect at `length` from pairs (length, seconds) at shorter ones; None without any.

    The exponent of the last two lengths is carried on, at least 1; with one point alone the cost counts as linear.
    """
    if not history:
        return None
    last_length, last_seconds = history[-1]
    exponent = 1.0
    if len(history) > 1:
        previous_length, previous_seconds = history[-2]
        exponent = max(1.0, math.log(last_seconds / previous_seconds) / math.log(last_length / previous_length))
    return last_seconds * (length / last_length) ** exponent


def compare(
    contenders: Sequence[Contender],
    device: torch.device,
    tolerance: float,
    seconds: float,
    reference: Callable[[], Sequence[Tensor]] | None = None,
) -> list[Outcome]:
    """Check that all contenders agree, then time those that do.

    Args:
        contenders: in the order of the table.
        tolerance: the largest `disagreement` with the expected values at which a contender is still timed.
        seconds: time for each contender.
        reference: makes the expected values; without it the first contender's are taken.

    Raises:
        ValueError: there is no contender.
    """
    if not contenders:
        raise ValueError("compare() needs at least one contender, got none.")
    expected = None if reference is None else [value.detach().clone() for value in reference()]
    errors: dict[str, float] = {}
    for contender in contenders:
        values = [value.detach().clone() for value in contender.outputs()]
        expected = values if expected is None else expected
        errors[contender.name] = disagreement(values, expected)
    agreeing = {item.name: item.run for item in contenders if errors[item.name] <= tolerance}
    del values, expected
    peaks = {name: peak_memory_mib(run, device) for name, run in agreeing.items()}
    timings = measure(agreeing, device, seconds)
    return [
        Outcome(
            name=item.name,
            timing=timings.get(item.name),
            error=errors[item.name],
            peak_memory_mib=peaks.get(item.name),
            refusal=None
            if item.name in timings
            else f"refused: results differ by {errors[item.name]:.1e}, more than {tolerance:.0e}",
        )
        for item in contenders
    ]
