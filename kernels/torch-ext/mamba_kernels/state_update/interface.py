"""The public state updates, which advance a cache by one or a few tokens: argument checks and dispatch."""

import torch
from torch import Tensor

from ..checks import check_activation, check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import on_device, select
from ..packing import INTEGER_DTYPES
from ..signatures import once_per_signature
from .eager import causal_conv1d_update_eager, selective_state_update_eager, ssd_state_update_eager
from .reference import causal_conv1d_update_ref, selective_state_update_ref, ssd_state_update_ref

__all__ = ["causal_conv1d_update", "selective_state_update", "ssd_state_update"]

UNLIMITED = (0.0, float("inf"))


def _check_floats(op: str, parallel_op: str, required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Check that all are float tensors, and that no gradient is expected of them."""
    given = [*required.items(), *((name, value) for name, value in optional.items() if value is not None)]
    differentiates = torch.is_grad_enabled()
    for name, value in given:
        check_tensor(op, name, value)
        check_dtype(op, name, value)
        if differentiates and value.requires_grad:
            raise RuntimeError(
                f"{op} updates its state in place and has no gradient, but `{name}` requires one; run it under "
                f"torch.no_grad(), or use {parallel_op} with initial_states to differentiate."
            )


def _check_rows(op: str, name: str, state: Tensor, batch: int, state_indices: Tensor | None) -> None:
    if state_indices is None:
        if state.shape[0] != batch:
            raise ValueError(
                f"{op}: `{name}` must have one row for each of the {batch} batch entries, got {state.shape[0]}; say with "
                "state_indices which rows to use."
            )
        return
    check_tensor(op, "state_indices", state_indices)
    check_dtype(op, "state_indices", state_indices, INTEGER_DTYPES)
    check_shape(op, "state_indices", state_indices, (batch,), "(B,)")


def _check_B_and_C(
    op: str, B: Tensor, C: Tensor, lead: tuple[int, ...], size: int, channels: int, grouped: bool
) -> None:
    legend = "(B, G, N)" if len(lead) == 1 else "(B, T, G, N)"
    if grouped:
        groups = B.shape[-2] if B.dim() >= 2 else 0
        check_shape(op, "B", B, (*lead, None, size), legend)
        check_shape(op, "C", C, (*lead, groups, size), legend)
        if groups == 0 or channels % groups != 0:
            raise ValueError(f"{op}: the {groups} groups of `B` must divide the {channels} channels or heads of `x`.")
    else:
        legend = legend.replace("G, ", "")
        check_shape(op, "B", B, (*lead, size), legend)
        check_shape(op, "C", C, (*lead, size), legend)


@once_per_signature
def _check_selective(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    op = "selective_state_update"
    required = {"x": x, "state": state, "dt": dt, "A": A, "B": B, "C": C}
    optional = {"D": D, "z": z, "dt_bias": dt_bias}
    _check_floats(op, "selective_scan", required, optional)
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] == 0):
        raise ValueError(f"{op}: `x` must have shape (B, D), or (B, T, D) with T >= 1, got {tuple(x.shape)}.")
    channels, lead = x.shape[-1], tuple(x.shape[:-1])
    legend = "(B, D)" if x.dim() == 2 else "(B, T, D)"
    check_shape(op, "dt", dt, tuple(x.shape), legend)
    check_shape(op, "A", A, (channels, None), "(D, N)")
    check_shape(op, "state", state, (None, channels, A.shape[1]), "(S, D, N)")
    _check_B_and_C(op, B, C, lead, A.shape[1], channels, grouped=B.dim() == len(lead) + 2)
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            check_shape(op, name, value, (channels,), "(D,)")
    if z is not None:
        check_dtype(op, "z", z, (x.dtype,))
        check_shape(op, "z", z, tuple(x.shape), legend)
    _check_rows(op, "state", state, x.shape[0], state_indices)
    check_same_device(op, ("x", x), **required, **optional, state_indices=state_indices)


@once_per_signature
def _check_ssd(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    state_indices: Tensor | None,
) -> None:
    op = "ssd_state_update"
    required = {"x": x, "state": state, "dt": dt, "A": A, "B": B, "C": C}
    optional = {"D": D, "z": z, "dt_bias": dt_bias}
    _check_floats(op, "ssd_chunk_scan", required, optional)
    if x.dim() not in (3, 4) or (x.dim() == 4 and x.shape[1] == 0):
        raise ValueError(f"{op}: `x` must have shape (B, H, P), or (B, T, H, P) with T >= 1, got {tuple(x.shape)}.")
    (heads, head_dim), lead = x.shape[-2:], tuple(x.shape[:-2])
    single = x.dim() == 3
    check_shape(op, "dt", dt, (*lead, heads), "(B, H)" if single else "(B, T, H)")
    check_shape(op, "A", A, (heads,), "(H,)")
    check_shape(op, "state", state, (None, heads, head_dim, None), "(S, H, P, N)")
    _check_B_and_C(op, B, C, lead, state.shape[3], heads, grouped=True)
    if D is not None:
        if D.dim() == 2:
            check_shape(op, "D", D, (heads, head_dim), "(H, P)")
        else:
            check_shape(op, "D", D, (heads,), "(H,)")
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, (heads,), "(H,)")
    if z is not None:
        check_dtype(op, "z", z, (x.dtype,))
        check_shape(op, "z", z, tuple(x.shape), "(B, H, P)" if single else "(B, T, H, P)")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{op}: `dt_limit` must be (smallest, largest) with smallest <= largest, got {dt_limit}.")
    _check_rows(op, "state", state, x.shape[0], state_indices)
    check_same_device(op, ("x", x), **required, **optional, state_indices=state_indices)


@once_per_signature
def _check_conv(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state_indices: Tensor | None,
) -> None:
    op = "causal_conv1d_update"
    required = {"x": x, "conv_state": conv_state, "weight": weight}
    _check_floats(op, "causal_conv1d", required, {"bias": bias})
    check_activation(op, activation)
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] == 0):
        raise ValueError(f"{op}: `x` must have shape (B, D), or (B, T, D) with T >= 1, got {tuple(x.shape)}.")
    channels = x.shape[-1]
    check_shape(op, "weight", weight, (channels, None), "(D, W)")
    if weight.shape[1] == 0:
        raise ValueError(f"{op}: `weight` must have shape (D, W) with W >= 1, got {tuple(weight.shape)}.")
    check_shape(op, "conv_state", conv_state, (None, channels, None), "(S, D, K)")
    if conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"{op}: `conv_state` must keep at least W - 1 = {weight.shape[1] - 1} tokens, got {conv_state.shape[2]}."
        )
    if bias is not None:
        check_shape(op, "bias", bias, (channels,), "(D,)")
    _check_rows(op, "conv_state", conv_state, x.shape[0], state_indices)
    check_same_device(op, ("x", x), conv_state=conv_state, weight=weight, bias=bias, state_indices=state_indices)


def selective_state_update(
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
    """Advance the state of Mamba by one or a few tokens: `selective_scan` for decoding (arXiv 2312.00752, Algorithm 2).

    Forward only. Computed in fp32 (fp64 when x is fp64) whatever the dtype of the state.

    Args:
        state: (S, D, N) float, updated in place.
        x: (B, D), or (B, T, D) for T >= 1 tokens; float.
        dt: shape of x, float, the step before bias and softplus.
        A: (D, N) float.
        B, C: (B, N) or (B, G, N); with T tokens (B, T, N) or (B, T, G, N). Float; G groups of D / G channels each.
        D: (D,) float, the skip weight; None for no skip.
        z: shape and dtype of x, the gate; None for no gate.
        dt_bias: (D,) float, added to dt.
        dt_softplus: whether delta = softplus(dt + dt_bias) or just dt + dt_bias.
        state_indices: (B,) integer, the row of `state` for each batch entry, without repeats. A negative one is padding: its
            output is 0 and no row changes. None: entry b uses row b, and S == B.
        return_step_states: also return the state after each token.

    Returns:
        y in the shape and dtype of x; with `return_step_states` also the states (B, T, D, N), or (B, D, N) for x (B, D), in
        the dtype of `state`, 0 for padding.

    Raises:
        TypeError: an argument that is no tensor or has the wrong dtype.
        ValueError: a shape that does not fit, or tensors on different devices.
        RuntimeError: gradients are enabled and an argument requires one.

    Example:
        >>> import torch
        >>> from mamba_kernels import selective_state_update
        >>> state = torch.zeros(2, 6, 4)
        >>> x, dt = torch.randn(2, 2, 6).unbind(0)
        >>> B, C = torch.randn(2, 2, 4).unbind(0)
        >>> selective_state_update(state, x, dt, -torch.rand(6, 4), B, C).shape
        torch.Size([2, 6])
    """
    op = "selective_state_update"
    _check_selective(state, x, dt, A, B, C, D, z, dt_bias, state_indices)
    name = select(op, x.device)
    if name == "triton":
        from .triton_selective import selective_state_update_triton as implementation
    else:
        implementation = selective_state_update_ref if name == "reference" else selective_state_update_eager
    with on_device(x.device):
        return implementation(
            state,
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            state_indices=state_indices,
            return_step_states=return_step_states,
        )


def ssd_state_update(
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
    dt_limit: tuple[float, float] = UNLIMITED,
    state_indices: Tensor | None = None,
    return_step_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Advance the state of Mamba-2 by one or a few tokens: `ssd_chunk_scan` for decoding (arXiv 2405.21060, section 3).

    Forward only. Computed in fp32 (fp64 when x is fp64) whatever the dtype of the state.

    Args:
        state: (S, H, P, N) float, updated in place.
        x: (B, H, P), or (B, T, H, P) for T >= 1 tokens; float.
        dt: (B, H) or (B, T, H) float, the step before bias, softplus and limits.
        A: (H,) float.
        B, C: (B, G, N) or (B, T, G, N) float; G groups of H / G heads each.
        D: (H,) or (H, P) float, the skip weight; None for no skip.
        z: shape and dtype of x, the gate; None for no gate.
        dt_bias: (H,) float, added to dt.
        dt_softplus: whether to pass dt + dt_bias through softplus.
        dt_limit: smallest and largest step, applied last.
        state_indices: (B,) integer, the row of `state` for each batch entry, without repeats. A negative one is padding: its
            output is 0 and no row changes. None: entry b uses row b, and S == B.
        return_step_states: also return the state after each token.

    Returns:
        y in the shape and dtype of x; with `return_step_states` also the states (B, T, H, P, N), or (B, H, P, N) for
        x (B, H, P), in the dtype of `state`, 0 for padding.

    Raises:
        TypeError: an argument that is no tensor or has the wrong dtype.
        ValueError: a shape that does not fit, limits in the wrong order, or tensors on different devices.
        RuntimeError: gradients are enabled and an argument requires one.

    Example:
        >>> import torch
        >>> from mamba_kernels import ssd_state_update
        >>> state = torch.zeros(2, 3, 8, 4)
        >>> B, C = torch.randn(2, 2, 1, 4).unbind(0)
        >>> ssd_state_update(state, torch.randn(2, 3, 8), torch.randn(2, 3), -torch.rand(3), B, C).shape
        torch.Size([2, 3, 8])
    """
    op = "ssd_state_update"
    _check_ssd(state, x, dt, A, B, C, D, z, dt_bias, dt_limit, state_indices)
    name = select(op, x.device)
    if name == "triton":
        from .triton_ssd import ssd_state_update_triton as implementation
    else:
        implementation = ssd_state_update_ref if name == "reference" else ssd_state_update_eager
    with on_device(x.device):
        return implementation(
            state,
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=(float(dt_limit[0]), float(dt_limit[1])),
            state_indices=state_indices,
            return_step_states=return_step_states,
        )


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """Advance the depthwise causal convolution by one or a few tokens: `causal_conv1d` for decoding.

    Forward only. Sums in fp32 (fp64 when x is fp64).

    Args:
        x: (B, D), or (B, T, D) for T >= 1 tokens; float.
        conv_state: (S, D, K) float with K >= W - 1, the last K inputs of each channel, newest last. Updated in place; inputs
            are kept as they are, in its dtype.
        weight: (D, W) float; the last column meets the newest token.
        bias: (D,) float, or None.
        activation: None, "silu" or "swish" (the same).
        state_indices: (B,) integer, the row of `conv_state` for each batch entry, without repeats. A negative one is padding:
            its output is 0 and no row changes. None: entry b uses row b, and S == B.

    Returns:
        y in the shape and dtype of x.

    Raises:
        TypeError: an argument that is no tensor or has the wrong dtype.
        ValueError: a shape that does not fit, an unknown activation, or tensors on different devices.
        RuntimeError: gradients are enabled and an argument requires one.

    Example:
        >>> import torch
        >>> from mamba_kernels import causal_conv1d_update
        >>> conv_state = torch.zeros(2, 6, 4)
        >>> causal_conv1d_update(torch.randn(2, 6), conv_state, torch.randn(6, 4), activation="silu").shape
        torch.Size([2, 6])
    """
    op = "causal_conv1d_update"
    _check_conv(x, conv_state, weight, bias, activation, state_indices)
    name = select(op, x.device)
    if name == "triton":
        from .triton_conv import causal_conv1d_update_triton as implementation
    else:
        implementation = causal_conv1d_update_ref if name == "reference" else causal_conv1d_update_eager
    with on_device(x.device):
        return implementation(
            x,
            conv_state,
            weight,
            bias=bias,
            activation=activation,
            state_indices=state_indices,
        )
