"""Mamba's mixers, norms and feed-forward layers in plain torch, fp32 or fp64, one token after another.

What `--verify` compares a converted model with is built from these. They share no code with the models or the kernels:
an error in either does not hide in both. Slow, and meant for short inputs.

A `Getter` gives a tensor of the source by its name below some prefix, or None where the source has none:
`get("conv1d.bias")`. Sizes are read from the tensors.

Symbols: B batch, L length, d model width, D inner width, N state size, R time-step rank, W convolution width, H heads, P head
dim, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ACTIVATIONS",
    "Getter",
    "causal_convolution",
    "layer_norm",
    "linear",
    "mamba1_mixer",
    "mamba2_mixer",
    "need",
    "precise",
    "rms_norm",
]

Getter = Callable[[str], Tensor | None]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0.0),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + torch.erf(x * 2.0**-0.5)),
}


def precise(x: Tensor) -> Tensor:
    """`x` in fp32; fp64 stays what it is, so that the same code computes in either."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32; with weight and bias if given (arXiv 1910.07467)."""
    x = precise(x)
    out = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    out = out if weight is None else out * precise(weight)
    return out if bias is None else out + precise(bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis, in fp32 (arXiv 1607.06450)."""
    x = precise(x)
    centred = x - x.mean(dim=-1, keepdim=True)
    out = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * precise(weight)
    return out if bias is None else out + precise(bias)


def linear(get: Getter, name: str, x: Tensor) -> Tensor:
    """`x` through the layer of that name, in fp32; its bias is added if the source has one."""
    out = precise(x) @ need(get, f"{name}.weight").mT
    bias = get(f"{name}.bias")
    return out if bias is None else out + precise(bias)


def causal_convolution(get: Getter, x: Tensor, activation: str | None = "silu") -> Tensor:
    """Depthwise convolution `conv1d` of x (B, L, channels) over the last W tokens, and an activation or none."""
    weight = need(get, "conv1d.weight").squeeze(1)
    width = weight.shape[-1]
    padded = F.pad(precise(x), (0, 0, width - 1, 0))
    out = sum(padded[:, tap : tap + x.shape[1]] * weight[:, tap] for tap in range(width))
    assert isinstance(out, Tensor)
    bias = get("conv1d.bias")
    if bias is not None:
        out = out + precise(bias)
    return out if activation is None else ACTIVATIONS[activation](out)


def mamba1_mixer(get: Getter, hidden: Tensor, parameter_norm_eps: float | None = None) -> Tensor:
    """The mixer of Mamba (arXiv 2312.00752, §3): (B, L, d) → (B, L, d), fp32.

    Tensors below the prefix: `in_proj.weight` (2D, d), rows [x, z]; `conv1d.weight` (D, 1, W); `x_proj.weight` (R + 2N, D),
    rows [dt, B, C]; `dt_proj.weight` (D, R), `dt_proj.bias`; `A_log` (D, N); `D` (D,); `out_proj.weight` (d, D); biases of
    `in_proj`, `conv1d` and `out_proj` if there are any.

    Args:
        parameter_norm_eps: dt, B and C pass an RMSNorm without weights first, as in Falcon-Mamba; None = no norm.
    """
    x, z = linear(get, "in_proj", hidden).chunk(2, dim=-1)
    x = causal_convolution(get, x)
    A = -torch.exp(need(get, "A_log"))
    state_size = A.shape[1]
    rank = need(get, "dt_proj.weight").shape[1]
    low_rank, B, C = linear(get, "x_proj", x).split([rank, state_size, state_size], dim=-1)
    if parameter_norm_eps is not None:
        low_rank, B, C = (rms_norm(value, eps=parameter_norm_eps) for value in (low_rank, B, C))
    dt = F.softplus(linear(get, "dt_proj", low_rank))
    state = x.new_zeros(x.shape[0], x.shape[2], state_size)
    outputs = []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((state * C[:, t, None, :]).sum(dim=-1))
    y = torch.stack(outputs, dim=1) + need(get, "D") * x
    return linear(get, "out_proj", y * ACTIVATIONS["silu"](z))


def mamba2_mixer(
    get: Getter,
    hidden: Tensor,
    head_dim: int,
    n_groups: int = 1,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    eps: float = 1e-5,
) -> Tensor:
    """The mixer of Mamba-2 (arXiv 2405.21060, §7): (B, L, d) → (B, L, d), fp32.

    Tensors below the prefix: `in_proj.weight` (2D + 2GN + H, d), rows [z, x, B, C, dt]; `conv1d.weight` (D + 2GN, 1, W);
    `dt_bias`, `A_log`, `D` (H,); `norm.weight` (D,), a norm of `y · silu(z)` over groups of D / G channels; `out_proj.weight`
    (d, D); biases of `in_proj`, `conv1d` and `out_proj` if there are any.
    """
    A = -torch.exp(need(get, "A_log"))
    heads = A.shape[0]
    inner = heads * head_dim
    conv_dim = need(get, "conv1d.weight").shape[0]
    state_size = (conv_dim - inner) // (2 * n_groups)
    z, xBC, dt = linear(get, "in_proj", hidden).split([inner, conv_dim, heads], dim=-1)
    groups_width = n_groups * state_size
    x, B, C = causal_convolution(get, xBC).split([inner, groups_width, groups_width], dim=-1)
    batch, length = x.shape[:2]
    x = x.reshape(batch, length, heads, head_dim)
    B, C = (
        value.reshape(batch, length, n_groups, state_size).repeat_interleave(heads // n_groups, dim=2)
        for value in (B, C)
    )
    dt = F.softplus(dt + need(get, "dt_bias")).clamp(*dt_limit)
    state = x.new_zeros(batch, heads, head_dim, state_size)
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(dim=-1))
    y = torch.stack(outputs, dim=1) + need(get, "D")[:, None] * x
    gated = y.reshape(batch, length, inner) * ACTIVATIONS["silu"](z)
    normed = rms_norm(gated.unflatten(-1, (n_groups, inner // n_groups)), eps=eps).flatten(-2)
    return linear(get, "out_proj", normed * need(get, "norm.weight"))


def need(get: Getter, name: str) -> Tensor:
    """The tensor of that name, in fp32, which must be there."""
    value = get(name)
    if value is None:
        raise ValueError(f"The source has no tensor {name!r} where a forward of it needs one.")
    return precise(value)
