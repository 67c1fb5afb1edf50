"""The public causal convolution: shapes, options and what packed sequences mean for it."""

from torch import Tensor

from ..checks import check_activation, check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import on_device, select
from ..packing import check_packing
from ..signatures import once_per_signature
from .eager import causal_conv1d_eager
from .reference import causal_conv1d_ref

__all__ = ["causal_conv1d"]

OP = "causal_conv1d"


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, value in (("x", x), ("weight", weight)):
        check_tensor(OP, name, value)
        check_dtype(OP, name, value)
    check_shape(OP, "x", x, (None, None, None), "(B, L, D)")
    batch, length, width = x.shape
    check_shape(OP, "weight", weight, (width, None), "(D, W)")
    taps = weight.shape[1]
    if taps < 1:
        raise ValueError(f"{OP}: `weight` must have at least one tap, got shape {tuple(weight.shape)}.")
    if bias is not None:
        check_tensor(OP, "bias", bias)
        check_dtype(OP, "bias", bias)
        check_shape(OP, "bias", bias, (width,), "(D,)")
    check_activation(OP, activation)
    n_states = check_packing(OP, batch, length, seq_idx, cu_seqlens)
    if initial_states is not None:
        check_tensor(OP, "initial_states", initial_states)
        check_dtype(OP, "initial_states", initial_states)
        legend = "(B, D, W - 1)" if cu_seqlens is None else "(n, D, W - 1)"
        check_shape(OP, "initial_states", initial_states, (n_states, width, taps - 1), legend)
    check_same_device(
        OP,
        ("x", x),
        weight=weight,
        bias=bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )


# of `cu_seqlens` values are checked too
_check_once = once_per_signature(_check)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution over time that looks only back: `y[t] = act(bias + Σ_k weight[:, k] · x[t - W + 1 + k])`.

    B batch, L length, D channels, W width, S states: B, or one a sequence with `cu_seqlens`.

    Args:
        x: (B, L, D), fp32, bf16, fp16 or fp64, any strides, any L ≥ 0.
        weight: (D, W), any W ≥ 1; the last column meets the newest input.
        bias: (D,) or None.
        activation: None, "silu" or "swish" (the same).
        initial_states: (S, D, W - 1), the inputs before `x`, oldest first; None means zeros.
        seq_idx: (B, L) integer, the number of each token's sequence. The window never crosses from one sequence to the
            next, and `initial_states` reaches only a row's first. A negative number marks padding: output 0, no
            gradient, and 0 where a later window covers it.
        cu_seqlens: (n + 1,) integer, cumulative lengths of n sequences laid end to end in a batch of one.
        return_final_states: also return the last W - 1 inputs of each row's last sequence, or of each sequence with
            `cu_seqlens`. They reach back into `initial_states` where the sequence is shorter, and trailing padding is
            skipped, so that they continue the sequence.

    Returns:
        y (B, L, D) in x.dtype, or (y, final_states) with final_states (S, D, W - 1) in x.dtype.

    Differentiable in `x`, `weight`, `bias` and `initial_states`, through `y` and through `final_states`. The inner sum
    is in fp32.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape, device, activation or packing that does not fit.

    Example:
        >>> import torch, mamba_kernels
        >>> x, weight = torch.arange(6.0).view(1, 3, 2), torch.ones(2, 2)
        >>> y, state = mamba_kernels.causal_conv1d(x, weight, return_final_states=True)
        >>> print(y[0].tolist(), state[0].tolist())
        [[0.0, 1.0], [2.0, 4.0], [6.0, 8.0]] [[4.0], [5.0]]
    """
    check = _check_once if cu_seqlens is None else _check
    check(x, weight, bias, activation, initial_states, seq_idx, cu_seqlens)
    name = select(OP, x.device)
    if name == "triton":
        from .triton_conv import causal_conv1d_triton as run
    elif name == "reference":
        run = causal_conv1d_ref
    else:
        run = causal_conv1d_eager
    with on_device(x.device):
        return run(
            x,
            weight,
            bias=bias,
            activation=activation,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
