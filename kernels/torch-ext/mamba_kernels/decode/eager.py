"""The decoding ops in plain torch, made of the other ops: the fallback, and what runs without a GPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..norm.eager import rms_norm_eager, rms_norm_gated_eager
from ..state_update.eager import selective_state_update_eager, ssd_state_update_eager

__all__ = ["fused_linear_eager", "mamba2_step_eager", "mamba_step_eager"]


def fused_linear_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    z: Tensor | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear`; arguments as there, assumed to be checked."""
    if z is not None:
        width = x.shape[-1] if group_size is None else group_size
        x = rms_norm_gated_eager(x, norm_weight, z, eps, width, norm_before_gate=False)
    elif norm_weight is not None:
        x = rms_norm_eager(x, norm_weight, eps=eps)
    out = F.linear(x.to(weight.dtype), weight, bias)
    return out if residual is None else residual + out


def mamba_step_eager(
    state: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    norm_eps: float | None = None,
) -> Tensor:
    """`mamba_step`; arguments as there, assumed to be checked."""
    size = A_log.shape[1]
    dt, B, C = parameters.split([dt_weight.shape[1], size, size], dim=-1)
    if norm_eps is not None:
        dt, B, C = (rms_norm_eager(value, None, eps=norm_eps) for value in (dt, B, C))
    y = selective_state_update_eager(
        state,
        x,
        F.linear(dt, dt_weight),
        -torch.exp(A_log.float()),
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
    )
    assert isinstance(y, Tensor)
    return y


def mamba2_step_eager(
    state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """`mamba2_step`; arguments as there, assumed to be checked."""
    _, heads, head_dim, size = state.shape
    x, B, C = xBC.split([heads * head_dim, groups * size, groups * size], dim=-1)
    y = ssd_state_update_eager(
        state,
        x.unflatten(-1, (heads, head_dim)),
        dt,
        -torch.exp(A_log.float()),
        B.unflatten(-1, (groups, size)),
        C.unflatten(-1, (groups, size)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=dt_limit,
    )
    assert isinstance(y, Tensor)
    return y.flatten(-2)
