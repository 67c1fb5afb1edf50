"""32 steps on a small model: every implementation of the ops has the losses and the weights of the fp64 reference."""

import pytest
import torch
from torch import nn

from mamba_kernels import backend

from .models.builders import make_model, random_ids

STEPS = 32
KINDS = pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "moe_mamba"])


def train(kind: str, implementation: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    """Losses of 32 AdamW steps on four batches in turn, and the weights they end with; bf16 by autocast."""
    model = make_model(kind).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    with backend(implementation):
        for step in range(STEPS):
            ids = random_ids(2, 24, seed=step % 4).to(device)
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(ids, labels=ids, skip_logits=True).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses), {name: p.detach().cpu() for name, p in model.named_parameters()}


def assert_same_run(actual: tuple, expected: tuple, tolerance: float) -> None:
    assert expected[0][-4:].mean() < 0.9 * expected[0][:4].mean()
    assert ((actual[0] - expected[0]).abs() <= tolerance * expected[0]).all()
    for name, weight in expected[1].items():
        assert (actual[1][name] - weight).norm() <= 10 * tolerance * weight.norm(), name


@KINDS
def test_eager_ops_converge_as_the_reference(kind: str) -> None:
    assert_same_run(train(kind, "eager"), train(kind, "reference"), tolerance=1e-4)


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triton_ops_converge_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    expected = train(kind, "reference", "cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert_same_run(train(kind, "triton", "cuda", dtype), expected, tolerance)
