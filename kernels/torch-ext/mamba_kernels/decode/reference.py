"""fp64 oracles of the decoding ops, token by token and without any trick."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..norm.reference import rms_norm_gated_ref, rms_norm_ref
from ..state_update.reference import causal_conv1d_update_ref, selective_state_update_ref, ssd_state_update_ref

__all__ = [
    "conv_verify_ref",
    "fused_linear_ref",
    "mamba2_step_ref",
    "mamba2_verify_ref",
    "mamba_step_ref",
    "mamba_verify_ref",
]


def fused_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    z: Tensor | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` in fp64."""
    value = x.double()
    if z is not None:
        assert norm_weight is not None
        value = rms_norm_gated_ref(value, norm_weight.double(), z.double(), eps=eps, group_size=group_size)
    elif norm_weight is not None:
        value = rms_norm_ref(value, norm_weight.double(), eps=eps)
    out = F.linear(value, weight.double(), None if bias is None else bias.double())
    return out if residual is None else residual.double() + out


def mamba_step_ref(
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
    """`mamba_step` in fp64; the state is updated in place."""
    size = A_log.shape[1]
    dt, B, C = parameters.double().split([dt_weight.shape[1], size, size], dim=-1)
    if norm_eps is not None:
        dt, B, C = (rms_norm_ref(value, None, eps=norm_eps) for value in (dt, B, C))
    held = state.double()
    y = selective_state_update_ref(
        held,
        x.double(),
        dt @ dt_weight.double().T,
        -torch.exp(A_log.double()),
        B,
        C,
        D=D.double(),
        z=z.double(),
        dt_bias=dt_bias.double(),
    )
    state.copy_(held)
    assert isinstance(y, Tensor)
    return y


def mamba2_step_ref(
    state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """`mamba2_step` in fp64; the state is updated in place."""
    _, heads, head_dim, size = state.shape
    x, B, C = xBC.double().split([heads * head_dim, groups * size, groups * size], dim=-1)
    held = state.double()
    y = ssd_state_update_ref(
        held,
        x.unflatten(-1, (heads, head_dim)),
        dt.double(),
        -torch.exp(A_log.double()),
        B.unflatten(-1, (groups, size)),
        C.unflatten(-1, (groups, size)),
        D=D.double(),
        dt_bias=dt_bias.double(),
        dt_limit=dt_limit,
    )
    state.copy_(held)
    assert isinstance(y, Tensor)
    return y.flatten(-2)


def conv_verify_ref(
    history: Tensor,
    accepted: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`conv_verify` in fp64, token by token and row by row; the history is updated in place."""
    batch, tokens, _ = x.shape
    size = history.shape[1] - tokens
    out = []
    for b in range(batch):
        first = int(accepted[b]) + 1
        window = history[b : b + 1, first : first + size].double().mT.clone()
        known = torch.cat([history[b, first : first + size], x[b].to(history.dtype)])
        steps = [
            causal_conv1d_update_ref(
                x[b : b + 1, t].double(),
                window,
                weight.double(),
                None if bias is None else bias.double(),
                activation=activation,
            )
            for t in range(tokens)
        ]
        history[b] = known
        out.append(torch.stack(steps, dim=1))
    return torch.cat(out)


def mamba_verify_ref(
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
    """`mamba_verify` in fp64, one `mamba_step` after the other; the states are updated in place."""
    held = torch.stack([states[b, int(accepted[b])] for b in range(len(states))]).double()
    out = []
    for t in range(x.shape[1]):
        step = (dt_weight, dt_bias, A_log, D, z[:, t])
        out.append(mamba_step_ref(held, x[:, t], parameters[:, t], *step, norm_eps=norm_eps))
        states[:, t] = held
    return torch.stack(out, dim=1)


def mamba2_verify_ref(
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
    """`mamba2_verify` in fp64, one `mamba2_step` after the other; the states are updated in place."""
    held = torch.stack([states[b, int(accepted[b])] for b in range(len(states))]).double()
    out = []
    for t in range(xBC.shape[1]):
        out.append(mamba2_step_ref(held, xBC[:, t], dt[:, t], dt_bias, A_log, D, groups, dt_limit=dt_limit))
        states[:, t] = held
    return torch.stack(out, dim=1)
