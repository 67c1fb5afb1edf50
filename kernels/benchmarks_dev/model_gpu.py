"""A whole Mamba model on the GPU against the same weights on the CPU: logits, gradients, generation, training speed."""

import time

import torch

import hf_mamba

torch.manual_seed(0)
config = hf_mamba.MambaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=4)
cpu = hf_mamba.MambaForCausalLM(config)
gpu = hf_mamba.MambaForCausalLM(config).cuda()
gpu.load_state_dict(cpu.state_dict())
ids = torch.randint(3, 512, (2, 300))
losses = [model(tokens, labels=tokens).loss for model, tokens in ((cpu, ids), (gpu, ids.cuda()))]
for loss in losses:
    loss.backward()
worst = max(
    ((g.grad.cpu() - c.grad).abs().max() / c.grad.abs().max().clamp(min=1e-12)).item()
    for c, g in zip(cpu.parameters(), gpu.parameters(), strict=True)
)
print("loss", [loss.item() for loss in losses], "worst gradient, relative", worst)
cpu.eval()
gpu.eval()
mask = torch.ones_like(ids)
mask[0, :40] = 0
a, b = (
    m.generate(i, attention_mask=k, max_new_tokens=32, do_sample=False, eos_token_id=None)
    for m, i, k in ((cpu, ids, mask), (gpu, ids.cuda(), mask.cuda()))
)
print("generation equal", torch.equal(a, b.cpu()))
model = hf_mamba.MambaForCausalLM(hf_mamba.MambaConfig(hidden_size=768, num_hidden_layers=24)).cuda().bfloat16()
tokens = torch.randint(3, 50000, (8, 2048), device="cuda")
for _ in range(4):
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(tokens, labels=tokens).loss.backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
peak = torch.cuda.max_memory_allocated() / 2**30
print(f"mamba-130m B8 L2048 bf16: {tokens.numel() / seconds:.0f} tokens/s, peak {peak:.1f} GiB")
model.eval()
with torch.no_grad():
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(tokens[:1], logits_to_keep=1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    print(f"prefill 2048: {seconds * 1e3:.1f} ms")
compiled = torch.compile(gpu, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    print(
        "compiled",
        (compiled(ids.cuda(), use_cache=False).logits - gpu(ids.cuda(), use_cache=False).logits).abs().max().item(),
    )
