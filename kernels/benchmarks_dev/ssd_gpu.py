import argparse, importlib, json, os, sys, time, math
import torch
C = importlib.import_module("mamba_kernels.ssd.triton_common")
S = importlib.import_module("mamba_kernels.ssd.triton_states")
F = importlib.import_module("mamba_kernels.ssd.triton_forward")
PJ = importlib.import_module("mamba_kernels.ssd.triton_projections")
I = importlib.import_module("mamba_kernels.ssd.triton_inputs")
W = importlib.import_module("mamba_kernels.ssd.triton_backward")
T = importlib.import_module("mamba_kernels.ssd.triton_scan")
from mamba_kernels.ssd.eager import ssd_chunk_scan_eager
ROWS = {"B8L2048H32": (8, 2048, 32, 64, 1, 128), "B1L8192H80": (1, 8192, 80, 64, 1, 128), "B1L65536H24": (1, 65536, 24, 64, 1, 128),
        "codestral": (8, 2048, 128, 64, 8, 128), "B1L512H24": (1, 512, 24, 64, 1, 128)}
def inputs(b, l, h, p, g, n, dtype=torch.bfloat16, z=False, D=1, bias=True, init=False, grad=True, scale=1.0):
    r = lambda *s: torch.randn(*s, device="cuda")
    xBC = r(b, l, h * p + 2 * g * n).to(dtype)
    x, B, Cc = xBC[..., :h*p].unflatten(-1, (h, p)), xBC[..., h*p:h*p+g*n].unflatten(-1, (g, n)), xBC[..., h*p+g*n:].unflatten(-1, (g, n))
    ops = dict(x=x, dt=(r(b, l, h) * scale).to(dtype), A=-torch.rand(h, device="cuda") * 2, B=B, C=Cc, D=None if not D else r(h) if D == 1 else r(h, p),
               z=r(b, l, h, p).to(dtype) if z else None, dt_bias=r(h) - 2 if bias else None, initial_states=r(b, h, p, n) if init else None)
    return {k: None if v is None else v.detach().requires_grad_(grad) for k, v in ops.items()}
def run(fn, ops, wy, wf, **kw):
    y, f = fn(**ops, **kw, return_final_states=True)
    names = [k for k, v in ops.items() if v is not None]
    g = torch.autograd.grad([y, f], [ops[k] for k in names], [wy.to(y.dtype), wf.to(f.dtype)])
    return {"y": y, "f": f, **dict(zip(names, g))}
def check(name, shape, dtype=torch.bfloat16, seq=False, cu=None, limit=(0.0, math.inf), **k):
    b, l, h, p, g, n = shape
    ops = inputs(*shape, dtype=dtype, init=True, **k)
    kw = dict(dt_limit=limit)
    ns = b
    if seq:
        s = torch.randint(0, 60, (b, l), device="cuda").eq(0).cumsum(1)
        kw["seq_idx"] = torch.where(torch.rand(b, l, device="cuda") < 0.1, -1, s)
    if cu:
        kw["cu_seqlens"] = torch.tensor(cu, device="cuda", dtype=torch.int32); ns = len(cu) - 1
        ops["initial_states"] = torch.randn(ns, h, p, n, device="cuda").requires_grad_()
    wy, wf = torch.randn(b, l, h, p, device="cuda").to(dtype), torch.randn(ns, h, p, n, device="cuda")
    a = run(T.ssd_chunk_scan_triton, ops, wy, wf, **kw)
    o64 = {k_: None if v is None else v.detach().double().requires_grad_() for k_, v in ops.items()}
    e = run(ssd_chunk_scan_eager, o64, wy, wf, **kw)
    errs = {q: float((a[q].detach().double() - e[q]).square().mean().sqrt() / e[q].square().mean().sqrt().clamp(min=1e-30)) for q in e}
    tol = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}[dtype]
    bad = {q: f"{v:.1e}" for q, v in errs.items() if not v <= tol}
    print("OK " if not bad else "BAD", name, str(dtype)[6:], f"{max(errs.values()):.1e}", bad, flush=True)
    return not bad
