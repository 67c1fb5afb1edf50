"""The public ops that verify drafted tokens: argument checks and dispatch.

They advance a sequence by T tokens of which later only the first few may turn out to be right. A buffer keeps what is needed to go
back to any of them, and `accepted` says where the next call starts: at the state after that token of the call before.
"""

from torch import Tensor

from ..checks import check_activation, check_dtype, check_shape, check_tensor
from ..dispatch import on_device, select
from ..packing import INTEGER_DTYPES
from ..signatures import once_per_signature
from .interface import _check_inputs
from .reference import conv_verify_ref, mamba2_verify_ref, mamba_verify_ref
from .verify_eager import conv_verify_eager, mamba2_verify_eager, mamba_verify_eager

__all__ = ["conv_verify", "mamba2_verify", "mamba_verify"]


def _check_buffer(op: str, name: str, buffer: Tensor, accepted: Tensor, batch: int) -> None:
    check_tensor(op, "accepted", accepted)
    check_dtype(op, "accepted", accepted, INTEGER_DTYPES)
    check_shape(op, "accepted", accepted, (batch,), "(B,)")
    if accepted.device != buffer.device:
        raise ValueError(f"{op}: `accepted` must be on {buffer.device} as `{name}`, got {accepted.device}.")


def _check_contiguous(op: str, name: str, buffer: Tensor) -> None:
    # not part of a signature, so of every call
    if not buffer.is_contiguous():
        raise ValueError(f"{op}: `{name}` is updated in place and must be contiguous; make it with torch.zeros.")


