"""One GPU call for the Triton norms and state updates: correctness gate, times, tuning variants, tracing, first call.

    python3 kernels/benchmarks_dev/norm_update_gpu.py [--gate] [--rows] [--variants] [--compile] [--first-call] [--host]

Without options everything runs. Writes $OUT/norm_update.json and prints it. Times are medians by CUDA events with a cold L2.
Temporary: `benchmarks/` takes over once the ops are tuned.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from mamba_kernels.norm import eager as norm_eager  # noqa: E402
from mamba_kernels.norm import reference as norm_reference  # noqa: E402
from mamba_kernels.norm import triton_backward, triton_forward, triton_norm  # noqa: E402
from mamba_kernels.state_update import eager as update_eager  # noqa: E402
from mamba_kernels.state_update import reference as update_reference  # noqa: E402
from mamba_kernels.state_update import triton_selective, triton_ssd  # noqa: E402

OUT = Path(os.environ.get("OUT", "/tmp"))
DEVICE = "cuda"
BANDWIDTH = 3.0e12
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BF16, FP32 = torch.bfloat16, torch.float32
RESULT: dict[str, Any] = {}


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


# calls as f(tensors): what is compared and timed
NORMS: dict[str, tuple[tuple[str, ...], Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (
        ("x", "weight"),
        lambda x, weight: triton_norm.rms_norm_triton(x, weight, 1e-5),
        lambda x, weight: norm_eager.rms_norm_eager(x, weight, 1e-5),
        lambda x, weight: norm_reference.rms_norm_ref(x, weight, 1e-5),
    ),
    "add_rms_norm": (
        ("x", "residual", "weight"),
        lambda x, residual, weight: triton_norm.add_rms_norm_triton(x, residual, weight, 1e-5, residual.dtype),
        lambda x, residual, weight: norm_eager.add_rms_norm_eager(x, residual, weight, 1e-5, residual.dtype),
        lambda x, residual, weight: norm_reference.add_rms_norm_ref(x, residual, weight, 1e-5),
    ),
}
for _label, _share, _before in (("", 1, False), (" groups 8", 8, False), (" norm first", 1, True)):
    NORMS["rms_norm_gated" + _label] = (
        ("x", "weight", "z"),
        lambda x, weight, z, s=_share, b=_before: triton_norm.rms_norm_gated_triton(
            x, weight, z, 1e-5, x.shape[-1] // s, b
        ),
        lambda x, weight, z, s=_share, b=_before: norm_eager.rms_norm_gated_eager(
            x, weight, z, 1e-5, x.shape[-1] // s, b
        ),
        lambda x, weight, z, s=_share, b=_before: norm_reference.rms_norm_gated_ref(
            x, weight, z, 1e-5, x.shape[-1] // s, b
        ),
    )


def norm_tensors(names: tuple[str, ...], rows: int, width: int, dtype: torch.dtype, grad: bool) -> dict[str, Tensor]:
    values = {
        "x": randn(rows, width, dtype=dtype),
        "residual": randn(rows, width),
        "weight": randn(width),
        "z": randn(rows, 2 * width, dtype=dtype)[:, width:],
    }
    return {name: values[name].requires_grad_(grad) for name in names}


def error(actual: Tensor, expected: Tensor) -> float:
    if not torch.isfinite(actual).all():
        return float("inf")
    expected = expected.double()
    scale = expected.square().mean().sqrt().clamp(min=1e-30)
    return ((actual.double() - expected).square().mean().sqrt() / scale).item()


def gate_case(label: str, dtype: torch.dtype, errors: dict[str, float]) -> None:
    name, worst = max(errors.items(), key=lambda item: item[1])
    found = RESULT.setdefault("gate", {"cases": 0, "failed": [], "worst": {}})
    found["cases"] += 1
    if not worst <= TOLERANCES[dtype]:
        found["failed"].append({"case": label, "what": name, "error": worst})
        print(f"  FAIL {label}: {name} {worst:.1e}", flush=True)
    if worst > found["worst"].get(NAMES[dtype], (0.0,))[0]:
        found["worst"][NAMES[dtype]] = (worst, f"{label}: {name}")


def gate_norms() -> None:
    for dtype in TOLERANCES:
        for rows, width in ((1, 16), (3, 100), (65, 768), (2000, 2560), (257, 5120), (130, 10240), (65, 4096)):
            for op, (names, ours, _, oracle) in NORMS.items():
                if "groups" in op and width % 8:
                    continue
                values = norm_tensors(names, rows, width, dtype, True)
                wide = {name: value.detach().double().requires_grad_() for name, value in values.items()}
                found, expected = ours(**values), oracle(**wide)
                if not isinstance(found, tuple):
                    found, expected = (found,), (expected,)
                weights = [randn(*y.shape).to(y.dtype) for y in found]
                found += torch.autograd.grad(found, list(values.values()), weights)
                expected += torch.autograd.grad(expected, list(wide.values()), [w.double() for w in weights])
                labels = [f"output {i}" for i in range(len(weights))] + [f"d{name}" for name in names]
                errors = {n: error(a, b) for n, a, b in zip(labels, found, expected, strict=True)}
                gate_case(f"{op} {rows}x{width} {NAMES[dtype]}", dtype, errors)


def selective_tensors(batch: int, tokens: int, channels: int = 5120, size: int = 16, dtype: Any = BF16) -> dict:
    lead = (batch,) if tokens == 1 else (batch, tokens)
    xz = randn(*lead, 2 * channels, dtype=dtype)
    projection = randn(*lead, 160 + 2 * size, dtype=dtype)
    return {
        "state": randn(batch, channels, size),
        "x": xz[..., :channels],
        "dt": randn(*lead, channels, dtype=dtype),
        "A": -torch.rand(channels, size, device=DEVICE) * 4,
        "B": projection[..., 160 : 160 + size],
        "C": projection[..., 160 + size :],
        "D": randn(channels),
        "z": xz[..., channels:],
        "dt_bias": randn(channels),
    }


def ssd_tensors(
    batch: int, tokens: int, heads: int = 80, head_dim: int = 64, size: int = 128, groups: int = 1, dtype: Any = BF16
) -> dict:
    lead = (batch,) if tokens == 1 else (batch, tokens)
    return {
        "state": randn(batch, heads, head_dim, size),
        "x": randn(*lead, heads, head_dim, dtype=dtype),
        "dt": randn(*lead, heads + 7, dtype=dtype)[..., 7:],
        "A": -torch.rand(heads, device=DEVICE) * 4,
        "B": randn(*lead, groups, size, dtype=dtype),
        "C": randn(*lead, groups, size, dtype=dtype),
        "D": randn(heads),
        "z": randn(*lead, heads, head_dim, dtype=dtype),
        "dt_bias": randn(heads),
    }


UPDATES: dict[str, tuple[Callable[..., dict], Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "selective_state_update": (
        selective_tensors,
        triton_selective.selective_state_update_triton,
        update_eager.selective_state_update_eager,
        update_reference.selective_state_update_ref,
    ),
    "ssd_state_update": (
        ssd_tensors,
        triton_ssd.ssd_state_update_triton,
        update_eager.ssd_state_update_eager,
        update_reference.ssd_state_update_ref,
    ),
}


def gate_updates() -> None:
    shapes: dict[str, list[dict[str, int]]] = {
        "selective_state_update": [
            {"channels": 100, "size": 16},
            {"channels": 64, "size": 256},
            {"channels": 70, "size": 24},
        ],
        "ssd_state_update": [
            {"heads": 8, "head_dim": 64, "size": 128, "groups": 2},
            {"heads": 3, "head_dim": 80, "size": 100},
            {"heads": 2, "head_dim": 16, "size": 256},
        ],
    }
    for op, (make, ours, _, oracle) in UPDATES.items():
        for dtype in TOLERANCES:
            for shape in shapes[op]:
                for tokens in (1, 4):
                    for padded in (False, True):
                        values = make(3, tokens, dtype=dtype, **shape)
                        options: dict[str, Any] = {}
                        if padded:
                            options = {"return_step_states": True}
                            values["state_indices"] = torch.tensor([2, -1, 0], device=DEVICE, dtype=torch.int32)
                        if padded and op == "ssd_state_update":
                            options["dt_limit"] = (0.1, 2.0)
                        wide = {n: v.double() if v.is_floating_point() else v for n, v in values.items()}
                        values["state"] = values["state"].clone()
                        found, expected = ours(**values, **options), oracle(**wide, **options)
                        if not isinstance(found, tuple):
                            found, expected = (found,), (expected,)
                        errors = {
                            f"output {i}": error(a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True))
                        }
                        errors["state"] = error(values["state"], wide["state"])
                        gate_case(f"{op} {shape} T{tokens} padded={padded} {NAMES[dtype]}", dtype, errors)


def gate() -> None:
    gate_norms()
    gate_updates()


FLUSH: list[Tensor] = []


def median_us(fn: Callable[[], Any], repeats: int = 40) -> float:
    """Device time of a call that finds nothing in the L2; clearing a buffer hides the host's part."""
    if not FLUSH:
        FLUSH.append(torch.empty(1 << 30, dtype=torch.int8, device=DEVICE))
    for _ in range(3):
        fn()
    times = []
    for _ in range(repeats):
        FLUSH[0].zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) * 1000 for start, end in times), 2)


