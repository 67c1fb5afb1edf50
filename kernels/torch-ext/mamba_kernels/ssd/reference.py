"""fp64 oracle of the SSD scan: the recurrence, token by token, differentiable by autograd."""

import math
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["ssd_chunk_scan_ref"]


def _softplus(value: Tensor) -> Tensor:
    # the inner clamp keeps the branch that is not taken from overflowing, also in the gradient
    return torch.where(value > 20, value, torch.log1p(torch.exp(value.clamp(max=20))))


def _scan_row(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, numbers: list[int]
) -> tuple[Tensor, Tensor]:
    """One row: x (L, H, P), dt (L, H) after softplus, A (H,), B, C (L, H, N), state (H, P, N)."""
    outputs = []
    previous: int | None = None
    for t, number in enumerate(numbers):
        if number < 0:
            outputs.append(torch.zeros_like(x[t]))
            continue
        if previous is not None and number != previous:
            state = torch.zeros_like(state)
        previous = number
        decay = torch.exp(dt[t] * A)[:, None, None]
        state = decay * state + (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None, :]
        outputs.append((state * C[t, :, None, :]).sum(dim=-1))
    return torch.stack(outputs) if outputs else x, state


def ssd_chunk_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_chunk_scan` in fp64; y in x.dtype, final states in fp32 (fp64 for fp64 `x`). `chunk_size` plays no part."""
    heads, head_dim = x.shape[2:]
    step = dt.double() if dt_bias is None else dt.double() + dt_bias.double()
    if dt_softplus:
        step = _softplus(step)
    step = step.clamp(*dt_limit)
    x64, A64 = x.double(), A.double()
    B64, C64 = (value.double().repeat_interleave(heads // B.shape[2], dim=2) for value in (B, C))
    if cu_seqlens is None:
        slices = [(row, 0, x.shape[1]) for row in range(x.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        slices = [(0, start, end) for start, end in pairwise(bounds)]
    ys, states = [], []
    for i, (row, start, end) in enumerate(slices):
        if initial_states is None:
            state = torch.zeros(heads, head_dim, B.shape[3], dtype=torch.float64, device=x.device)
        else:
            state = initial_states[i].double()
        numbers = [0] * (end - start) if seq_idx is None else seq_idx[row].tolist()
        part = slice(start, end)
        y, state = _scan_row(x64[row, part], step[row, part], A64, B64[row, part], C64[row, part], state, numbers)
        ys.append(y)
        states.append(state)
    out = torch.cat(ys)[None] if cu_seqlens is not None else torch.stack(ys) if ys else x64
    if D is not None:
        out = out + x64 * (D.double() if D.dim() == 2 else D.double()[:, None])
    if z is not None:
        out = out * (z.double() * torch.sigmoid(z.double()))
    if seq_idx is not None:
        out = torch.where(seq_idx[..., None, None] >= 0, out, 0.0)
    out = out.to(x.dtype)
    if not return_final_states:
        return out
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    final = torch.stack(states) if states else x64.new_zeros(0, heads, head_dim, B.shape[3])
    return out, final.to(dtype)
