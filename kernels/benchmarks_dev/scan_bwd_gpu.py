import importlib, itertools, sys, time, torch
T = importlib.import_module("mamba_kernels.selective_scan.triton_scan"); F = importlib.import_module("mamba_kernels.selective_scan.triton_forward"); K = importlib.import_module("mamba_kernels.selective_scan.triton_backward")
from mamba_kernels.selective_scan.eager import selective_scan_eager
ROWS = {"B8": (8, 2048, 2048), "B1L8": (1, 8192, 5120), "B1L64": (1, 65536, 1536)}
def inputs(b, l, d, n=16, dtype=torch.bfloat16):
    r = lambda *s: torch.randn(*s, device="cuda")
    o = dict(x=r(b, l, d).to(dtype), dt=r(b, l, d).to(dtype), A=-torch.rand(d, n, device="cuda") * 16, B=r(b, l, n).to(dtype), C=r(b, l, n).to(dtype), D=r(d), z=r(b, l, d).to(dtype), dt_bias=r(d) - 4)
    return {k: v.requires_grad_() for k, v in o.items()}
def grads(fn, o, w):
    y = fn(**o); return dict(zip(["y", *o], [y.detach(), *torch.autograd.grad(y, list(o.values()), w.to(y.dtype))]))
def gate(dtype):
    o = inputs(2, 300, 96, dtype=dtype); w = torch.randn(2, 300, 96, device="cuda").to(dtype)
    a = grads(T.selective_scan_triton, o, w); e = grads(selective_scan_eager, {k: v.detach().double().requires_grad_() for k, v in o.items()}, w)
    err = {k: float((a[k].double() - e[k]).square().mean().sqrt() / e[k].square().mean().sqrt()) for k in e}
    return max(err.values()), max(err, key=err.get)
def kernels(row, n=3):
    o = inputs(*ROWS[row]); w = torch.randn_like(o["x"])
    f = lambda: grads(T.selective_scan_triton, o, w)
    f(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(n): f()
        torch.cuda.synchronize()
    out = {e.key[:28]: round(e.self_device_time_total / n / 1000, 3) for e in p.key_averages() if e.self_device_time_total / n > 20}
    return round(sum(out.values()), 3), out
base = (K.BACKWARD, K.SWEEP)
for dt in (torch.float32, torch.bfloat16, torch.float16): print("gate", dt, gate(dt), flush=True)
U = F.Tuning
for label, bw, sw in [("64,8 s64,4", U(64, 8), U(64, 4)), ("32,8 s64,4", U(32, 8), U(64, 4)), ("32,8,168", U(32, 8, 168), U(64, 4)), ("32,8,128 s32,4", U(32, 8, 128), U(32, 4)), ("64,4 s64,4", U(64, 4), U(64, 4)), ("64,4,168 s64,2", U(64, 4, 168), U(64, 2)), ("32,16", U(32, 16), U(64, 8)), ("64,8,168", U(64, 8, 168), U(32, 8))]:
    K.BACKWARD, K.SWEEP = bw, sw
    try:
        t = time.time(); g = gate(torch.bfloat16); c = time.time() - t
        print(label, "gate", f"{g[0]:.1e}", g[1], f"{c:.1f}s", *[f"\n   {r} {kernels(r)}" for r in ROWS], flush=True)
    except Exception as e: print(label, repr(e)[:300], flush=True)