def timeit(fn, n=30):
    for _ in range(3): fn()
    torch.cuda.synchronize()
    flush = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    ev = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(n)]
    for s, e in ev:
        flush.zero_(); s.record(); fn(); e.record()
    torch.cuda.synchronize()
    return sorted(s.elapsed_time(e) for s, e in ev)[n // 2]
def bench(rows, label, modes=("fwd", "fwdbwd")):
    out = {}
    for r in rows:
        try:
            ops = inputs(*ROWS[r]); wy = torch.randn_like(ops["x"])
            if "fwd" in modes:
                def f():
                    with torch.no_grad(): T.ssd_chunk_scan_triton(**ops)
                out[r + " fwd"] = timeit(f)
            if "fwdbwd" in modes:
                names = [k for k, v in ops.items() if v is not None]
                def fb(): torch.autograd.grad(T.ssd_chunk_scan_triton(**ops), [ops[k] for k in names], wy)
                out[r + " f+b"] = timeit(fb)
        except Exception as e:
            out[r] = repr(e)[:200]
    print(label, {k: round(v, 3) if isinstance(v, float) else v for k, v in out.items()}, flush=True)
    return out
def profile(r):
    ops = inputs(*ROWS[r]); wy = torch.randn_like(ops["x"]); names = [k for k, v in ops.items() if v is not None]
    fb = lambda: torch.autograd.grad(T.ssd_chunk_scan_triton(**ops), [ops[k] for k in names], wy)
    fb(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(5): fb()
        torch.cuda.synchronize()
    for e in sorted(p.key_averages(), key=lambda e: -e.self_device_time_total)[:4]:
        if e.self_device_time_total: print(f"   {r} {e.key[:30]:30s} {e.self_device_time_total / 5000:.4f} ms x{e.count // 5}", flush=True)
if __name__ == "__main__":
    ap = argparse.ArgumentParser(); ap.add_argument("--gate", action="store_true"); ap.add_argument("--full-gate", action="store_true"); ap.add_argument("--sweep", action="store_true"); ap.add_argument("--profile", action="store_true")
    a = ap.parse_args(); torch.manual_seed(0); results = {}
    t = time.time(); ops = inputs(1, 512, 24, 64, 1, 128); y = T.ssd_chunk_scan_triton(**ops); torch.cuda.synchronize(); print("first fwd", time.time() - t)
    y.sum().backward(); torch.cuda.synchronize(); print("first fwd+bwd", time.time() - t, flush=True)
    ok = True
    for dt in (torch.bfloat16, torch.float32, torch.float16) if a.gate or a.full_gate else ():
        ok &= check("plain", (2, 300, 4, 64, 2, 128), dt)
        if a.full_gate or dt == torch.float32:
            ok &= check("split", (1, 4000, 4, 64, 1, 128), dt, z=True)
            ok &= check("odd", (2, 257, 6, 40, 3, 24), dt, z=True, D=2, limit=(0.01, 1.0))
            ok &= check("seq", (2, 600, 4, 64, 1, 64), dt, seq=True)
            ok &= check("cu", (1, 700, 4, 32, 1, 64), dt, cu=[0, 0, 64, 65, 300, 700, 700])
            ok &= check("big dt", (2, 257, 4, 64, 1, 128), dt, scale=20.0)
            ok &= check("N256", (1, 200, 2, 128, 1, 256), dt)
    print("gate", "green" if ok else "RED")
    results["base"] = bench(ROWS, "base")
    if a.profile:
        for r in ("B8L2048H32", "B1L65536H24", "B1L512H24", "codestral"): profile(r)
    if a.sweep:
        some = ["B8L2048H32", "B1L65536H24", "B1L512H24"]
        T_ = C.Tuning
        for label, sets in {
            "proj 4,1": [(PJ, "PROJECTIONS", T_(4, 1))], "proj 4,2": [(PJ, "PROJECTIONS", T_(4, 2))], "proj 8,1": [(PJ, "PROJECTIONS", T_(8, 1))], "proj 8,3": [(PJ, "PROJECTIONS", T_(8, 3))],
            "proj NS64 4,2": [(PJ, "PROJECTIONS", T_(4, 2)), (PJ, "LARGEST_PART", 64)], "proj NS64 8,2": [(PJ, "PROJECTIONS", T_(8, 2)), (PJ, "LARGEST_PART", 64)],
            "proj target 528": [(PJ, "TARGET_PROGRAMS", 528)], "proj target 1056": [(PJ, "TARGET_PROGRAMS", 1056)],
            "in heads 1": [(I, "HEADS_OF_PROGRAM", 1)], "in heads 8": [(I, "HEADS_OF_PROGRAM", 8)], "in 4,2": [(I, "INPUTS", T_(4, 2))], "in 8,1": [(I, "INPUTS", T_(8, 1))], "in 8,2": [(I, "INPUTS", T_(8, 2))], "in 4,2 heads 16": [(I, "INPUTS", T_(4, 2)), (I, "HEADS_OF_PROGRAM", 16)],
            "states 4,3": [(S, "STATES", T_(4, 3))], "states 4,1": [(S, "STATES", T_(4, 1))], "states 8,2": [(S, "STATES", T_(8, 2))],
        }.items():
            old = [(m, n, getattr(m, n)) for m, n, _ in sets]
            for m, n, v in sets: setattr(m, n, v)
            print(label); 
            try:
                for r in some[:2]: profile(r)
            except Exception as e: print(repr(e)[:200])
            for m, n, v in old: setattr(m, n, v)
    json.dump(results, open(os.path.join(os.environ.get("OUT", "."), "ssd.json"), "w"))
