"""Peak memory and time of the loss: with the logits of the whole batch, and a part of them at a time.

    python -m benchmarks.loss_memory --tokens 4096 --vocabulary 50280

Head and cross-entropy alone, forward and backward, on a CPU. Memory is what torch's profiler saw allocated at once, without the
inputs and weights that are there before.
"""

from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import table_console
from hf_mamba.layers.loss import chunked_cross_entropy

__all__ = ["loss_memory"]


def whole(head: nn.Module, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """The loss as transformers computes it."""
    return F.cross_entropy(head(hidden_states).float(), targets)


def measure(loss, head: nn.Module, hidden_states: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """Peak MB, seconds and the norm of the input's gradient."""
    hidden_states.grad = None
    head.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss(head, hidden_states, targets).backward()
    present = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            present += event.nbytes()
            peak = max(peak, present)
    started = min(event.start_ns() for event in record.profiler.kineto_results.events())
    ended = max(event.end_ns() for event in record.profiler.kineto_results.events())
    assert hidden_states.grad is not None
    return peak / 1e6, (ended - started) / 1e9, hidden_states.grad.float().norm().item()


def loss_memory(
    tokens: Annotated[int, typer.Option(help="Tokens of the batch.")] = 4096,
    width: Annotated[int, typer.Option(help="Model width.")] = 768,
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 50280,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
) -> None:
    """Print a row for each way to compute the loss."""
    torch.manual_seed(0)
    precision = getattr(torch, dtype)
    head = nn.Linear(width, vocabulary, bias=False, dtype=precision)
    hidden_states = torch.randn(tokens, width, dtype=precision, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    table = Table("loss", "peak MB", "seconds", "norm of the gradient")
    for name, loss in (("logits of the whole batch", whole), ("skip_logits", chunked_cross_entropy)):
        peak, seconds, norm = measure(loss, head, hidden_states, targets)
        table.add_row(name, f"{peak:,.0f}", f"{seconds:.1f}", f"{norm:.5f}")
    table_console().print(table)


if __name__ == "__main__":
    typer.run(loss_memory)
