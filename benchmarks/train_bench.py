"""One shape of model and its contenders, for `python -m benchmarks train`: built, checked against ours, a step timed.

What is measured and how is said in `benchmarks.train`.
"""

import contextlib
import gc
import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mamba_kernels
from benchmarks.contenders import (
    CLASSES,
    SIZES,
    make_mamba_ssm,
    native_without_packages,
)
from benchmarks.record import Row
from benchmarks.timing import measure, peak_memory_mib, predict_seconds, synchronize
from hf_mamba.layers import SelectiveScanMixer, SSDMixer
from hf_mamba.layers.switch import TopKRouter
from hf_mamba.models.moe_mamba.experts import StackedExperts

__all__ = [
    "BARE",
    "CHECKPOINTED",
    "LEAN_SHARE",
    "LORA",
    "MAMBA_SSM",
    "NATIVE",
    "OURS",
    "TARGETS",
    "TOLERANCES",
    "Bench",
    "Contender",
    "Step",
    "has_adapters",
    "peak_flops",
    "step_flops",
    "target_of",
]

OURS, NATIVE, BARE, MAMBA_SSM = "hf_mamba", "transformers", "transformers-bare", "mamba_ssm"
# losses, relative: in half precision, kernels that round at other places
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "autocast": 2e-2}
LEARNING_RATE = 1e-3
# adapters that transformers' own classes can have as well; PEFT holds them in fp32 unless it is told not to
LORA = {"r": 16, "target_modules": ["in_proj"]}
# of "part_checkpointing": every so many blocks are computed again
CHECKPOINTED = 3
# of "part_lean": the share of the layers that compute again what takes little time
LEAN_SHARE = 1 / 3
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


def has_adapters(options: Iterable[str]) -> bool:
    return not {"lora", "lora_16bit"}.isdisjoint(options)


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
        adapted = has_adapters(contender.options)
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
        if has_adapters(options):
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


def target_of(row: Row, device: str, layers: int | None) -> Target | None:
    """What is aimed at with all weights trained; models of fewer layers have no target."""
    if layers is not None or "lora" in row.contender:
        return None
    kind, _, size = row.subject.partition("-")
    return TARGETS.get((device, kind, size, row.shape["B"], row.shape["L"]))
