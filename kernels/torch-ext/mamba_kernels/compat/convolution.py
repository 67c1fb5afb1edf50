"""`causal_conv1d_fn`, `causal_conv1d_update` and `causal_conv1d_varlen_states`, channel-first as in `causal_conv1d`."""

import torch
from torch import Tensor

from ..causal_conv1d import causal_conv1d
from ..checks import check_activation, check_dtype, check_same_device, check_shape, check_tensor
from ..packing import INTEGER_DTYPES, check_packing
from ..state_update import causal_conv1d_update as channel_last_update
from .layout import like_layout, refuse_gradients

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d.causal_conv1d_fn` on `mamba_kernels.causal_conv1d`.

    Args:
        x: (B, D, L), any strides.
        weight: (D, W), any W ≥ 1. bias: (D,) or None.
        seq_idx: (B, L) integer, the sequence of each token; negative = padding. Allowed together with states.
        initial_states: (B, D, W - 1) or None.
        return_final_states: also return the last W - 1 inputs, (B, D, W - 1).
        final_states_out: (B, D, W - 1), written in place and returned as the final states.
        activation: None, "silu" or "swish".

    Returns:
        out (B, D, L) in the dtype and memory layout of x, or (out, final_states).

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape that does not fit, or `final_states_out` without `return_final_states`.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import causal_conv1d_fn
        >>> out = causal_conv1d_fn(torch.randn(2, 4, 10), torch.randn(4, 3), activation="silu")
        >>> print(out.shape)
        torch.Size([2, 4, 10])
    """
    op = "causal_conv1d_fn"
    check_tensor(op, "x", x)
    check_shape(op, "x", x, (None, None, None), "(B, D, L)")
    check_tensor(op, "weight", weight)
    check_shape(op, "weight", weight, (x.shape[1], None), "(D, W)")
    if final_states_out is not None:
        check_tensor(op, "final_states_out", final_states_out)
        if not return_final_states:
            raise ValueError(f"{op}: `final_states_out` is written only with return_final_states=True; pass both.")
        shape = (x.shape[0], x.shape[1], weight.shape[1] - 1)
        check_shape(op, "final_states_out", final_states_out, shape, "(B, D, W - 1)")
    result = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias=bias,
        activation=activation,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )
    if not isinstance(result, tuple):
        return like_layout(result.transpose(1, 2), x)
    out, final = result
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return like_layout(out.transpose(1, 2), x), final


def _circular_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """Tokens x (B, T, D) over a state (S, D, K) in which input number i lies at place i mod K."""
    op = "causal_conv1d_update"
    batch, steps, width = x.shape
    check_dtype(op, "cache_seqlens", cache_seqlens, INTEGER_DTYPES)
    check_shape(op, "cache_seqlens", cache_seqlens, (batch,), "(B,)")
    check_shape(op, "weight", weight, (width, None), "(D, W)")
    before = weight.shape[1] - 1
    check_shape(op, "conv_state", conv_state, (None if rows is not None else batch, width, None), "(S, D, K)")
    size = conv_state.shape[2]
    if size < before or size == 0:
        raise ValueError(f"{op}: `conv_state` must hold at least W - 1 = {before} (and one) inputs, got {size}.")
    if rows is None:
        rows = torch.arange(batch, device=x.device)
    else:
        check_dtype(op, "conv_state_indices", rows, INTEGER_DTYPES)
        check_shape(op, "conv_state_indices", rows, (batch,), "(B,)")
    valid = rows >= 0
    rows = rows.clamp(min=0).long()
    old = torch.remainder(cache_seqlens[:, None] + torch.arange(-before, 0, device=x.device), size)
    state = conv_state.index_select(0, rows)
    window = state.gather(2, old.long()[:, None].expand(-1, width, -1))
    y = causal_conv1d(x, weight, bias, activation=activation, initial_states=window.to(x.dtype))
    assert isinstance(y, Tensor)
    # of more tokens than the state holds only the last ones stay
    kept = min(steps, size)
    new = torch.remainder(cache_seqlens[:, None] + torch.arange(steps - kept, steps, device=x.device), size)
    value = x[:, steps - kept :].transpose(1, 2).to(conv_state.dtype)
    state = state.scatter(2, new.long()[:, None].expand(-1, width, -1), value)
    # padding writes to one row too many, which is then dropped
    room = torch.cat([conv_state, conv_state.new_empty(1, width, size)])
    room.index_copy_(0, torch.where(valid, rows, conv_state.shape[0]), state)
    conv_state.copy_(room[:-1])
    return torch.where(valid[:, None, None], y, 0.0)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d.causal_conv1d_update`: convolve one or a few tokens over a cached state, updated in place.

    Args:
        x: (B, D) or (B, D, T).
        conv_state: (S, D, K), K ≥ W - 1: the last K inputs, oldest first; with `cache_seqlens` a circular buffer.
        weight: (D, W). bias: (D,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) integer, the number of inputs seen so far; input i lies at place i mod K of the state.
        conv_state_indices: (B,) integer, the row of `conv_state` of each batch entry; negative = padding, which gives 0 and
            leaves the state alone. None: S = B.

    Returns:
        out, shaped as x, in x.dtype.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape that does not fit.
        RuntimeError: gradients are enabled and an argument requires one; the update has no backward.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import causal_conv1d_update
        >>> state = torch.zeros(2, 4, 3)
        >>> out = causal_conv1d_update(torch.randn(2, 4), state, torch.randn(4, 4), activation="silu")
        >>> print(out.shape, bool((state[..., -1] != 0).all()))
        torch.Size([2, 4]) True
    """
    op = "causal_conv1d_update"
    for name, value in (("x", x), ("conv_state", conv_state), ("weight", weight)):
        check_tensor(op, name, value)
    check_activation(op, activation)
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: `x` must have shape (B, D) or (B, D, T), got {tuple(x.shape)}.")
    channel_last = x[:, None] if x.dim() == 2 else x.transpose(1, 2)
    if cache_seqlens is None:
        out = channel_last_update(
            channel_last,
            conv_state,
            weight,
            bias=bias,
            activation=activation,
            state_indices=conv_state_indices,
        )
    else:
        check_tensor(op, "cache_seqlens", cache_seqlens)
        check_same_device(
            op,
            ("x", x),
            conv_state=conv_state,
            cache_seqlens=cache_seqlens,
            conv_state_indices=conv_state_indices,
        )
        enabled = torch.is_grad_enabled()
        refuse_gradients(op, "causal_conv1d_fn", enabled, x=x, conv_state=conv_state, weight=weight, bias=bias)
        out = _circular_update(channel_last, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    return out[:, 0] if x.dim() == 2 else like_layout(out.transpose(1, 2), x)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states`: the last inputs of each packed sequence.

    Args:
        x: (L, D), n sequences laid end to end.
        cu_seqlens: (n + 1,) integer, their cumulative lengths.
        state_len: how many inputs to keep.

    Returns:
        (n, D, state_len) in x.dtype, zeros on the left where a sequence is shorter. Differentiable.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape that does not fit, or a negative `state_len`.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import causal_conv1d_varlen_states
        >>> x, cu_seqlens = torch.arange(1.0, 6.0)[:, None], torch.tensor([0, 1, 5])
        >>> print(causal_conv1d_varlen_states(x, cu_seqlens, state_len=3).tolist())
        [[[0.0, 0.0, 1.0]], [[3.0, 4.0, 5.0]]]
    """
    op = "causal_conv1d_varlen_states"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    check_shape(op, "x", x, (None, None), "(L, D)")
    check_packing(op, 1, x.shape[0], None, cu_seqlens)
    if state_len < 0:
        raise ValueError(f"{op}: `state_len` must not be negative, got {state_len}.")
    length = x.shape[0]
    positions = cu_seqlens[1:, None] + torch.arange(-state_len, 0, device=x.device)
    # the row of zeros stands in for what lies before a sequence
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    positions = torch.where(positions >= cu_seqlens[:-1, None], positions, length)
    return padded[positions].transpose(1, 2).contiguous()
