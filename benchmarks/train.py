"""Training steps on random weights of the published shapes: ours with each option, and its peers with the same weights.

A step is forward, loss, backward and a fused AdamW update; all tokens of a batch count. Before anything is timed, the losses
before and after the first update have to be those of the first contender of ours (of the first with adapters, for those with
adapters). Peak memory is that of a step with weights and optimiser state, as torch counts it on a GPU and the kernel on Linux. One
contender after the other is on the device; ours come first at every shape, then the peers.

MFU is what the model has to compute in a step (`step_flops`) over what the datasheet says the device could have done in that time.
What is computed twice, to save memory, does not count.

What is not run, because a step would take longer than the cap, memory or time were short, is a row that says so. The record is written
after every row.
"""

import contextlib
import gc
import importlib
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import mamba_kernels
from benchmarks.contenders import (
    CLASSES,
    OWN_KINDS,
    SIZES,
    make_mamba_ssm,
    native_without_packages,
    parse_names,
    parse_numbers,
    parse_peers,
)
from benchmarks.op_contenders import is_installed
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.timing import measure, peak_memory_mib, predict_seconds, synchronize
from hf_mamba.layers import SelectiveScanMixer, SSDMixer
from hf_mamba.layers.switch import TopKRouter
from hf_mamba.models.moe_mamba.experts import StackedExperts

__all__ = ["step_flops", "train"]

OURS, NATIVE, BARE, MAMBA_SSM = "hf_mamba", "transformers", "transformers-bare", "mamba_ssm"
PEERS = (NATIVE, MAMBA_SSM, BARE)
# what ours can be asked to do, and the name that asks for nothing
OPTIONS = (
    "eager",
    "skip_logits",
    "graph",
    "lean",
    "part_lean",
    "part_checkpointing",
    "checkpointing",
    "compile",
    "compile_graphs",
    "lora",
    "lora_16bit",
)
PLAIN = "plain"
# losses, relative: in half precision, kernels that round at other places
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "autocast": 2e-2}
LEARNING_RATE = 1e-3
# adapters that transformers' own classes can have as well; PEFT holds them in fp32 unless it is told not to
LORA = {"r": 16, "target_modules": ["in_proj"]}
# of "part_checkpointing": every so many blocks are computed again
CHECKPOINTED = 3
# of "part_lean": the share of the layers that compute again what takes little time
LEAN_SHARE = 1 / 3
# tokens of a step where --batch does not say otherwise
TOKENS = {"cuda": 16384, "cpu": 2048}
# dense bf16 of the datasheets of the SXM boards, by a part of the device's name
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}


@dataclass(frozen=True)
class Target:
    """Of shared/DESIGN.md, "Numbers to beat"."""

    tokens_per_s: float
    gigabytes: float | None = None


# by device, kind, size, batch and length
TARGETS = {
    **{("cuda", kind, "130m", 8, 2048): Target(300_000, 8.0) for kind in ("mamba", "mamba2")},
    **{("cpu", kind, "small", 4, 512): Target(5_000) for kind in ("mamba", "mamba2")},
}


@dataclass(frozen=True)
class Contender:
    """Whose model, and what it is asked to do."""

    who: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return " + ".join([self.who, *self.options])