def norm_floors(op: str, elements: int) -> tuple[float, float]:
    """Microseconds to move the bytes of a forward, and of forward and backward, in bf16 with an fp32 residual."""
    forward, backward = {
        "rms_norm": (4, 6),
        "add_rms_norm": (2 + 4 + 2 + 4, 2 + 4 + 4 + 2 + 4),
    }.get(op, (6, 10))
    return elements * forward / BANDWIDTH * 1e6, elements * (forward + backward) / BANDWIDTH * 1e6


def time_norm(op: str, call: Callable[..., Any], values: dict[str, Tensor]) -> tuple[float, float]:
    detached = {name: value.detach() for name, value in values.items()}
    outputs = call(**values)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(y) for y in outputs]

    def both() -> None:
        out = call(**values)
        torch.autograd.grad(out, list(values.values()), weights)

    return median_us(lambda: call(**detached)), median_us(both)


def rows() -> None:
    table = RESULT.setdefault("rows", {})
    for width in (768, 2048, 2560, 5120):
        for op, (names, ours, eager, _) in NORMS.items():
            values = norm_tensors(names, 16384, width, BF16, True)
            floors = norm_floors(op, 16384 * width)
            contenders = {"triton": ours, "eager": eager}
            if op == "rms_norm":
                contenders["torch"] = lambda x, weight: torch.nn.functional.rms_norm(
                    x, weight.shape, weight.to(x.dtype)
                )
            row: dict[str, Any] = {"floor": [round(f, 1) for f in floors]}
            for name, call in contenders.items():
                row[name] = time_norm(op, call, values)
            row["fraction of floor"] = [round(f / t, 2) for f, t in zip(floors, row["triton"], strict=True)]
            table[f"{op} 16384x{width}"] = row
            print(f"{op} 16384x{width}: {row}", flush=True)
    for op, (make, ours, eager, _) in UPDATES.items():
        for batch in (1, 8, 64, 256):
            for tokens in (1, 4):
                values = make(batch, tokens)
                moved = 2 * values["state"].nbytes + sum(
                    value.nbytes for name, value in values.items() if name not in ("state",)
                )
                floor = (moved + values["x"].nbytes) / BANDWIDTH * 1e6
                row = {"floor": round(floor, 2), "triton": median_us(partial(ours, **values))}
                row["eager"] = median_us(partial(eager, **values), repeats=10)
                row["fraction of floor"] = round(floor / row["triton"], 2)
                table[f"{op} B{batch} T{tokens}"] = row
                print(f"{op} B{batch} T{tokens}: {row}", flush=True)


