"""Training steps on random weights of the published shapes: ours with each option, and its peers with the same weights.

A step is forward, loss, backward and a fused AdamW update; all tokens of a batch count. Before anything is timed, the losses
before and after the first update have to be those of ours without options (of the first of ours that runs). Peak memory is that of a step with weights and
optimiser state, as torch counts it on a GPU and the kernel on Linux. One contender after the other is on the device.

What is not run, because a step would take longer than the cap, memory or time were short, is a row that says so.
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

from benchmarks.contenders import CLASSES, KINDS, SIZES, parse_names
from benchmarks.op_contenders import is_installed
from benchmarks.record import Record, Row, format_number, table_console
from benchmarks.timing import measure, peak_memory_mib, predict_seconds, synchronize

__all__ = ["train"]

OURS, NATIVE, MAMBA_SSM = "hf_mamba", "transformers", "mamba_ssm"
PEERS = (NATIVE, MAMBA_SSM)
# what ours can be asked to do, and the name that asks for nothing
OPTIONS = ("skip_logits", "checkpointing", "compile")
PLAIN = "plain"
# losses, relative: in half precision, kernels that round at other places
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "autocast": 2e-2}
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Target:
    """Of shared/DESIGN.md, "Numbers to beat"."""

    tokens_per_s: float
    gigabytes: float | None = None


# by device, size, batch and length, for both kinds of model
TARGETS = {
    ("cuda", "130m", 8, 2048): Target(300_000, 8.0),
    ("cpu", "small", 4, 512): Target(5_000),
}


def train(
    models: Annotated[str, typer.Option(help="mamba, mamba2 or both, separated by a comma.")] = "mamba,mamba2",
    sizes: Annotated[
        str | None, typer.Option(help=f"Out of {', '.join(SIZES)}; 130m and 370m on a GPU, else small.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a step; 8 on a GPU, else 4.", min=1)] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence; 2048 on a GPU, else 512.", min=2)] = None,
    options: Annotated[
        str, typer.Option(help=f"Contenders of ours: {PLAIN}, or options out of {', '.join(OPTIONS)} joined by +.")
    ] = "plain,skip_logits,skip_logits+checkpointing,skip_logits+compile",
    against: Annotated[
        str, typer.Option(help="Peers; those that are not installed are named and left out.")
    ] = ",".join(PEERS),
    precision: Annotated[
        str | None,
        typer.Option(help="bfloat16 (weights too), autocast (weights in fp32) or float32, which a CPU takes."),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile.")] = "inductor",
    layers: Annotated[int | None, typer.Option(help="Layers; those of the checkpoints when left out.")] = None,
    cell_seconds: Annotated[float, typer.Option(help="Time for each contender, three steps at least.")] = 3.0,
    cap_seconds: Annotated[float, typer.Option(help="A step expected to take longer is not run.")] = 20.0,
    seconds: Annotated[float, typer.Option(help="What is not measured after this time is left out.")] = 300.0,
    commit: Annotated[str | None, typer.Option(help="The commit to write down where there is no .git.")] = None,
    output: Annotated[Path | None, typer.Option("--out", "--output", help="Default: in benchmarks/results.")] = None,
) -> None:
    """Time whole training steps by model, size and option: tokens/s, peak memory, and what each option changes."""
    console = table_console()
    start = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    try:
        kinds = parse_names(models, "--models", KINDS)
        chosen = parse_names(sizes or ("130m,370m" if on_gpu else "small"), "--sizes", tuple(SIZES))
        own = parse_options(options)
        peers = parse_names(against, "--against", PEERS) if against else []
        wanted = precision or ("bfloat16" if on_gpu else "float32")
        if wanted not in TOLERANCES:
            raise ValueError(f"--precision takes one of {', '.join(TOLERANCES)}, got {wanted!r}.")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if MAMBA_SSM in peers and not is_installed(MAMBA_SSM):
        console.print("mamba_ssm is not installed and left out")
        peers.remove(MAMBA_SSM)
    shape = {"B": batch or (8 if on_gpu else 4), "L": length or (2048 if on_gpu else 512)}
    record = Record(
        "train" if on_gpu else "cpu-train",
        settings={
            "optimizer": "AdamW, fused",
            "backend": backend,
            "layers": layers,
            "targets": {" ".join(map(str, key)): asdict(target) for key, target in TARGETS.items()},
        },
        commit=commit,
    )
    for size, kind in itertools.product(chosen, kinds):
        bench = Bench(kind, size, layers, shape, device, wanted, backend)
        contenders: list[str | tuple[str, ...]] = [*own, *peers]
        for contender in contenders:
            name = contender if isinstance(contender, str) else own_name(contender)
            console.print(f"[dim]{kind}-{size}, {name}[/]")
            row = Row(f"{kind}-{size}", name, shape, wanted, "step", status="out of time")
            if time.perf_counter() - start < seconds:
                bench.fill(row, contender, cell_seconds, cap_seconds)
            record.rows.append(row)
            # written as it goes: whatever ends the run early loses nothing
            record.save(output)
        record.summary += ablation(record.rows, f"{kind}-{size}")
    print_table(console, record)
    record.print_summary(console, "what each option of ours changes")
    console.print(f"written to {record.save(output)}", soft_wrap=True)
    wrong = [f"{row.subject} ({row.contender})" for row in record.rows if row.status.startswith("refused")]
    if wrong:
        console.print(f"[red]the gate is red: {', '.join(wrong)}[/]")
        raise typer.Exit(1)


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


def own_name(options: Iterable[str]) -> str:
    """How a contender of ours stands in the table."""
    return " + ".join([OURS, *options])


def ablation(rows: list[Row], subject: str) -> list[dict[str, Any]]:
    """For each contender of ours at one shape, speed and memory, and how they compare with those without options."""
    own = [row for row in rows if row.subject == subject and row.contender.startswith(OURS)]
    plain = own[0]

    def ratio(value: float | None, base: float | None) -> float | None:
        return None if value is None or base is None else value / base

    return [
        {
            "model": subject,
            "contender": row.contender,
            "tokens/s": row.tokens_per_s,
            "times plain": ratio(row.tokens_per_s, plain.tokens_per_s),
            "GB": gigabytes(row),
            "of plain": ratio(row.peak_memory_mib, plain.peak_memory_mib),
        }
        for row in own
    ]


def gigabytes(row: Row) -> float | None:
    """Peak memory in units of 10⁹ bytes, as targets are."""
    return None if row.peak_memory_mib is None else row.peak_memory_mib * 2**20 / 1e9


def target_of(row: Row, device: str, size: str, layers: int | None) -> Target | None:
    """What is aimed at; models of fewer layers have no target."""
    return TARGETS.get((device, size, row.shape["B"], row.shape["L"])) if layers is None else None


def print_table(console: Console, record: Record) -> None:
    """A line for each contender; one table a model. Percentiles of tokens/s are those of the steps, the slow ones first."""
    device = "cpu" if record.benchmark.startswith("cpu") else "cuda"
    for subject, group in itertools.groupby(record.rows, lambda row: row.subject):
        rows = list(group)
        shape, precision = rows[0].shape, rows[0].dtype
        table = Table(title=f"{subject}, B{shape['B']} L{shape['L']}, {precision}", title_justify="left")
        table.add_column("contender", no_wrap=True)
        for name in ("tokens/s p20", "p50", "p80", "target", "step ms", "GB", "target", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("note")
        for row in rows:
            target = target_of(row, device, subject.partition("-")[2], record.settings["layers"])
            tokens = shape["B"] * shape["L"]
            speeds = [None if t is None else 1000 * tokens / t for t in (row.p80_ms, row.p50_ms, row.p20_ms)]
            table.add_row(
                row.contender,
                *map(_thousands, speeds),
                _met(_thousands, row.tokens_per_s, None if target is None else target.tokens_per_s, at_least=True),
                format_number(row.p50_ms),
                format_number(gigabytes(row)),
                _met(format_number, gigabytes(row), None if target is None else target.gigabytes, at_least=False),
                "-" if row.error is None else f"{row.error:.0e}",
                "" if row.status == "measured" else row.status,
            )
        console.print(table)


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _met(show: Callable[[float | None], str], value: float | None, target: float | None, *, at_least: bool) -> str:
    if target is None or value is None:
        return show(target)
    return f"{show(target)} {'✓' if (value >= target) == at_least or value == target else '✗'}"


class Bench:
    """One shape of model: its contenders start from the same weights, kept on the host."""

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
        torch.manual_seed(0)
        self.weights = CLASSES[kind].own(CLASSES[kind].own_config(**self.fields)).state_dict()
        self.expected: list[float] = []

    def fill(self, row: Row, contender: str | tuple[str, ...], cell_seconds: float, cap_seconds: float) -> None:
        """Check and time one contender; a failure, such as memory that does not suffice, is a row as well."""
        try:
            self._measure(row, contender, cell_seconds, cap_seconds)
        except torch.OutOfMemoryError:
            row.status = "out of memory"
        except Exception as error:
            row.status = f"failed: {type(error).__name__}: {str(error)[:120]}"
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, row: Row, contender: str | tuple[str, ...], cell_seconds: float, cap_seconds: float) -> None:
        row.status = "measured"
        if contender == NATIVE:
            expected = self._expected_seconds()
            if expected is not None and expected > cap_seconds:
                row.status = f"not run: about {expected:.0f} s a step expected, the cap is {cap_seconds:.0f} s"
                return
        step = self._contender(contender)
        losses = [step(self._ids(self.shape["L"])).item() for _ in range(2)]
        if not self.expected:
            if contender in PEERS:
                raise RuntimeError("no contender of ours has losses to compare with")
            self.expected = losses
        else:
            row.error = max(abs(a - b) / abs(b) for a, b in zip(losses, self.expected, strict=True))
            # not-a-number is no agreement either
            if not row.error <= TOLERANCES[self.precision]:
                row.status = f"refused: losses differ by {row.error:.1e}, more than {TOLERANCES[self.precision]:.0e}"
                return
        ids = self._ids(self.shape["L"])
        needed = peak_memory_mib(lambda: step(ids), self.device)
        row.peak_memory_mib = None if needed is None else step.held_bytes() / 2**20 + needed
        timing = measure({row.contender: lambda: step(ids)}, self.device, cell_seconds)[row.contender]
        row.fill_times(timing, tokens=ids.numel())
        target = target_of(row, self.device.type, self.size, self.layers)
        row.target_ms = None if target is None else 1000 * ids.numel() / target.tokens_per_s

    def _contender(self, contender: str | tuple[str, ...]) -> "Step":
        if contender == MAMBA_SSM:
            return Step(self._mamba_ssm(), self.device, self.precision, returns_logits=True)
        classes = CLASSES[self.kind]
        native = contender == NATIVE
        make, config = (classes.native, classes.native_config) if native else (classes.own, classes.own_config)
        # `_from_config` keeps in fp32 what from_pretrained does
        with torch.device(self.device):
            model = make._from_config(config(**self.fields), dtype=self.dtype)
        model.load_state_dict(self.weights)
        step = Step(model, self.device, self.precision)
        if not native:
            model.skip_logits = "skip_logits" in contender
            if "checkpointing" in contender:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if "compile" in contender:
                step.model = torch.compile(model, backend=self.backend)
        return step

    def _mamba_ssm(self) -> nn.Module:
        config = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig(
            d_model=self.fields["hidden_size"],
            n_layer=self.fields["num_hidden_layers"],
            vocab_size=self.fields["vocab_size"],
            ssm_cfg=self._mamba_ssm_layer(),
            pad_vocab_size_multiple=8,
            tie_embeddings=torch.equal(self.weights["lm_head.weight"], self.weights["backbone.embeddings.weight"]),
        )
        classes = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        model = classes.MambaLMHeadModel(config, device=self.device, dtype=self.dtype)
        model.load_state_dict(
            {key.replace("backbone.embeddings.", "backbone.embedding."): value for key, value in self.weights.items()}
        )
        return model

    def _mamba_ssm_layer(self) -> dict[str, Any]:
        state = {"d_state": self.fields["state_size"]}
        if self.kind == "mamba":
            return state
        return {"layer": "Mamba2", "headdim": self.fields["head_dim"], "ngroups": self.fields["n_groups"], **state}

    def _ids(self, length: int) -> Tensor:
        """(B, L) tokens, the same for all."""
        generator = torch.Generator().manual_seed(length)
        shape = (self.shape["B"], length)
        return torch.randint(3, self.fields["vocab_size"], shape, generator=generator).to(self.device)

    def _expected_seconds(self) -> float | None:
        """Seconds that a step of transformers takes, from shorter ones: without compiled kernels Mamba's is quadratic."""
        step = self._contender(NATIVE)
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
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, fused=True)
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
