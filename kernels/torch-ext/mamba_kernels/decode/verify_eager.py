"""The ops that verify drafted tokens, in plain torch: the state after every token is kept, so any of them can be gone back to."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..norm.eager import rms_norm_eager
from ..state_update.eager import causal_conv1d_update_eager, selective_state_update_eager, ssd_state_update_eager

__all__ = ["conv_verify_eager", "mamba2_verify_eager", "mamba_verify_eager"]


def conv_verify_eager(
    history: Tensor,
    accepted: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`conv_verify`; arguments as there, assumed to be checked."""
    batch, tokens, channels = x.shape
    size = history.shape[1] - tokens
    before = accepted[:, None] + 1 + torch.arange(size, device=x.device)
    window = history.gather(1, before[..., None].expand(batch, size, channels))
    y = causal_conv1d_update_eager(x, window.mT.contiguous(), weight, bias, activation=activation)
    history.copy_(torch.cat([window, x.to(history.dtype)], dim=1))
    return y


def mamba_verify_eager(
    states: Tensor,
    accepted: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    norm_eps: float | None = None,
) -> Tensor:
    """`mamba_verify`; arguments as there, assumed to be checked."""
    size = A_log.shape[1]
    dt, B, C = parameters.split([dt_weight.shape[1], size, size], dim=-1)
    if norm_eps is not None:
        dt, B, C = (rms_norm_eager(value, None, eps=norm_eps) for value in (dt, B, C))
    y, after = selective_state_update_eager(
        _held(states, accepted),
        x,
        F.linear(dt, dt_weight),
        -torch.exp(A_log.float()),
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        return_step_states=True,
    )
    states.copy_(after)
    return y


def mamba2_verify_eager(
    states: Tensor,
    accepted: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """`mamba2_verify`; arguments as there, assumed to be checked."""
    _, _, heads, head_dim, size = states.shape
    x, B, C = xBC.split([heads * head_dim, groups * size, groups * size], dim=-1)
    y, after = ssd_state_update_eager(
        _held(states, accepted),
        x.unflatten(-1, (heads, head_dim)),
        dt,
        -torch.exp(A_log.float()),
        B.unflatten(-1, (groups, size)),
        C.unflatten(-1, (groups, size)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
        return_step_states=True,
    )
    states.copy_(after)
    return y.flatten(-2)


def _held(states: Tensor, accepted: Tensor) -> Tensor:
    """A copy of the state of every batch entry after its accepted token."""
    return states[torch.arange(len(states), device=states.device), accepted]