def train(
    models: Annotated[str, typer.Option(help=f"Out of {', '.join(OWN_KINDS)}, separated by commas.")] = ",".join(
        OWN_KINDS
    ),
    sizes: Annotated[
        str | None, typer.Option(help=f"Out of {', '.join(SIZES)}; 130m, 370m and 1.4b on a GPU, else small.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences of a step; as many as make 16384 tokens on a GPU, else 2048.", min=1)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", "--length", help="Tokens of a sequence; 2048,16384 on a GPU, else 512.")
    ] = None,
    options: Annotated[
        str,
        typer.Option(
            help=f"Contenders of ours: {PLAIN}, or options out of {', '.join(OPTIONS)} joined by +. What each changes is set "
            "against the one before."
        ),
    ] = "plain,skip_logits,graph,graph+lean,graph+part_checkpointing,graph+checkpointing,skip_logits+compile,graph+lora,graph+lora_16bit",
    against: Annotated[
        str, typer.Option(help="Peers, or none; those that are not installed are named and left out.")
    ] = ",".join(PEERS),
    precision: Annotated[
        str | None,
        typer.Option(help="bfloat16 (weights too), autocast (weights in fp32) or float32, which a CPU takes."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
    layers: Annotated[int | None, typer.Option(help="Layers; those of the checkpoints when left out.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also list the kernels of a step of ours with the last options.")
    ] = False,
    cell_seconds: Annotated[float, typer.Option(help="Time for each contender, three steps at least.")] = 3.0,
    cap_seconds: Annotated[float, typer.Option(help="A step expected to take longer is not run.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="What is not measured after this time is left out.")] = 300.0,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: in benchmarks/results.")] = None,
) -> None:
    """Time whole training steps by model, size and option: tokens/s, peak memory, MFU, and what each option changes."""
    console = table_console(170)
    start = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    try:
        kinds = parse_names(models, "--models", OWN_KINDS)
        chosen = parse_names(sizes or ("130m,370m,1.4b" if on_gpu else "small"), "--sizes", tuple(SIZES))
        tokens = parse_numbers(lengths or ("2048,16384" if on_gpu else "512"), "--lengths")
        if tokens[0] < 2:
            raise ValueError("--lengths takes at least 2 tokens, or there is nothing to predict.")
        own = parse_options(options)
        peers = parse_peers(against, PEERS)
        wanted = precision or ("bfloat16" if on_gpu else "float32")
        if wanted not in TOLERANCES:
            raise ValueError(f"--precision takes one of {', '.join(TOLERANCES)}, got {wanted!r}.")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not is_installed(MAMBA_SSM):
        if MAMBA_SSM in peers:
            console.print("mamba_ssm is not installed and left out")
        # then transformers has no packages anyway
        peers = [peer for peer in peers if peer != MAMBA_SSM and (peer != BARE or NATIVE not in peers)]
    record = Record(
        "train" if on_gpu else "cpu-train",
        settings={
            "optimizer": "AdamW, fused",
            "lora": LORA,
            "part_checkpointing": f"every {CHECKPOINTED}rd block",
            "part_lean": LEAN_SHARE,
            "backend": backend,
            "layers": layers,
            "peak_flops": peak_flops(device),
            "targets": {" ".join(map(str, key)): asdict(target) for key, target in TARGETS.items()},
        },
        commit=commit,
    )
    benches = [
        Bench(
            kind,
            size,
            layers,
            {"B": batch or max(1, TOKENS[device.type] // length), "L": length},
            device,
            wanted,
            backend,
        )
        for size, kind, length in itertools.product(chosen, kinds, tokens)
    ]
    # ours first: whatever ends the run early leaves those
    ours = [Contender(OURS, asked) for asked in own]
    for contenders in (ours, list(with_adapters(peers, own))):
        for bench in benches:
            for contender in contenders:
                if contender.who != OURS and CLASSES[bench.kind].native is None:
                    continue
                console.print(f"[dim]{bench.name} {bench.shape_text}, {contender.name}[/]")
                row = Row(bench.name, contender.name, bench.shape, wanted, "step", status="out of time")
                if time.perf_counter() - start < seconds:
                    bench.fill(row, contender, cell_seconds, cap_seconds)
                record.rows.append(row)
                record.save(output)
            if profile and on_gpu and contenders is ours and time.perf_counter() - start < seconds:
                record.settings.setdefault("kernels", []).append(bench.kernels(contenders[-1]))
                record.save(output)
            bench.release()
    record.rows.sort(key=lambda row: [bench.key for bench in benches].index((row.subject, tuple(row.shape.values()))))
    record.summary = [entry for bench in benches for entry in ablation(record.rows, bench.key)]
    print_table(console, record)
    record.print_summary(console, "what each option of ours changes")
    for entry in record.settings.get("kernels", []):
        print_kernels(console, entry)
    console.print(f"written to {record.save(output)}", soft_wrap=True)
    wrong = [f"{row.subject} ({row.contender})" for row in record.rows if row.status.startswith("refused")]
    if wrong:
        console.print(f"[red]the gate is red: {', '.join(wrong)}[/]")
        raise typer.Exit(1)


def _has_adapters(options: Iterable[str]) -> bool:
    return not {"lora", "lora_16bit"}.isdisjoint(options)


def with_adapters(peers: Iterable[str], own: Iterable[tuple[str, ...]]) -> Iterable[Contender]:
    """The peers, and transformers with adapters too if one of ours has them."""
    wanted = any(_has_adapters(options) for options in own)
    for peer in peers:
        yield Contender(peer)
        if wanted and peer != MAMBA_SSM:
            yield Contender(peer, ("lora",))


def peak_flops(device: torch.device) -> float | None:
    """What the datasheet says of dense products in bf16; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK_FLOPS.items() if part in name), None)


def step_flops(model: nn.Module) -> float:
    """What a token costs in forward and backward, in floating-point operations that the model itself asks for.

    Two for each weight that the token is multiplied with; of routed experts, those of k. As much again in backward for the inputs'
    gradient, and once more for weights that are trained. A recurrence over N states takes 5 N operations a channel: decay, input
    (a multiplication and an addition) and output (the same); its backward twice that. The attention-like form of SSD and whatever
    is computed twice do more, which does not count. Norms, activations and the embedding are left out.
    """
    total = 0.0
    for module in model.modules():
        weights: list[tuple[Tensor, float]] = []
        if isinstance(module, nn.Linear | nn.Conv1d | TopKRouter):
            weights = [(module.weight, 1.0)]
        elif isinstance(module, StackedExperts):
            share = module.config.num_experts_per_tok / module.num_experts
            weights = [(weight, share) for weight in module.parameters(recurse=False)]
        for weight, share in weights:
            total += (6 if weight.requires_grad else 4) * share * weight.numel()
        if isinstance(module, SelectiveScanMixer | SSDMixer):
            total += 3 * 5 * module.intermediate_size * module.ssm_state_size
    return total


def parse_options(text: str) -> list[tuple[str, ...]]:
    """The contenders of ours: tuples of options, plain first, since it is what the others are compared with.

    Raises:
        ValueError: an unknown option.
    """
    found: list[tuple[str, ...]] = [()]
    for part in text.split(","):
        names = tuple(name.strip() for name in part.split("+") if name.strip() != PLAIN)
        unknown = [name for name in names if name not in OPTIONS]
        if unknown:
            raise ValueError(
                f"--options takes {PLAIN} and options out of {', '.join(OPTIONS)} joined by +, separated by commas, got {text!r}."
            )
        if names not in found:
            found.append(names)
    return found


def ablation(rows: list[Row], key: tuple[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """For each contender of ours at one shape, speed and memory against those without options and those of the row before."""
    own = [row for row in rows if (row.subject, tuple(row.shape.values())) == key and row.contender.startswith(OURS)]

    def ratio(value: float | None, base: float | None) -> float | None:
        return None if value is None or base is None else value / base

    plain = next(row for row in own if row.contender == OURS)
    return [
        {
            "model": row.subject,
            "L": str(row.shape["L"]),
            "contender": row.contender,
            "tokens/s": row.tokens_per_s,
            "times plain": ratio(row.tokens_per_s, plain.tokens_per_s),
            "times the row before": ratio(row.tokens_per_s, before.tokens_per_s),
            "GB": gigabytes(row),
            "of plain": ratio(row.peak_memory_mib, plain.peak_memory_mib),
        }
        for before, row in zip([own[0], *own], own, strict=False)
    ]


def gigabytes(row: Row) -> float | None:
    """Peak memory in units of 10⁹ bytes, as targets are."""
    return None if row.peak_memory_mib is None else row.peak_memory_mib * 2**20 / 1e9


def target_of(row: Row, device: str, layers: int | None) -> Target | None:
    """What is aimed at with all weights trained; models of fewer layers have no target."""
    if layers is not None or "lora" in row.contender:
        return None
    kind, _, size = row.subject.partition("-")
    return TARGETS.get((device, kind, size, row.shape["B"], row.shape["L"]))


def print_table(console: Console, record: Record) -> None:
    """A line for each contender; one table a model. Percentiles of tokens/s are those of the steps, the slow ones first."""
    device = "cpu" if record.benchmark.startswith("cpu") else "cuda"
    for _, group in itertools.groupby(record.rows, lambda row: (row.subject, *row.shape.values())):
        rows = list(group)
        shape, precision = rows[0].shape, rows[0].dtype
        title = f"{rows[0].subject}, B{shape['B']} L{shape['L']}, {precision}"
        table = Table(title=title, title_justify="left")
        table.add_column("contender", no_wrap=True)
        for name in ("tokens/s p20", "p50", "p80", "target", "step ms", "GB", "target", "MFU", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note")
        for row in rows:
            target = target_of(row, device, record.settings["layers"])
            tokens = shape["B"] * shape["L"]
            speeds = [None if t is None else 1000 * tokens / t for t in (row.p80_ms, row.p50_ms, row.p20_ms)]
            table.add_row(
                row.contender,
                *map(_thousands, speeds),
                _met(_thousands, row.tokens_per_s, None if target is None else target.tokens_per_s, at_least=True),
                format_number(row.p50_ms),
                format_number(gigabytes(row)),
                _met(format_number, gigabytes(row), None if target is None else target.gigabytes, at_least=False),
                "-" if row.mfu is None else f"{row.mfu:.1%}",
                "-" if row.error is None else f"{row.error:.0e}",
                "" if row.status == "measured" else row.status,
            )
        console.print(table)


def print_kernels(console: Console, entry: dict[str, Any]) -> None:
    """Where the GPU spends the time of a step."""
    title = f"{entry['model']}, {entry['contender']}: {entry['kernels ms']:.1f} ms of kernels in a step of {entry['step ms']:.1f} ms"
    table = Table(
        title=f"{title}; host {entry['host ms']:.1f} ms, {entry['launches']:.0f} launches", title_justify="left"
    )
    for name in ("kernel", "ms", "launches"):
        table.add_column(name)
    for line in entry["longest"]:
        table.add_row(line["kernel"], f"{line['ms']:.2f}", f"{line['launches']:.0f}")
    console.print(table)


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _met(show: Callable[[float | None], str], value: float | None, target: float | None, *, at_least: bool) -> str:
    if target is None or value is None:
        return show(target)
    return f"{show(target)} {'✓' if (value >= target) == at_least or value == target else '✗'}"


class Bench:
    """One shape of model: its contenders start from the same weights."""

    def __init__(
        self,
        kind: str,
        size: str,
        layers: int | None,
        shape: dict[str, int],
        device: torch.device,
        precision: str,
        backend: str,
    ):
        self.kind, self.size, self.layers, self.shape = kind, size, layers, shape
        self.device, self.precision, self.backend = device, precision, backend
        self.fields = dict(SIZES[size][kind]) | ({} if layers is None else {"num_hidden_layers": layers})
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.weights: dict[str, Tensor] | None = None
        # losses, and the operations of a token, with adapters and without
        self.expected: dict[bool, list[float]] = {}
        self.flops: dict[bool, float] = {}

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}"

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        return self.name, tuple(self.shape.values())

    @property
    def shape_text(self) -> str:
        return " ".join(f"{name}{number}" for name, number in self.shape.items())

    def release(self) -> None:
        """Give the weights up; they are drawn again, the same, when they are needed."""
        self.weights = None
        self._collect()

    def _collect(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _state(self) -> dict[str, Tensor]:
        if self.weights is None:
            torch.manual_seed(0)
            self.weights = self._build(CLASSES[self.kind].own, CLASSES[self.kind].own_config).state_dict()
        return self.weights

    def _build(self, make: Any, config: Any) -> Any:
        # on the device: drawing billions of weights on a host takes minutes
        with torch.device(self.device):
            # keeps in fp32 what from_pretrained does
            return make._from_config(config(**self.fields), dtype=self.dtype)

    def fill(self, row: Row, contender: Contender, cell_seconds: float, cap_seconds: float) -> None:
        """Check and time one contender; a failure, such as memory that does not suffice, is a row as well."""
        with mamba_kernels.backend("eager") if "eager" in contender.options else contextlib.nullcontext():
            try:
                self._measure(row, contender, cell_seconds, cap_seconds)
            except torch.OutOfMemoryError:
                row.status = "out of memory"
            except Exception as error:
                row.status = f"failed: {type(error).__name__}: {str(error)[:120]}"
        self._collect()

    def _allocated(self, most: bool = False) -> float:
        """MiB on a GPU now, from where the peak is counted anew; or that peak."""
        if self.device.type != "cuda":
            return 0.0
        if most:
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device) / 2**20

    def _measure(self, row: Row, contender: Contender, cell_seconds: float, cap_seconds: float) -> None:
        row.status = "measured"
        adapted = _has_adapters(contender.options)
        before = self._allocated()
        step = self._contender(contender)
        if contender.who in (NATIVE, BARE) or "eager" in contender.options:
            expected = self._expected_seconds(step)
            if expected is not None and expected > cap_seconds:
                row.status = f"not run: about {expected:.0f} s a step expected, the cap is {cap_seconds:.0f} s"
                return
            # from the weights that all start from
            step = self._contender(contender)
        if contender.who == OURS and adapted not in self.flops:
            self.flops[adapted] = step_flops(step.model)
        losses = [step(self._ids(self.shape["L"])).item() for _ in range(2)]
        # what a graph keeps is allocated when it is captured, and at no replay
        captured = (
            self._allocated(most=True) - before
            if "graph" in contender.options and self.device.type == "cuda"
            else None
        )
        if adapted not in self.expected:
            if contender.who != OURS:
                raise RuntimeError("no contender of ours has losses to compare with")
            self.expected[adapted] = losses
        else:
            pairs = zip(losses, self.expected[adapted], strict=True)
            row.error = max(abs(a - b) / abs(b) for a, b in pairs)
            # not-a-number is no agreement either
            if not row.error <= TOLERANCES[self.precision]:
                row.status = f"refused: losses differ by {row.error:.1e}, more than {TOLERANCES[self.precision]:.0e}"
                return
        ids = self._ids(self.shape["L"])
        needed = peak_memory_mib(lambda: step(ids), self.device)
        row.peak_memory_mib = None if needed is None else step.held_bytes() / 2**20 + needed
        if captured is not None:
            row.peak_memory_mib = captured
        timing = measure({row.contender: lambda: step(ids)}, self.device, cell_seconds)[row.contender]
        row.fill_times(timing, tokens=ids.numel())
        target = target_of(row, self.device.type, self.layers)
        row.target_ms = None if target is None else 1000 * ids.numel() / target.tokens_per_s
        row.flops = self.flops[adapted] * ids.numel()
        peak = peak_flops(self.device)
        row.mfu = None if peak is None or row.p50_ms is None else row.flops / (row.p50_ms / 1000) / peak

    def kernels(self, contender: Contender, most: int = 30) -> dict[str, Any]:
        """Where the GPU spends the time of a step: the longest kernels, and how much of it the host takes to issue them."""
        step, ids = self._contender(contender), self._ids(self.shape["L"])
        for _ in range(3):
            step(ids)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        step(ids)
        issued = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        whole = time.perf_counter() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step(ids)
            torch.cuda.synchronize(self.device)
        events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
        events.sort(key=lambda event: -event.self_device_time_total)
        return {
            "model": f"{self.name} {self.shape_text}",
            "contender": contender.name,
            "step ms": 1000 * whole,
            "host ms": 1000 * issued,
            "kernels ms": sum(event.self_device_time_total for event in events) / 1000,
            "launches": sum(event.count for event in events),
            "longest": [
                {"kernel": event.key[:90], "ms": event.self_device_time_total / 1000, "launches": event.count}
                for event in events[:most]
            ],
        }

    def _contender(self, contender: Contender) -> "Step":
        options, state = contender.options, self._state()
        if contender.who == MAMBA_SSM:
            model = make_mamba_ssm(self.kind, self.fields, state, self.device, self.dtype)
            return Step(model, self.device, self.precision, returns_logits=True)
        classes = CLASSES[self.kind]
        if contender.who == OURS:
            model = self._build(classes.own, classes.own_config)
        else:
            make = classes.native if contender.who == NATIVE else native_without_packages(self.kind)
            model = self._build(make, classes.native_config)
        model.load_state_dict(state)
        if contender.who == OURS:
            model.skip_logits = "skip_logits" in options
            model.graph_training = "graph" in options
            if "lean" in options or "part_lean" in options:
                model.set_lean_training(1.0 if "lean" in options else LEAN_SHARE)
            if "checkpointing" in options or "part_checkpointing" in options:
                # there is no dropout; a look at the generators would be one at the device
                model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            if "part_checkpointing" in options:
                for index, layer in enumerate(model.backbone.layers):
                    layer.gradient_checkpointing = index % CHECKPOINTED == 0
        if _has_adapters(options):
            peft = importlib.import_module("peft")
            torch.manual_seed(0)
            wide = "lora_16bit" not in options
            model = peft.get_peft_model(model, peft.LoraConfig(**LORA), autocast_adapter_dtype=wide)
        step = Step(model, self.device, self.precision)
        if "compile" in options:
            step.model = torch.compile(model, backend=self.backend)
        if "compile_graphs" in options:
            step.model = torch.compile(model, mode="reduce-overhead")
        return step

    def _ids(self, length: int) -> Tensor:
        """(B, L) tokens, the same for all."""
        generator = torch.Generator().manual_seed(length)
        shape = (self.shape["B"], length)
        return torch.randint(3, self.fields["vocab_size"], shape, generator=generator).to(self.device)

    def _expected_seconds(self, step: "Step") -> float | None:
        """Seconds that a step takes, from shorter ones: without compiled kernels that of transformers' Mamba is quadratic."""
        history = []
        for length in (self.shape["L"] // 8, self.shape["L"] // 4):
            if length < 16:
                continue
            ids = self._ids(length)
            step(ids)
            synchronize(self.device)
            start = time.perf_counter()
            step(ids)
            synchronize(self.device)
            history.append((length, time.perf_counter() - start))
        return predict_seconds(history, self.shape["L"])


class Step:
    """A training step of one model.

    Args:
        returns_logits: the model computes no loss; it is then that of transformers, from logits in fp32.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: str, returns_logits: bool = False):
        self.model: Any = model.train()
        self.parameters = list(model.parameters())
        trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        self.device, self.autocast, self.returns_logits = device, precision == "autocast", returns_logits

    def __call__(self, ids: Tensor) -> Tensor:
        """The loss () of tokens (B, L), before the update."""
        context = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            loss = self._loss(ids)
        loss.backward()
        self.optimizer.step()
        # at the end, so that no gradient is held between steps
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, ids: Tensor) -> Tensor:
        if not self.returns_logits:
            return self.model(ids, labels=ids).loss
        logits = self.model(ids).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())

    def held_bytes(self) -> int:
        """Weights and the optimiser's state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self.parameters, *state])
