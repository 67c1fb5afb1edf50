"""fp64 oracle of the causal convolution: one window at a time, differentiable by autograd."""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["causal_conv1d_ref"]


def _convolve_row(
    x: Tensor, weight: Tensor, bias: Tensor, context: Tensor, numbers: list[int]
) -> tuple[Tensor, Tensor]:
    """One row: x (L, D), weight (D, W), bias (D,), context (W - 1, D); returns y before activation and the last inputs."""
    zero = torch.zeros_like(bias)
    window = list(context)
    # the window after the last real token; padding behind it is not part of the sequence
    last_window = window
    outputs = []
    previous: int | None = None
    for token, number in zip(x, numbers, strict=True):
        if number >= 0 and previous is not None and number != previous:
            window = [zero] * len(window)
        window = [*window, zero if number < 0 else token]
        if number < 0:
            outputs.append(zero)
        else:
            outputs.append(bias + sum(weight[:, k] * value for k, value in enumerate(window)))
            previous = number
        window = window[1:]
        if number >= 0:
            last_window = window
    y = torch.stack(outputs) if outputs else x
    return y, torch.stack(last_window) if last_window else context


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` in fp64; results in x.dtype."""
    width = x.shape[2]
    taps = weight.shape[1]
    if cu_seqlens is None:
        rows = list(x.double())
    else:
        bounds = cu_seqlens.tolist()
        rows = [x[0, start:end].double() for start, end in pairwise(bounds)]
    if initial_states is None:
        initial_states = x.new_zeros(len(rows), width, taps - 1)
    offset = x.new_zeros(width).double() if bias is None else bias.double()
    ys, states = [], []
    for i, row in enumerate(rows):
        numbers = [0] * len(row) if seq_idx is None else seq_idx[i].tolist()
        y, state = _convolve_row(row, weight.double(), offset, initial_states[i].double().T, numbers)
        if activation is not None:
            y = y * torch.sigmoid(y)
        if seq_idx is not None:
            # silu(0) is 0 already; this also keeps the gradient of padding at zero
            y = torch.where(seq_idx[i, :, None] >= 0, y, 0.0)
        ys.append(y)
        states.append(state.T)
    out = torch.cat(ys)[None] if cu_seqlens is not None else torch.stack(ys) if ys else x.double()
    out = out.to(x.dtype)
    if not return_final_states:
        return out
    final = torch.stack(states) if states else initial_states.double()
    return out, final.to(x.dtype)