def variants() -> None:
    """Other tilings; the module's own come first."""
    table = RESULT.setdefault("variants", {})
    forward, backward, warps = triton_forward.FORWARD, triton_backward.BACKWARD, triton_backward.BACKWARD_WARPS
    settings = {
        "shipped": (forward, backward, warps),
        "forward tile 1024, 512 a warp": (forward._replace(per_warp=512), backward, warps),
        "forward tile 2048, 512 a warp": (forward._replace(tile=2048, per_warp=512), backward, warps),
        "forward tile 4096, 1024 a warp": (forward._replace(tile=4096), backward, warps),
        "forward tile 1024, 256 a warp": (forward._replace(per_warp=256), backward, warps),
        "backward tile 2048, 512 a warp": (forward, backward._replace(tile=2048), warps),
        "backward tile 1024, 512 a warp": (forward, backward._replace(tile=1024), warps),
        "backward tile 4096, 1024 a warp": (forward, backward._replace(per_warp=1024), warps),
        "backward tile 4096, 256 a warp": (forward, backward._replace(per_warp=256), warps),
        "backward tile 2048, 256 a warp": (forward, backward._replace(tile=2048, per_warp=256), warps),
        "backward half the programs": (forward, backward, warps // 2),
        "backward twice the programs": (forward, backward, warps * 2),
    }
    for width in (768, 2560, 5120):
        for op in ("rms_norm", "add_rms_norm", "rms_norm_gated"):
            names, ours, _, _ = NORMS[op]
            values = norm_tensors(names, 16384, width, BF16, True)
            row: dict[str, Any] = {}
            for label, (one, two, count) in settings.items():
                triton_forward.FORWARD, triton_backward.BACKWARD, triton_backward.BACKWARD_WARPS = one, two, count
                try:
                    row[label] = time_norm(op, ours, values)
                except Exception as problem:
                    row[label] = f"{type(problem).__name__}: {str(problem)[:100]}"
            triton_forward.FORWARD, triton_backward.BACKWARD, triton_backward.BACKWARD_WARPS = forward, backward, warps
            table[f"{op} 16384x{width}"] = row
            print(f"{op} 16384x{width}", flush=True)
            for label, times in row.items():
                print(f"    {label}: {times}", flush=True)
    updates: list[tuple[str, Any, list[tuple[int, int]]]] = [
        ("selective_state_update", triton_selective, [(512, 512), (256, 256), (1024, 1024), (1024, 512), (2048, 512)]),
        (
            "ssd_state_update",
            triton_ssd,
            [(2048, 512), (1024, 512), (4096, 512), (2048, 1024), (1024, 256), (512, 512)],
        ),
    ]
    for op, module, tilings in updates:
        make, ours, _, _ = UPDATES[op]
        shipped = module.TILE, module.WARP_TILE
        for batch in (1, 64):
            values = make(batch, 1)
            row = {}
            for tiling in tilings:
                module.TILE, module.WARP_TILE = tiling
                row[str(tiling)] = median_us(partial(ours, **values))
            module.TILE, module.WARP_TILE = shipped
            table[f"{op} B{batch}"] = row
            print(f"{op} B{batch}: {row}", flush=True)


def compiled() -> None:
    """torch.compile(fullgraph=True) and CUDA graphs give what plain calls give."""
    outcome = RESULT.setdefault("compile", {})
    for op, (names, ours, _, _) in NORMS.items():
        torch._dynamo.reset()
        values = norm_tensors(names, 70, 256, FP32, True)
        try:
            results = []
            for call in (ours, torch.compile(ours, fullgraph=True)):
                out = call(**values)
                out = out if isinstance(out, tuple) else (out,)
                results.append(
                    (*out, *torch.autograd.grad(out, list(values.values()), [torch.ones_like(y) for y in out]))
                )
            outcome[op] = max(error(a, b) for a, b in zip(*results, strict=True))
        except Exception as problem:
            outcome[op] = f"{type(problem).__name__}: {str(problem)[:1000]}"
    for op, (make, ours, _, _) in UPDATES.items():
        torch._dynamo.reset()
        values = make(2, 1)
        try:
            state = values.pop("state")
            first, second = state.clone(), state.clone()
            expected = ours(first, **values)
            actual = torch.compile(ours, fullgraph=True)(second, **values)
            outcome[op] = max(error(actual, expected), error(second, first))
            third = state.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = ours(third, **values)
            graph.replay()
            outcome[f"{op} in a CUDA graph"] = bool(torch.equal(captured, expected) and torch.equal(third, first))
        except Exception as problem:
            outcome[op] = f"{type(problem).__name__}: {str(problem)[:1000]}"
    print("compile:", json.dumps(outcome), flush=True)


def host() -> None:
    """Microseconds of Python a call takes, through the public functions and without their checks."""
    mamba_kernels = importlib.import_module("mamba_kernels")
    outcome = RESULT.setdefault("host", {})
    x, w = randn(1, 64, dtype=BF16), randn(64)
    selective, ssd = selective_tensors(1, 1, 64), ssd_tensors(1, 1, 4, 16, 16)
    leaf = x.clone().requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "rms_norm_triton": lambda: triton_norm.rms_norm_triton(x, w),
        "rms_norm": lambda: mamba_kernels.rms_norm(x, w),
        "rms_norm forward + backward": lambda: torch.autograd.grad(mamba_kernels.rms_norm(leaf, w), leaf, x),
        "add_rms_norm": lambda: mamba_kernels.add_rms_norm(x, x, w),
        "selective_state_update_triton": lambda: triton_selective.selective_state_update_triton(**selective),
        "selective_state_update": lambda: mamba_kernels.selective_state_update(**selective),
        "ssd_state_update_triton": lambda: triton_ssd.ssd_state_update_triton(**ssd),
        "ssd_state_update": lambda: mamba_kernels.ssd_state_update(**ssd),
        "torch add": lambda: x + x,
    }
    for name, call in calls.items():
        best = float("inf")
        call()
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(200):
                call()
            best = min(best, (time.perf_counter() - started) / 200 * 1e6)
        outcome[name] = round(best, 1)
    print("host:", json.dumps(outcome), flush=True)


