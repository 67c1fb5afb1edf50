"""The oracle of `selective_scan`: the recurrence written out token by token in fp64. For tests, never for speed."""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["selective_scan_ref"]


def selective_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` as Algorithm 2 of Mamba (arXiv 2312.00752) states it, one token after the other, in fp64.

    Arguments, results and gradients are those of `selective_scan`; autograd differentiates the loop.
    """
    if cu_seqlens is not None:
        return _one_sequence_after_the_other(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_states, cu_seqlens, return_final_states
        )
    batch, length, channels = x.shape
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y_dtype = x.dtype

    delta = dt.double() if dt_bias is None else dt.double() + dt_bias.double()
    if dt_softplus:
        # log1p(exp v) keeps its digits for very negative v; above the threshold it equals v
        delta = torch.where(delta > 20, delta, torch.log1p(torch.exp(delta.clamp(max=20))))
    x, A, B, C = x.double(), A.double(), B.double(), C.double()
    if B.dim() == 4:
        # channel d belongs to group d // (channels / groups)
        B = B.repeat_interleave(channels // B.shape[2], dim=2)
        C = C.repeat_interleave(channels // C.shape[2], dim=2)
    else:
        B, C = B.unsqueeze(2), C.unsqueeze(2)

    h = x.new_zeros(batch, channels, A.shape[1]) if initial_states is None else initial_states.double()
    # the sequence each row is in; -1 until its first real token
    current = torch.full((batch,), -1, device=x.device)
    outputs = []
    for t in range(length):
        h_before = h
        if seq_idx is not None:
            real = seq_idx[:, t] >= 0
            new_sequence = real & (current >= 0) & (seq_idx[:, t] != current)
            current = torch.where(real, seq_idx[:, t], current)
            h = torch.where(new_sequence[:, None, None], 0.0, h)
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + delta[:, t, :, None] * B[:, t] * x[:, t, :, None]
        y = (C[:, t] * h).sum(-1)
        if D is not None:
            y = y + D.double() * x[:, t]
        if z is not None:
            y = y * torch.nn.functional.silu(z[:, t].double())
        if seq_idx is not None:
            h = torch.where(real[:, None, None], h, h_before)
            y = torch.where(real[:, None], y, 0.0)
        outputs.append(y)
    y = torch.stack(outputs, dim=1) if outputs else x.new_zeros(batch, 0, channels)
    return (y.to(y_dtype), h.to(state_dtype)) if return_final_states else y.to(y_dtype)


def _one_sequence_after_the_other(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_states: Tensor | None,
    cu_seqlens: Tensor,
    return_final_states: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cut the packed row at `cu_seqlens` and run every sequence by itself."""
    ys, states = [], []
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        y, state = selective_scan_ref(
            x[:, start:end],
            dt[:, start:end],
            A,
            B[:, start:end],
            C[:, start:end],
            D=D,
            z=None if z is None else z[:, start:end],
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_states=None if initial_states is None else initial_states[i : i + 1],
            return_final_states=True,
        )
        ys.append(y)
        states.append(state)
    y = torch.cat(ys, dim=1)
    return (y, torch.cat(states)) if return_final_states else y
