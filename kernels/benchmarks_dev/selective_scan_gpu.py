"""One GPU call for the Triton selective scan: correctness gate, tuning variants, kernel breakdown, first-call time.

    python3 kernels/benchmarks_dev/selective_scan_gpu.py [--gate] [--variants] [--first-call]

Writes $OUT/selective_scan.json. Temporary: `benchmarks/` takes over once the op is tuned.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
OUT = Path(os.environ.get("OUT", "/tmp"))
import torch  # noqa: E402
import triton  # noqa: E402

from mamba_kernels.selective_scan.reference import selective_scan_ref  # noqa: E402

package = "mamba_kernels.selective_scan."
triton_scan = importlib.import_module(package + "triton_scan")
forward = importlib.import_module(package + "triton_forward")
backward = importlib.import_module(package + "triton_backward")
scan = triton_scan.selective_scan_triton
DEVICE = "cuda"
RESULT: dict = {}

# name: (B, D, L, N, z/D/bias)
ROWS = {
    "B8 D2048 L2048": (8, 2048, 2048),
    "B1 D5120 L8192": (1, 5120, 8192),
    "B1 D1536 L65536": (1, 1536, 65536),
}
TARGETS = {"B8 D2048 L2048": (0.30, 1.5), "B1 D5120 L8192": (0.47, 2.2), "B1 D1536 L65536": (1.1, 5.0)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}


def operands(
    batch, channels, length, size=16, dtype=torch.bfloat16, trained=False, groups=None, seed=None, grad=False
):
    generator = torch.Generator(DEVICE)
    generator.manual_seed(seed if seed is not None else int(time.time() * 1e6) % 2**31)

    def rn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    bc = (batch, length, size) if groups is None else (batch, length, groups, size)
    A = -torch.arange(1, size + 1, device=DEVICE).float().expand(channels, size).contiguous()
    if trained:
        step = torch.exp(torch.rand(channels, generator=generator, device=DEVICE) * 4.6 - 6.9)
        bias, dt = step + torch.log(-torch.expm1(-step)), 0.5 * rn(batch, length, channels, dtype=dtype)
    else:
        bias, dt = rn(channels), rn(batch, length, channels, dtype=dtype)
        A = A * torch.exp(0.3 * rn(channels, size))
    values = {
        "x": rn(batch, length, channels, dtype=dtype),
        "dt": dt.to(dtype),
        "A": A,
        "B": rn(*bc, dtype=dtype),
        "C": rn(*bc, dtype=dtype),
        "D": rn(channels),
        "z": rn(batch, length, channels, dtype=dtype),
        "dt_bias": bias,
    }
    return {name: value.requires_grad_(grad) for name, value in values.items()}


def error(actual, expected):
    if not torch.isfinite(actual).all():
        return float("inf")
    expected = expected.double()
    return (
        (actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30)
    ).item()


def compare(label, values, dtype, **options):
    """Forward and every gradient against the fp64 reference; returns the largest error over its tolerance."""
    states = options.pop("n_states")
    channels, size = values["A"].shape
    grad_y = torch.randn(values["x"].shape, device=DEVICE, dtype=dtype)
    grad_final = torch.randn(states, channels, size, device=DEVICE)
    results = []
    for fn, kind in ((scan, None), (selective_scan_ref, torch.float64)):
        local = {
            name: None if value is None else (value.detach().to(kind) if kind else value.detach()).requires_grad_()
            for name, value in values.items()
        }
        y, final = fn(**local, **options, return_final_states=True)
        used = {name: value for name, value in local.items() if value is not None}
        grads = torch.autograd.grad(
            (y, final), list(used.values()), (grad_y.to(y.dtype), grad_final.to(final.dtype)), allow_unused=True
        )
        results.append({"y": y, "final": final, **{"d" + n: g for n, g in zip(used, grads, strict=True)}})
    errors = {}
    for name, want in results[1].items():
        have = results[0][name]
        if want is None or have is None:
            continue
        errors[name] = error(have, want)
    name, worst = max(errors.items(), key=lambda item: item[1])
    ok = worst <= TOLERANCE[dtype]
    RESULT.setdefault("gate", []).append({"case": label, "errors": errors, "ok": ok})
    if not ok:
        print(
            f"  FAIL {label}: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items() if not e <= TOLERANCE[dtype]),
            flush=True,
        )
    return ok, name, worst


SHARDS = 10


def gate():
    """All cases, spread over processes: most of the time is compilation."""
    started = time.time()
    code = "import sys; n=int(sys.argv[1]); sys.argv=['x']; import selective_scan_gpu as s; s.gate_shard(n)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n)],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(SHARDS)
    ]
    cases, failed = [], 0
    for n, process in enumerate(processes):
        out, err = process.communicate()
        lines = out.strip().splitlines()
        print("\n".join(line for line in lines if line.startswith("  ")), end="\n" if len(lines) > 1 else "")
        try:
            part = json.loads(lines[-1])
            cases += part["gate"]
            failed += part["failed"]
        except (IndexError, ValueError):
            failed += 1
            print(f"  FAIL shard {n}: {err[-500:]}", flush=True)
    RESULT["gate"], RESULT["gate_failed"] = cases, failed
    worst = {}
    for case in cases:
        for name, value in case["errors"].items():
            key = case["case"].split()[0]
            if key.startswith("torch."):
                worst[key] = max(worst.get(key, (0, "")), (value, name + " " + case["case"]))
    print(
        f"gate: {len(cases)} cases, {failed} failed, {time.time() - started:.0f} s; worst: "
        + "; ".join(f"{d} {e:.1e} ({n})" for d, (e, n) in worst.items()),
        flush=True,
    )


def gate_shard(shard):
    failed = 0
    shapes = [(2, 96, length) for length in (1, 2, 3, 63, 64, 65, 257, 700)]
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in shapes:
            cases.append((f"{dtype} {shape}", shape, dtype, {}, {}))
        cases.append((f"{dtype} groups init", (2, 96, 257), dtype, {"groups": 3}, {"init": True}))
        cases.append((f"{dtype} bare", (2, 96, 257), dtype, {}, {"bare": True}))
        cases.append((f"{dtype} seq_idx", (3, 96, 257), dtype, {}, {"seq": True, "init": True}))
        cases.append(
            (f"{dtype} cu_seqlens", (1, 96, 700), dtype, {}, {"cu": [0, 64, 64, 65, 300, 556, 700, 700], "init": True})
        )
        cases.append((f"{dtype} strided", (2, 96, 257), dtype, {}, {"strided": True}))
        cases.append((f"{dtype} trained", (1, 64, 2000), dtype, {"trained": True}, {"init": True}))
        cases.append((f"{dtype} no softplus", (2, 96, 130), dtype, {}, {"plain": True}))
    cases.append(("large dt", (2, 64, 257), torch.float32, {}, {"large": True}))
    for size in (1, 5, 8, 24, 64, 256):
        cases.append((f"N={size}", (1, 40, 130), torch.float32, {"size": size}, {"init": True}))
    cases.append(("unsplit", (8, 2048, 130), torch.float32, {}, {"init": True}))
    cases.append(("unsplit bf16", (8, 2048, 130), torch.bfloat16, {}, {}))
    cases.append(("L8192", (1, 32, 8192), torch.float32, {"trained": True}, {}))
    for label, (batch, channels, length), dtype, how, what in cases[shard::SHARDS]:
        values = operands(batch, channels, length, dtype=dtype, **how)
        options = {"n_states": batch}
        if what.get("cu"):
            options["cu_seqlens"] = torch.tensor(what["cu"], device=DEVICE, dtype=torch.int32)
            options["n_states"] = len(what["cu"]) - 1
        if what.get("init"):
            values["initial_states"] = torch.randn(options["n_states"], *values["A"].shape, device=DEVICE)
        if what.get("bare"):
            values |= {"D": None, "z": None, "dt_bias": None}
        if what.get("plain"):
            values |= {"dt": values["dt"].abs() * 0.3, "dt_bias": None}
            options["dt_softplus"] = False
        if what.get("large"):
            values["dt"] = (torch.rand_like(values["dt"]) - 0.5) * 40
        if what.get("seq"):
            idx = torch.randint(0, 40, (batch, length), device=DEVICE).eq(0).cumsum(1)
            options["seq_idx"] = torch.where(torch.rand(batch, length, device=DEVICE) < 0.1, -1, idx).to(torch.int32)
        if what.get("strided"):
            wide = torch.randn(batch, length, 3 * channels + 40, device=DEVICE).to(dtype)
            values |= {"x": wide[..., :channels], "z": wide[..., channels + 1 : 2 * channels + 1]}
            values["dt"] = torch.randn(batch, channels, length, device=DEVICE).to(dtype).transpose(1, 2)
            values |= {"B": wide[..., -40:-24], "C": wide[..., -17:-1]}
        try:
            ok, _, _ = compare(label, values, dtype, **options)
        except Exception as problem:
            ok = False
            print(f"  FAIL {label}: {type(problem).__name__} {str(problem)[:600]}", flush=True)
        failed += not ok
    if shard:
        print(json.dumps({"gate": RESULT.get("gate", []), "failed": failed}))
        return
    # the same bits every time
    values = operands(2, 256, 1000, grad=True)
    names = list(values)
    first = None
    for _ in range(10):
        y = scan(**values)
        grads = torch.autograd.grad(y.float().square().sum(), [values[n] for n in names])
        now = [y.detach(), *grads]
        if first is None:
            first = now
        elif not all(torch.equal(a, b) for a, b in zip(first, now, strict=True)):
            failed += 1
            print("  FAIL: not deterministic")
            break
    print(json.dumps({"gate": RESULT.get("gate", []), "failed": failed}))


def compiled():
    torch._dynamo.reset()
    values = operands(1, 128, 300, grad=True)
    fn = torch.compile(scan, fullgraph=True)
    y = fn(**values)
    y.float().square().sum().backward()
    got = [values[n].grad.clone() for n in values]
    for value in values.values():
        value.grad = None
    scan(**values).float().square().sum().backward()
    errors = [error(a, value.grad) for a, value in zip(got, values.values(), strict=True)]
    print(f"torch.compile(fullgraph): worst difference {max(errors):.1e}", flush=True)
    static = {n: v.detach() for n, v in values.items()}
    eager = scan(**static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scan(**static)
    captured.zero_()
    graph.replay()
    print("cuda graph equal:", torch.equal(captured, eager), flush=True)


def bench(fn, rep=60):
    return triton.testing.do_bench(fn, warmup=15, rep=rep, return_mode="median")


def inputs_of(values):
    return triton_scan._inputs(
        *[values.get(n) for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")], None, None, None, True
    )


def measure_forward(values):
    with torch.no_grad():
        detached = {n: v.detach() for n, v in values.items()}
        return bench(lambda: scan(**detached))


def measure_both(values):
    grad = torch.randn_like(values["x"])

    def step():
        for value in values.values():
            value.grad = None
        scan(**values).backward(grad)

    return bench(step)


def breakdown(values):
    from torch.profiler import ProfilerActivity, profile

    grad = torch.randn_like(values["x"])
    scan(**values).backward(grad)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(3):
            scan(**values).backward(grad)
        torch.cuda.synchronize()
    rows = sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:8]
    return {e.key[:40]: round(e.self_device_time_total / 3000, 3) for e in rows}


SETTINGS = (
    "FORWARD",
    "CHUNK_STATES",
    "UNSPLIT_PROGRAMS",
    "TARGET_PROGRAMS",
    "SHORTEST_CHUNK",
    "LONGEST_CHUNK",
    "FORWARD_REGISTER_STATES",
    "FORWARD_PARTS",
)


def apply(setting):
    for name, value in setting.items():
        module = backward if name == "BACKWARD" else forward
        setattr(module, name, forward.Tuning(*value) if isinstance(value, (tuple, list)) else value)


FORWARD_VARIANTS = {
    f"{'cut' if cut else 'whole'} {t}": {"FORWARD": t, "UNSPLIT_PROGRAMS": 10**9 if cut else 0}
    for cut in (False, True)
    for t in ((32, 8), (32, 4), (64, 4), (64, 8), (32, 8, 128), (32, 4, 96), (64, 4, 128))
    if not (not cut and len(t) == 3)
}
FORWARD_VARIANTS |= {
    "cut n4 (64, 8)": {"FORWARD": (64, 8), "UNSPLIT_PROGRAMS": 10**9, "FORWARD_REGISTER_STATES": 1},
    "cut n4 (64, 4)": {"FORWARD": (64, 4), "UNSPLIT_PROGRAMS": 10**9, "FORWARD_REGISTER_STATES": 1},
    "whole n4 (32, 8)": {"FORWARD": (32, 8), "UNSPLIT_PROGRAMS": 0, "FORWARD_REGISTER_STATES": 1},
}
CHUNK_VARIANTS = {f"chunk {t}": {"CHUNK_STATES": t} for t in ((64, 8), (64, 4), (32, 8), (32, 4), (64, 8, 128))}
BACKWARD_VARIANTS = {
    f"bwd {t}": {"BACKWARD": t} for t in ((64, 8), (64, 4), (32, 8), (128, 4), (64, 4, 168), (64, 8, 168))
}


def warm(setting):
    """Compile one setting; run in a process of its own, so that many compile at once into the same cache."""
    apply(setting)
    values = operands(1, 256, 600, grad=True)
    scan(**values).backward(torch.randn_like(values["x"]))
    with torch.no_grad():
        scan(**{n: v.detach() for n, v in values.items()})
    torch.cuda.synchronize()


def warm_all(settings):
    started = time.time()
    pending, running = list(settings), []
    while pending or running:
        while pending and len(running) < 12:
            code = f"import sys; sys.argv=['x']; import selective_scan_gpu as s; s.warm({pending.pop()!r})"
            running.append(
                subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.PIPE)
            )
        for process in list(running):
            if process.poll() is not None:
                running.remove(process)
                if process.returncode:
                    print("warm failed:", process.stderr.read().decode()[-400:], flush=True)
        time.sleep(0.1)
    print(f"compiled {len(settings)} settings in {time.time() - started:.0f} s", flush=True)


def variants():
    base = {n: getattr(forward, n) for n in SETTINGS} | {"BACKWARD": backward.BACKWARD}
    warm_all([*FORWARD_VARIANTS.values(), *CHUNK_VARIANTS.values(), *BACKWARD_VARIANTS.values()])
    table = RESULT.setdefault("variants", {})
    for row, (batch, channels, length) in ROWS.items():
        values = operands(batch, channels, length, grad=True, seed=1)
        for name, setting in FORWARD_VARIANTS.items():
            if length > 8192 and name.startswith("whole"):
                continue
            apply(base)
            apply(setting)
            try:
                table[f"{row} | fwd {name}"] = measure_forward(values)
            except Exception as problem:
                table[f"{row} | fwd {name}"] = str(problem)[:100]
        for chunk in (128, 256, 512, 1024):
            apply(base)
            apply({"UNSPLIT_PROGRAMS": 10**9, "SHORTEST_CHUNK": chunk, "LONGEST_CHUNK": chunk})
            table[f"{row} | fwd cut, chunk {chunk}"] = measure_forward(values)
        for name, setting in CHUNK_VARIANTS.items():
            apply(base)
            apply(setting)
            inputs = inputs_of({n: v.detach() for n, v in values.items()})
            plan = forward.plan_of(inputs)
            if plan.n_chunks > 1:
                table[f"{row} | states {name}"] = bench(partial(forward.launch_chain, inputs, plan, None, None))
        for name, setting in BACKWARD_VARIANTS.items():
            apply(base)
            apply(setting)
            inputs = inputs_of({n: v.detach() for n, v in values.items()})
            plan = forward.plan_of(inputs)
            _, _, _, starts = forward.scan_forward(inputs, plan, True, False)
            grad = torch.randn_like(values["x"])
            try:
                table[f"{row} | {name}"] = bench(
                    partial(backward.scan_backward, inputs, plan, None, starts, grad, None), 40
                )
            except Exception as problem:
                table[f"{row} | {name}"] = str(problem)[:100]
        apply(base)
        del values
        torch.cuda.empty_cache()


def rows():
    lines = []
    for trained in (False, True):
        for row, (batch, channels, length) in ROWS.items():
            values = operands(batch, channels, length, trained=trained, grad=True, seed=2)
            torch.cuda.reset_peak_memory_stats()
            f, b = measure_forward(values), measure_both(values)
            peak = torch.cuda.max_memory_allocated() / 2**30
            parts = breakdown(values)
            RESULT.setdefault("rows", {})[f"{row} {'trained' if trained else 'random'}"] = {
                "fwd": f,
                "both": b,
                "peak": peak,
                "kernels": parts,
            }
            goal = TARGETS[row]
            lines.append(
                f"{row:17s} {'trained' if trained else 'random ':7s} fwd {f:.3f} (<= {goal[0]}) both {b:.3f} (<= {goal[1]}) peak {peak:.1f} GiB {parts}"
            )
            del values
    for shape in ((1, 1536, 512), (1, 1536, 64)):
        values = operands(*shape, grad=True)
        lines.append(f"launch-bound {shape}: fwd {measure_forward(values):.3f} both {measure_both(values):.3f}")
    return lines


def first_call():
    code = (
        "import time,sys; sys.argv=['x']; import selective_scan_gpu as s, torch; torch.zeros(1, device='cuda'); t=time.time();"
        "v=s.operands(1,256,600,grad=True);"
        "d={n:x.detach() for n,x in v.items()}; t=time.time(); s.scan(**d); torch.cuda.synchronize(); f=time.time()-t;"
        "t=time.time(); s.scan(**v).backward(torch.randn_like(v['x'])); torch.cuda.synchronize(); print(f'first call: fwd {f:.1f} s, then fwd+bwd {time.time()-t:.1f} s')"
    )
    env = os.environ | {"TRITON_CACHE_DIR": f"/tmp/empty-{time.time()}"}
    print(
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True
        ).stdout.strip()
    )


def main():
    parser = argparse.ArgumentParser()
    for flag in ("gate", "variants", "first-call", "rows", "compile"):
        parser.add_argument(f"--{flag}", action="store_true")
    arguments = parser.parse_args()
    everything = not any(vars(arguments).values())
    torch.backends.cuda.matmul.allow_tf32 = False
    lines = []
    try:
        if arguments.first_call or everything:
            first_call()
        if arguments.gate or everything:
            gate()
        if arguments.compile or everything:
            try:
                compiled()
            except Exception as problem:
                print("compile/graph FAIL", type(problem).__name__, str(problem)[-800:], flush=True)
        if arguments.variants or everything:
            variants()
        if arguments.rows or everything:
            lines = rows()
    finally:
        RESULT["device"] = torch.cuda.get_device_name()
        RESULT["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
        (OUT / "selective_scan.json").write_text(json.dumps(RESULT, indent=1))
    print(
        "\n".join(
            f"{name:58s} {value if isinstance(value, str) else f'{value:.3f}'}"
            for name, value in RESULT.get("variants", {}).items()
        )
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