FIRST_CALLS = {
    "rms_norm_gated forward + backward": "v = s.norm_tensors(('x', 'weight', 'z'), 64, 2560, s.BF16, True); f = "
    "lambda: s.torch.autograd.grad(s.NORMS['rms_norm_gated'][1](**v).sum(), list(v.values()))",
    "selective_state_update": "v = s.selective_tensors(1, 1); f = lambda: s.UPDATES['selective_state_update'][1](**v)",
    "ssd_state_update": "v = s.ssd_tensors(1, 1); f = lambda: s.UPDATES['ssd_state_update'][1](**v)",
}


def first_call() -> None:
    """Seconds of the first call in a fresh process with an empty cache, imports and CUDA context excluded."""
    for name, code in FIRST_CALLS.items():
        with tempfile.TemporaryDirectory() as cache:
            script = (
                f"import time; import norm_update_gpu as s; {code}; s.torch.cuda.synchronize(); t = time.time(); f(); "
                "s.torch.cuda.synchronize(); print(time.time() - t)"
            )
            result = subprocess.run(
                [sys.executable, "-c", script],
                cwd=Path(__file__).parent,
                env=os.environ | {"TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
            seconds = result.stdout.strip() or result.stderr[-300:]
            RESULT.setdefault("first call, s", {})[name] = seconds
            print(f"first call of {name}: {seconds}", flush=True)


def main() -> None:
    parts = {
        "gate": gate,
        "rows": rows,
        "variants": variants,
        "compile": compiled,
        "host": host,
        "first-call": first_call,
    }
    parser = argparse.ArgumentParser()
    for name in parts:
        parser.add_argument(f"--{name}", action="store_true")
    chosen = vars(parser.parse_args())
    everything = not any(chosen.values())
    RESULT.update(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    for name, part in parts.items():
        if everything or chosen[name.replace("-", "_")]:
            started = time.time()
            part()
            if name == "gate":
                print("gate:", json.dumps(RESULT["gate"]), flush=True)
            print(f"[{name} took {time.time() - started:.0f} s]", flush=True)
            # each part is saved as it ends
            (OUT / "norm_update.json").write_text(json.dumps(RESULT, indent=1))


if __name__ == "__main__":
    main()
