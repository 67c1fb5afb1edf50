"""Single-token and few-token updates in vectorised torch, on any device.

Decoding is bound by the number of calls as much as by the work, so a token takes about ten calls on whole tensors. Both
recurrences run as one: a head of Mamba-2 is P channels that share their step size and their scalar A.

Symbols: B batch, T tokens, S rows of the state, D channels, N state size, H heads, P head dim, G groups, W conv width,
K tokens kept by the conv state.
"""

import math

import torch
from torch import Tensor

__all__ = ["causal_conv1d_update_eager", "selective_state_update_eager", "ssd_state_update_eager"]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _take_rows(state: Tensor, state_indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The selected rows of `state`, contiguous and in `dtype`; `state` itself where nothing has to change."""
    if state_indices is None:
        return state.to(dtype).contiguous()
    return state[state_indices.clamp(min=0)].to(dtype)


def _put_rows(state: Tensor, state_indices: Tensor | None, rows: Tensor) -> None:
    """Write rows back where they came from, except those of padding (a negative index)."""
    if state_indices is None:
        if rows is not state:
            state.copy_(rows)
        return
    # picking out the real rows by a mask would wait for the device to say how many there are. So a padding entry repeats
    # the write of the first real one, or rewrites row 0 as it is when there is no real one
    real = state_indices >= 0
    source = torch.where(real, torch.arange(real.shape[0], device=real.device), real.to(torch.int8).argmax())
    target = state_indices[source].clamp(min=0)
    state[target] = torch.where(real.any(), rows[source].to(state.dtype), state[target])


def _without_padding(value: Tensor, state_indices: Tensor | None) -> Tensor:
    if state_indices is None:
        return value
    return value.masked_fill((state_indices < 0).view(-1, *(1,) * (value.dim() - 1)), 0)


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    return torch.nn.functional.softplus(delta) if dt_softplus else delta


def _update(
    state: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state_indices: Tensor | None,
    return_step_states: bool,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of both families: h = exp(delta A) h + delta B x, y = (C · h + D x) silu(z).

    state (S, …, N); x, delta, z (B, T, D); A (D, N) or (D, 1); B, C (B, T, G, N); D (D,) → y (B, T, D) and, on demand, the
    state after each token (B, T, …, N).
    """
    dtype = _compute_dtype(x)
    batch, tokens, groups, size = B.shape
    rows = _take_rows(state, state_indices, dtype)
    h = rows.view(batch, groups, -1, size)
    channels = h.shape[2]
    x = x.to(dtype)
    inputs = (delta * x).view(batch, tokens, groups, channels, 1)
    # exp2 is about twice as fast as exp
    exponents = (delta * math.log2(math.e)).view(inputs.shape)
    A = A.to(dtype).reshape(groups, channels, -1)
    B, C = B.to(dtype), C.to(dtype)
    y = torch.empty((tokens, batch, groups * channels), dtype=dtype, device=x.device)
    step_states = []
    for t in range(tokens):
        h.mul_((exponents[:, t] * A).exp2_()).addcmul_(inputs[:, t], B[:, t, :, None])
        # with `out=`, which autocast leaves alone
        torch.bmm(h.view(-1, channels, size), C[:, t].reshape(-1, size, 1), out=y[t].view(-1, channels, 1))
        if return_step_states:
            step_states.append(rows.to(state.dtype, copy=True))
    _put_rows(state, state_indices, rows)
    y = y.transpose(0, 1)
    if D is not None:
        y.addcmul_(x, D.to(dtype))
    if z is not None:
        y.mul_(torch.nn.functional.silu(z.to(dtype)))
    y = _without_padding(y, state_indices)
    if not return_step_states:
        return y, None
    return y, _without_padding(torch.stack(step_states, dim=1), state_indices)


def selective_state_update_eager(
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
    """`selective_state_update` in vectorised torch; arguments as there, assumed to be checked."""
    batch, channels = x.shape[0], x.shape[-1]
    tokens = 1 if x.dim() == 2 else x.shape[1]
    size = A.shape[1]
    y, step_states = _update(
        state,
        x.reshape(batch, tokens, channels),
        _step_size(dt, dt_bias, dt_softplus, _compute_dtype(x)).reshape(batch, tokens, channels),
        A,
        B.reshape(batch, tokens, -1, size),
        C.reshape(batch, tokens, -1, size),
        D,
        None if z is None else z.reshape(batch, tokens, channels),
        state_indices,
        return_step_states,
    )
    y = y.reshape(x.shape).to(x.dtype)
    if step_states is None:
        return y
    return y, step_states.flatten(0, 1) if x.dim() == 2 else step_states


def ssd_state_update_eager(
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
    """`ssd_state_update` in vectorised torch; arguments as there, assumed to be checked."""
    batch, (heads, head_dim) = x.shape[0], x.shape[-2:]
    tokens = 1 if x.dim() == 3 else x.shape[1]
    channels, size = heads * head_dim, state.shape[-1]

    def per_channel(value: Tensor) -> Tensor:
        """(…, H) → (…, H · P)."""
        return value[..., None].expand(*value.shape, head_dim).flatten(-2)

    delta = _step_size(dt, dt_bias, dt_softplus, _compute_dtype(x))
    if dt_limit != (0.0, float("inf")) or not dt_softplus:
        delta = delta.clamp(*dt_limit)
    if D is not None:
        D = per_channel(D) if D.dim() == 1 else D.flatten()
    y, step_states = _update(
        state,
        x.reshape(batch, tokens, channels),
        per_channel(delta).view(batch, tokens, channels),
        per_channel(A)[:, None],
        B.reshape(batch, tokens, -1, size),
        C.reshape(batch, tokens, -1, size),
        D,
        None if z is None else z.reshape(batch, tokens, channels),
        state_indices,
        return_step_states,
    )
    y = y.reshape(x.shape).to(x.dtype)
    if step_states is None:
        return y
    return y, step_states.flatten(0, 1) if x.dim() == 3 else step_states


def causal_conv1d_update_eager(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in vectorised torch; arguments as there, assumed to be checked."""
    dtype = _compute_dtype(x)
    width, kept = weight.shape[1], conv_state.shape[2]
    new = x.to(dtype)[..., None] if x.dim() == 2 else x.to(dtype).transpose(1, 2)
    tokens = new.shape[2]
    known = torch.cat([_take_rows(conv_state, state_indices, dtype), new], dim=2)
    _put_rows(conv_state, state_indices, known[..., tokens:])
    taps = weight.to(dtype)
    if tokens == 1:
        y = (known[..., kept + 1 - width :] * taps).sum(-1)
    else:
        windows = known[..., kept + 1 - width :].unfold(2, width, 1)
        y = (windows * taps[:, None]).sum(-1).transpose(1, 2)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation is not None:
        y = torch.nn.functional.silu(y)
    return _without_padding(y.view(x.shape) if tokens == 1 else y, state_indices).to(x.dtype).contiguous()
