"""Mamba-1 (and Falcon-Mamba): `selective_scan_fn` and `mamba_inner_fn`, channel-first as in `mamba_ssm`."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..causal_conv1d import causal_conv1d
from ..checks import check_shape, check_tensor
from ..norm import rms_norm
from ..selective_scan import selective_scan
from .layout import like_layout, refuse_complex

__all__ = ["mamba_inner_fn", "selective_scan_fn"]


def _channel_last(op: str, name: str, value: Tensor, u: Tensor, size: int) -> tuple[Tensor, bool]:
    """B or C in one of its three layouts → (B, L, G, N), and whether it was time-invariant."""
    batch, channels, length = u.shape
    if value.dim() == 2:
        check_shape(op, name, value, (channels, size), "(D, N)")
        # a group for each channel, the same at all times: a view, not a copy
        return value.expand(batch, length, channels, size), True
    if value.dim() == 3:
        check_shape(op, name, value, (batch, size, length), "(B, N, L)")
        return value.transpose(1, 2).unsqueeze(2), False
    check_shape(op, name, value, (batch, None, size, length), "(D, N), (B, N, L) or (B, G, N, L)")
    return value.permute(0, 3, 1, 2), False


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn` on `mamba_kernels.selective_scan`.

    Args:
        u, delta, z: (B, D, L); z may be None.
        A: (D, N), real.
        B, C: (B, N, L), (B, G, N, L), or (D, N) for time-invariant ones, each on its own.
        D, delta_bias: (D,) or None.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last token.

    Returns:
        out (B, D, L) in the dtype of u and the memory layout of delta, or (out, last_state) with last_state (B, D, N) fp32.
        Unlike the original, the last state is differentiable.

    Raises:
        TypeError: A, B or C is complex, or an argument is no floating tensor.
        ValueError: a shape that does not fit.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import selective_scan_fn
        >>> u, delta, A = torch.randn(2, 4, 10), torch.rand(2, 4, 10), -torch.rand(4, 3)
        >>> B, C = torch.randn(2, 3, 10), torch.randn(2, 3, 10)
        >>> print(selective_scan_fn(u, delta, A, B, C, delta_softplus=True).shape)
        torch.Size([2, 4, 10])
    """
    op = "selective_scan_fn"
    for name, value in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        check_tensor(op, name, value)
    refuse_complex(op, A=A, B=B, C=C)
    check_shape(op, "u", u, (None, None, None), "(B, D, L)")
    check_shape(op, "delta", delta, tuple(u.shape), "(B, D, L)")
    channels = u.shape[1]
    check_shape(op, "A", A, (channels, None), "(D, N)")
    if z is not None:
        check_tensor(op, "z", z)
        check_shape(op, "z", z, tuple(u.shape), "(B, D, L)")
    B_last, constant_B = _channel_last(op, "B", B, u, A.shape[1])
    C_last, constant_C = _channel_last(op, "C", C, u, A.shape[1])
    if constant_B != constant_C:
        # the time-variant one of the two is repeated to the groups of the other
        B_last, C_last = (value.repeat_interleave(channels // value.shape[2], dim=2) for value in (B_last, C_last))
    result = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B_last,
        C_last,
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        return_final_states=return_last_state,
    )
    if isinstance(result, tuple):
        return like_layout(result[0].transpose(1, 2), delta), result[1]
    return like_layout(result.transpose(1, 2), delta)


def _dt_norm_weight(weight: Tensor, rank: int, channels: int) -> Tensor | None:
    """The weight of the norm over dt's `rank` entries; None stands for ones."""
    op = "mamba_inner_fn"
    if tuple(weight.shape) == (rank,):
        return weight
    advice = (
        f"The norm of dt acts on its {rank} entries before delta_proj, as in Falcon-Mamba's inference; pass a weight of "
        f"shape ({rank},)."
    )
    check_shape(op, "dt_rms_weight", weight, (channels,), f"(R,) = ({rank},), or ones of shape (D,)")
    # transformers passes a buffer of D ones; nothing else of that width has a meaning
    if weight.requires_grad or torch.compiler.is_compiling() or not bool((weight == 1).all()):
        raise ValueError(f"{op}: `dt_rms_weight` of shape ({channels},) must be a constant of ones. {advice}")
    return None


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """`mamba_ssm.ops.selective_scan_interface.mamba_inner_fn`: a Mamba block from after in_proj through out_proj.

    d is the model width, D the inner width, R the rank of dt, N the state size, W the conv width.

    Args:
        xz: (B, 2 D, L), the conv input and the gate.
        conv1d_weight: (D, 1, W). conv1d_bias: (D,) or None.
        x_proj_weight: (R + 2 N, D), without the N rows of a B or C that is given.
        delta_proj_weight: (D, R). delta_bias: (D,) or None, its bias.
        out_proj_weight: (d, D). out_proj_bias: (d,) or None.
        A: (D, N), real.
        B, C: None for the projected ones, or time-invariant (D, N).
        D: (D,) or None.
        B_proj_bias, C_proj_bias: (N,) or None, added to the projected B and C.
        delta_softplus: apply softplus to delta + delta_bias.
        checkpoint_lvl: 0 or 1. The original trades memory for time with it; here each op recomputes in backward whatever it
            can at either level, and results are the same.
        b_rms_weight, c_rms_weight: (N,) or None, RMS norms of the projected B and C, as in Falcon-Mamba.
        dt_rms_weight: (R,) or None, RMS norm of dt *before* delta_proj, as Falcon-Mamba's inference has it; the original
            normalises after it, which fits no checkpoint. Ones of shape (D,), which transformers passes, mean the same as
            ones of shape (R,).
        b_c_dt_rms_eps: eps of these norms.

    Returns:
        (B, L, d). Linear layers follow autocast.

    Raises:
        TypeError: A, B or C is complex, or an argument is no floating tensor.
        ValueError: a shape that does not fit, a `checkpoint_lvl` other than 0 and 1, a norm or bias for a B or C that is
            given, or a `dt_rms_weight` of D entries that are not ones.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import mamba_inner_fn
        >>> xz, conv, x_proj = torch.randn(2, 8, 10), torch.randn(4, 1, 4), torch.randn(2 + 2 * 3, 4)
        >>> dt_proj, out_proj, A = torch.randn(4, 2), torch.randn(6, 4), -torch.rand(4, 3)
        >>> print(mamba_inner_fn(xz, conv, None, x_proj, dt_proj, out_proj, None, A).shape)
        torch.Size([2, 10, 6])
    """
    op = "mamba_inner_fn"
    for name, value in (
        ("xz", xz),
        ("conv1d_weight", conv1d_weight),
        ("x_proj_weight", x_proj_weight),
        ("delta_proj_weight", delta_proj_weight),
        ("out_proj_weight", out_proj_weight),
        ("A", A),
    ):
        check_tensor(op, name, value)
    refuse_complex(op, A=A, B=B, C=C)
    check_shape(op, "A", A, (None, None), "(D, N)")
    channels, size = A.shape
    check_shape(op, "xz", xz, (None, 2 * channels, None), "(B, 2 D, L)")
    check_shape(op, "conv1d_weight", conv1d_weight, (channels, 1, None), "(D, 1, W)")
    check_shape(op, "delta_proj_weight", delta_proj_weight, (channels, None), "(D, R)")
    check_shape(op, "out_proj_weight", out_proj_weight, (None, channels), "(d, D)")
    rank = delta_proj_weight.shape[1]
    rows = rank + size * ((B is None) + (C is None))
    check_shape(op, "x_proj_weight", x_proj_weight, (rows, channels), "(R + N rows for each of B, C not given, D)")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{op}: `checkpoint_lvl` must be 0 or 1, got {checkpoint_lvl!r}.")
    for name, given, extra in (
        ("b_rms_weight", B, b_rms_weight),
        ("B_proj_bias", B, B_proj_bias),
        ("c_rms_weight", C, c_rms_weight),
        ("C_proj_bias", C, C_proj_bias),
    ):
        if extra is not None:
            if given is not None:
                raise ValueError(
                    f"{op}: `{name}` applies to the projected {name[0].upper()}, but `{name[0].upper()}` is given; leave "
                    f"out one of them."
                )
            check_shape(op, name, extra, (size,), "(N,)")

    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    convolved = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    assert isinstance(convolved, Tensor)
    projected = linear(convolved, x_proj_weight)
    dt, rest = projected.split([rank, rows - rank], dim=-1)
    if dt_rms_weight is not None:
        dt = rms_norm(dt, _dt_norm_weight(dt_rms_weight, rank, channels), eps=b_c_dt_rms_eps)
    variant = list(rest.split(size, dim=-1))

    def next_projected(bias: Tensor | None, norm_weight: Tensor | None) -> Tensor:
        value = variant.pop(0)
        if bias is not None:
            value = value + bias.to(value.dtype)
        if norm_weight is not None:
            value = rms_norm(value, norm_weight, eps=b_c_dt_rms_eps)
        return value.transpose(1, 2)

    B = next_projected(B_proj_bias, b_rms_weight) if B is None else B
    C = next_projected(C_proj_bias, c_rms_weight) if C is None else C
    y = selective_scan_fn(
        convolved.transpose(1, 2),
        linear(dt, delta_proj_weight).transpose(1, 2),
        A,
        B,
        C,
        D=D,
        z=z.transpose(1, 2),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
    )
    assert isinstance(y, Tensor)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
