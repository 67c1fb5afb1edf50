"""The oracles of the state updates: one batch entry and one token at a time, in fp64. For tests, never for speed."""

import torch
from torch import Tensor

__all__ = ["causal_conv1d_update_ref", "selective_state_update_ref", "ssd_state_update_ref"]


def _row_of(entry: int, state_indices: Tensor | None) -> int:
    return entry if state_indices is None else int(state_indices[entry])


def _softplus(value: Tensor) -> Tensor:
    return torch.where(value > 20, value, torch.log1p(torch.exp(value.clamp(max=20))))


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    state_indices: Tensor | None = None,
    return_step_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_state_update`, Algorithm 2 of Mamba (arXiv 2312.00752) for one token after the other."""
    if x.dim() == 2:
        result = selective_state_update_ref(
            state,
            x[:, None],
            dt[:, None],
            A,
            B[:, None],
            C[:, None],
            D=D,
            z=None if z is None else z[:, None],
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            state_indices=state_indices,
            return_step_states=return_step_states,
        )
        return (result[0][:, 0], result[1][:, 0]) if isinstance(result, tuple) else result[:, 0]
    batch, tokens, channels = x.shape
    y = torch.zeros_like(x)
    step_states = state.new_zeros(batch, tokens, *state.shape[1:])
    for entry in range(batch):
        row = _row_of(entry, state_indices)
        if row < 0:
            continue
        h = state[row].double()
        for t in range(tokens):
            delta = dt[entry, t].double()
            if dt_bias is not None:
                delta = delta + dt_bias.double()
            if dt_softplus:
                delta = _softplus(delta)
            # (G, N) → (D, N): channel d belongs to group d // (D / G)
            b, c = (value[entry, t].double().view(-1, A.shape[1]) for value in (B, C))
            b, c = (value.repeat_interleave(channels // value.shape[0], dim=0) for value in (b, c))
            u = x[entry, t].double()
            h = torch.exp(delta[:, None] * A.double()) * h + (delta * u)[:, None] * b
            out = (c * h).sum(-1)
            if D is not None:
                out = out + D.double() * u
            if z is not None:
                out = out * torch.nn.functional.silu(z[entry, t].double())
            y[entry, t] = out
            step_states[entry, t] = h
        state[row] = h
    return (y, step_states) if return_step_states else y


def ssd_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state_indices: Tensor | None = None,
    return_step_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ssd_state_update`, the recurrence of Mamba-2 (arXiv 2405.21060, section 3) head by head."""
    if x.dim() == 3:
        result = ssd_state_update_ref(
            state,
            x[:, None],
            dt[:, None],
            A,
            B[:, None],
            C[:, None],
            D=D,
            z=None if z is None else z[:, None],
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            state_indices=state_indices,
            return_step_states=return_step_states,
        )
        return (result[0][:, 0], result[1][:, 0]) if isinstance(result, tuple) else result[:, 0]
    batch, tokens, heads, _ = x.shape
    heads_per_group = heads // B.shape[2]
    y = torch.zeros_like(x)
    step_states = state.new_zeros(batch, tokens, *state.shape[1:])
    for entry in range(batch):
        row = _row_of(entry, state_indices)
        if row < 0:
            continue
        for head in range(heads):
            h = state[row, head].double()
            for t in range(tokens):
                delta = dt[entry, t, head].double()
                if dt_bias is not None:
                    delta = delta + dt_bias[head].double()
                if dt_softplus:
                    delta = _softplus(delta)
                delta = delta.clamp(*dt_limit)
                b, c = (value[entry, t, head // heads_per_group].double() for value in (B, C))
                u = x[entry, t, head].double()
                h = torch.exp(delta * A[head].double()) * h + delta * torch.outer(u, b)
                out = h @ c
                if D is not None:
                    out = out + D[head].double() * u
                if z is not None:
                    out = out * torch.nn.functional.silu(z[entry, t, head].double())
                y[entry, t, head] = out
                step_states[entry, t, head] = h
            state[row, head] = h
    return (y, step_states) if return_step_states else y


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` as a shift register and a dot product."""
    if x.dim() == 2:
        return causal_conv1d_update_ref(x[:, None], conv_state, weight, bias, activation, state_indices)[:, 0]
    width = weight.shape[1]
    y = torch.zeros_like(x)
    for entry in range(x.shape[0]):
        row = _row_of(entry, state_indices)
        if row < 0:
            continue
        known = conv_state[row].double()
        for t in range(x.shape[1]):
            known = torch.cat([known, x[entry, t].double()[:, None]], dim=1)
            out = (known[:, known.shape[1] - width :] * weight.double()).sum(-1)
            if bias is not None:
                out = out + bias.double()
            y[entry, t] = out if activation is None else torch.nn.functional.silu(out)
        conv_state[row] = known[:, known.shape[1] - conv_state.shape[2] :]
    return y
