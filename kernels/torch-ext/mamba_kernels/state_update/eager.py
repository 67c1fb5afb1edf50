"""Single-token and few-token updates in vectorised torch, on any device.

Decoding is bound by the number of calls as much as by the work, so a token takes about ten calls on whole tensors. Both
recurrences run as one: a channel of Mamba is a head with P = 1 and its own N decays, a head of Mamba-2 has one decay.

Symbols: B batch, T tokens, S rows of the state, D channels, N state size, H heads, P head dim, G groups, W conv width,
K tokens kept by the conv state.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "LOG2_E",
    "causal_conv1d_update_eager",
    "convolve_",
    "selective_state_update_eager",
    "selective_step_",
    "ssd_state_update_eager",
    "ssd_step_",
    "steps_in_place",
]

LOG2_E = math.log2(math.e)


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


def steps_in_place(state: Tensor, x: Tensor, state_indices: Tensor | None, return_step_states: bool) -> bool:
    """Whether a single token is all that is asked for and `state` can be worked on as it lies there.

    This is the step of a decoding loop. It is written out in as few calls as it takes: each costs 2 to 10 µs, and a model
    makes them in every layer.
    """
    return (
        state_indices is None
        and not return_step_states
        and state.dtype == x.dtype == _compute_dtype(x)
        and state.is_contiguous()
    )


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z), in place; all of one shape but D."""
    if D is not None:
        y.addcmul_(x, D.to(x.dtype))
    if z is not None:
        y.mul_(torch.nn.functional.silu(z))
    return y


def selective_step_(
    state: Tensor, x: Tensor, delta: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> Tensor:
    """One token of Mamba where `steps_in_place`: state and decay (B, D, N), x, delta and z (B, D), B and C (B, N)."""
    state.mul_(decay).addcmul_((delta * x)[..., None], B[:, None])
    y = torch.empty((*x.shape, 1), dtype=x.dtype, device=x.device)
    # with `out=`, which autocast leaves alone
    torch.bmm(state, C[..., None], out=y)
    return _skip_and_gate(y[..., 0], x, D, z)


def ssd_step_(
    state: Tensor, x: Tensor, delta: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> Tensor:
    """One token of Mamba-2 where `steps_in_place`: state (B, H, P, N), x and z (B, H, P), delta and decay (B, H), B and C (B, G, N).

    D is (H, P) or (H, 1).
    """
    batch, heads, head_dim = x.shape
    groups, size = B.shape[1:]
    channels = heads * head_dim // groups
    state.mul_(decay[..., None, None])
    inputs = (delta[..., None] * x).view(batch, groups, channels, 1)
    state.view(batch, groups, channels, size).addcmul_(inputs, B[:, :, None])
    # a product a head uses all threads; as row times transposed matrix, since with a column it is slower
    rows = C[:, :, None].expand(-1, -1, heads // groups, -1).reshape(batch * heads, 1, size)
    y = torch.empty((batch * heads, 1, head_dim), dtype=x.dtype, device=x.device)
    torch.bmm(rows, state.view(batch * heads, head_dim, size).mT, out=y)
    return _skip_and_gate(y.view(x.shape), x, D, z)


def convolve_(conv_state: Tensor, x: Tensor, taps: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """One token of the convolution where `steps_in_place`: conv_state (B, D, W - 1), x (B, D), taps W times (D,)."""
    # column by column: strided as they are, that is faster than to join them with x, move, multiply and sum them
    known = (*conv_state.unbind(2), x)
    y = torch.mul(known[0], taps[0]) if bias is None else torch.addcmul(bias, known[0], taps[0])
    for column, tap in zip(known[1:], taps[1:], strict=True):
        y.addcmul_(column, tap)
    for column, newer in pairwise(known):
        column.copy_(newer)
    return y


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

    state (S, …, N) with H · P channels; x, z (B, T, H, P); delta (B, T, H, 1); A (H, 1, N) or (H, 1, 1); B, C (B, T, G, N);
    D (H, P) or (H, 1) → y (B, T, H, P) and, on demand, the state after each token (B, T, …, N).
    """
    dtype = _compute_dtype(x)
    batch, tokens, heads, head_dim = x.shape
    groups, size = B.shape[2:]
    rows = _take_rows(state, state_indices, dtype)
    by_head, by_group = rows.view(batch, heads, head_dim, size), rows.view(batch, groups, -1, size)
    flat = by_group.flatten(0, 1)
    x, A, B, C = x.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype)
    inputs = (delta * x).view(batch, tokens, groups, -1, 1)
    # exp2 is about twice as fast as exp
    exponents = (delta * LOG2_E)[..., None]
    y = torch.empty((tokens, batch, heads, head_dim), dtype=dtype, device=x.device)
    step_states = []
    for t in range(tokens):
        by_head.mul_((exponents[:, t] * A).exp2_())
        by_group.addcmul_(inputs[:, t], B[:, t, :, None])
        # with `out=`, which autocast leaves alone
        torch.bmm(flat, C[:, t].reshape(-1, size, 1), out=y[t].view(batch * groups, -1, 1))
        if return_step_states:
            step_states.append(rows.to(state.dtype, copy=True))
    _put_rows(state, state_indices, rows)
    y = y.transpose(0, 1)
    y = _without_padding(_skip_and_gate(y, x, D, None if z is None else z.to(dtype)), state_indices)
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
    if x.dim() == 2 and B.dim() == 2 and steps_in_place(state, x, state_indices, return_step_states):
        delta = _step_size(dt, dt_bias, dt_softplus, x.dtype)
        decay = torch.mul((delta * LOG2_E)[..., None], A).exp2_()
        return selective_step_(state, x, delta, decay, B.to(x.dtype), C.to(x.dtype), D, z)
    # every channel is a head of its own
    shape = (x.shape[0], 1 if x.dim() == 2 else x.shape[1], x.shape[-1], 1)
    size = A.shape[1]
    y, step_states = _update(
        state,
        x.reshape(shape),
        _step_size(dt, dt_bias, dt_softplus, _compute_dtype(x)).reshape(shape),
        A[:, None],
        B.reshape(*shape[:2], -1, size),
        C.reshape(*shape[:2], -1, size),
        None if D is None else D[:, None],
        None if z is None else z.reshape(shape),
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
    delta = _step_size(dt, dt_bias, dt_softplus, _compute_dtype(x))
    if dt_limit != (0.0, float("inf")) or not dt_softplus:
        delta = delta.clamp(*dt_limit)
    if x.dim() == 3 and steps_in_place(state, x, state_indices, return_step_states):
        decay = torch.mul(delta, A).exp_()
        skip = D[:, None] if D is not None and D.dim() == 1 else D
        return ssd_step_(state, x, delta, decay, B.to(x.dtype), C.to(x.dtype), skip, z)
    shape = (x.shape[0], 1 if x.dim() == 3 else x.shape[1], *x.shape[-2:])
    size = state.shape[-1]
    y, step_states = _update(
        state,
        x.reshape(shape),
        delta.reshape(*shape[:3], 1),
        A[:, None, None],
        B.reshape(*shape[:2], -1, size),
        C.reshape(*shape[:2], -1, size),
        D[:, None] if D is not None and D.dim() == 1 else D,
        None if z is None else z.reshape(shape),
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
    if x.dim() == 2 and kept + 1 == width and steps_in_place(conv_state, x, state_indices, False):
        y = convolve_(conv_state, x, weight.to(dtype).unbind(1), None if bias is None else bias.to(dtype))
        return y if activation is None else torch.nn.functional.silu(y, inplace=True)
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