@once_per_signature
def _check_conv(
    history: Tensor, accepted: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    op = "conv_verify"
    _check_inputs(op, "x", x=x, history=history, weight=weight, bias=bias)
    check_activation(op, activation)
    check_shape(op, "x", x, (None, None, None), "(B, T, D)")
    batch, tokens, channels = x.shape
    check_shape(op, "history", history, (batch, None, channels), "(B, K + T, D)")
    check_shape(op, "weight", weight, (channels, None), "(D, W)")
    if history.shape[1] < tokens + weight.shape[1] - 1:
        raise ValueError(
            f"{op}: `history` must hold at least T + W - 1 = {tokens + weight.shape[1] - 1} tokens, got {history.shape[1]}."
        )
    if bias is not None:
        check_shape(op, "bias", bias, (channels,), "(D,)")
    _check_buffer(op, "history", history, accepted, batch)


def conv_verify(
    history: Tensor,
    accepted: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The causal convolution of T tokens after the accepted one, with its inputs kept. No gradients.

    Args:
        history: (B, K + T, D) float, contiguous, K >= W - 1: inputs up to the last token of the call before, in order; updated in
            place. The inputs that end with its token t are rows t + 1 to t + K.
        accepted: (B,) integer from -1 to T - 1, the token after which x comes; -1 is the one before the call before.
        x: (B, T, D) float.
        weight: (D, W).
        bias: (D,), or None.
        activation: "silu", "swish" or None.

    Returns:
        (B, T, D) in x.dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear`.

    Example:
        >>> import torch
        >>> from mamba_kernels.decode import conv_verify
        >>> history, x, weight = torch.zeros(1, 3 + 2, 6), torch.randn(1, 2, 6), torch.randn(6, 4)
        >>> y = conv_verify(history, torch.tensor([1]), x, weight)
        >>> y.shape, torch.equal(history[:, 3:], x)
        (torch.Size([1, 2, 6]), True)
    """
    _check_conv(history, accepted, x, weight, bias, activation)
    _check_contiguous("conv_verify", "history", history)
    name = select("causal_conv1d_update", x.device)
    if name == "triton":
        from .triton_verify import conv_verify_triton as run
    else:
        run = conv_verify_ref if name == "reference" else conv_verify_eager
    with on_device(x.device):
        return run(history, accepted, x, weight, bias, activation=activation).to(x.dtype)


@once_per_signature
def _check_mamba(
    states: Tensor,
    accepted: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
) -> None:
    op = "mamba_verify"
    _check_inputs(
        op,
        "x",
        x=x,
        states=states,
        parameters=parameters,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        z=z,
    )
    check_shape(op, "x", x, (None, None, None), "(B, T, D)")
    batch, tokens, channels = x.shape
    check_shape(op, "A_log", A_log, (channels, None), "(D, N)")
    size = A_log.shape[1]
    check_shape(op, "states", states, (batch, tokens, channels, size), "(B, T, D, N)")
    check_shape(op, "dt_weight", dt_weight, (channels, None), "(D, R)")
    check_shape(op, "parameters", parameters, (batch, tokens, dt_weight.shape[1] + 2 * size), "(B, T, R + 2 N)")
    check_shape(op, "dt_bias", dt_bias, (channels,), "(D,)")
    check_shape(op, "D", D, (channels,), "(D,)")
    check_shape(op, "z", z, (batch, tokens, channels), "(B, T, D)")
    _check_buffer(op, "states", states, accepted, batch)


def mamba_verify(
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
    """`mamba_step` for T tokens after the accepted one, with the state after each of them. No gradients.

    Args:
        states: (B, T, D, N) float, contiguous: the state after each token of the call before; updated in place.
        accepted: (B,) integer from 0 to T - 1, the token after which x comes.
        x: (B, T, D), after the convolution.
        parameters: (B, T, R + 2 N), the output of `x_proj`.
        z: (B, T, D), the gate before silu.

    All others as in `mamba_step`.

    Returns:
        (B, T, D) in x.dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear`.
    """
    _check_mamba(states, accepted, x, parameters, dt_weight, dt_bias, A_log, D, z)
    _check_contiguous("mamba_verify", "states", states)
    name = select("mamba_step", x.device)
    if name == "triton":
        from .triton_verify import mamba_verify_triton as run
    else:
        run = mamba_verify_ref if name == "reference" else mamba_verify_eager
    with on_device(x.device):
        return run(states, accepted, x, parameters, dt_weight, dt_bias, A_log, D, z, norm_eps=norm_eps).to(x.dtype)


@once_per_signature
def _check_mamba2(
    states: Tensor,
    accepted: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
) -> None:
    op = "mamba2_verify"
    _check_inputs(op, "xBC", xBC=xBC, states=states, dt=dt, dt_bias=dt_bias, A_log=A_log, D=D)
    check_shape(op, "states", states, (None, None, None, None, None), "(B, T, H, P, N)")
    batch, tokens, heads, head_dim, size = states.shape
    if groups < 1 or heads % groups != 0:
        raise ValueError(f"{op}: `groups` must divide the {heads} heads, got {groups}.")
    width = heads * head_dim + 2 * groups * size
    check_shape(op, "xBC", xBC, (batch, tokens, width), "(B, T, H P + 2 G N)")
    check_shape(op, "dt", dt, (batch, tokens, heads), "(B, T, H)")
    for name, value in (("dt_bias", dt_bias), ("A_log", A_log), ("D", D)):
        check_shape(op, name, value, (heads,), "(H,)")
    _check_buffer(op, "states", states, accepted, batch)


def mamba2_verify(
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
    """`mamba2_step` for T tokens after the accepted one, with the state after each of them. No gradients.

    Args:
        states: (B, T, H, P, N) float, contiguous: the state after each token of the call before; updated in place.
        accepted: (B,) integer from 0 to T - 1, the token after which xBC comes.
        xBC: (B, T, H P + 2 G N), after the convolution: x, B and C side by side.
        dt: (B, T, H).

    All others as in `mamba2_step`.

    Returns:
        (B, T, H P) in xBC.dtype, not gated.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear`; or groups that do not divide the heads.
    """
    _check_mamba2(states, accepted, xBC, dt, dt_bias, A_log, D, groups)
    _check_contiguous("mamba2_verify", "states", states)
    name = select("mamba2_step", xBC.device)
    if name == "triton":
        from .triton_verify import mamba2_verify_triton as run
    else:
        run = mamba2_verify_ref if name == "reference" else mamba2_verify_eager
    with on_device(xBC.device):
        return run(states, accepted, xBC, dt, dt_bias, A_log, D, groups, dt_limit=dt_limit).to(xBC.dtype)
