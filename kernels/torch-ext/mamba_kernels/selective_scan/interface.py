"""The public `selective_scan`: argument checks and the choice of an implementation."""

from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import on_device, select
from ..packing import check_packing
from ..signatures import once_per_signature
from .eager import selective_scan_eager
from .reference import selective_scan_ref

__all__ = ["selective_scan"]

OP = "selective_scan"


@once_per_signature
def _check_operands(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, value in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C)):
        check_tensor(OP, name, value)
        check_dtype(OP, name, value)
    if x.dim() != 3:
        raise ValueError(f"{OP}: `x` must have shape (B, L, D), got {tuple(x.shape)}.")
    batch, length, channels = x.shape
    check_shape(OP, "dt", dt, (batch, length, channels), "(B, L, D)")
    check_shape(OP, "A", A, (channels, None), "(D, N)")
    size = A.shape[1]
    if B.dim() == 4:
        groups = B.shape[2]
        if groups == 0 or channels % groups != 0:
            raise ValueError(
                f"{OP}: the number of groups must divide the number of channels, got {groups} groups in `B` and "
                f"{channels} channels in `x`."
            )
        check_shape(OP, "B", B, (batch, length, groups, size), "(B, L, G, N)")
        check_shape(OP, "C", C, (batch, length, groups, size), "(B, L, G, N)")
    else:
        check_shape(OP, "B", B, (batch, length, size), "(B, L, N)")
        check_shape(OP, "C", C, (batch, length, size), "(B, L, N)")
    for name, weight in (("D", D), ("dt_bias", dt_bias)):
        if weight is not None:
            check_tensor(OP, name, weight)
            check_dtype(OP, name, weight)
            check_shape(OP, name, weight, (channels,), "(D,)")
    if z is not None:
        check_tensor(OP, "z", z)
        check_dtype(OP, "z", z, (x.dtype,))
        check_shape(OP, "z", z, (batch, length, channels), "(B, L, D)")
    n_states = check_packing(OP, batch, length, seq_idx, cu_seqlens)
    if initial_states is not None:
        check_tensor(OP, "initial_states", initial_states)
        check_dtype(OP, "initial_states", initial_states)
        legend = "(B, D, N)" if cu_seqlens is None else "(n, D, N)"
        check_shape(OP, "initial_states", initial_states, (n_states, channels, size), legend)
    check_same_device(
        OP,
        ("x", x),
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space recurrence (S6) of Mamba, arXiv 2312.00752, Algorithm 2, with its gate.

    For each channel d, with delta = softplus(dt + dt_bias) and a state of N numbers::

        h_t = exp(delta_t * A) * h_{t-1} + delta_t * B_t * x_t
        y_t = (C_t . h_t + D * x_t) * silu(z_t)

    Computed in fp32 (fp64 when x is fp64). Any strides are accepted. On a CPU a thread keeps up to 64 MB of scratch memory from
    one call to the next, and backward is left delta, (B, L, D) in the dtype of the computation, beside the arguments.

    Args:
        x: (B, L, D) float.
        dt: (B, L, D) float, the step before bias and softplus.
        A: (D, N) float, usually negative.
        B, C: (B, L, N), or (B, L, G, N) with G groups of D / G channels each; float.
        D: (D,) float, the skip weight; None for no skip.
        z: (B, L, D) gate with the dtype of x; None for no gate.
        dt_bias: (D,) float, added to dt.
        dt_softplus: whether delta = softplus(dt + dt_bias) or just dt + dt_bias.
        initial_states: (S, D, N) float, the state before the first token: S = B, or one for each of n sequences with
            `cu_seqlens`. With `seq_idx` it reaches only the first sequence of each row.
        seq_idx: (B, L) integer, the sequence of each token. The state starts anew where it changes; a negative number is
            padding, which gives output 0, receives no gradient and leaves the state alone.
        cu_seqlens: (n + 1,) integer, cumulative lengths of n sequences packed in a batch of one. Empty ones are allowed
            and return their initial state.
        return_final_states: also return the state after the last token.

    Returns:
        y (B, L, D) in the dtype of x; with `return_final_states` also the final states (S, D, N) in fp32 (fp64 when x is
        fp64). Both are differentiable once, with respect to every float argument; a second derivative raises.

    Raises:
        TypeError: an argument that is no tensor or has the wrong dtype.
        ValueError: a shape that does not fit, tensors on different devices, or contradictory packing.

    Example:
        >>> import torch
        >>> from mamba_kernels import selective_scan
        >>> x, dt = torch.randn(2, 2, 10, 6).unbind(0)
        >>> B, C = torch.randn(2, 2, 10, 4).unbind(0)
        >>> y, states = selective_scan(x, dt, -torch.rand(6, 4), B, C, return_final_states=True)
        >>> y.shape, states.shape
        (torch.Size([2, 10, 6]), torch.Size([2, 6, 4]))
    """
    _check_operands(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens)
    if cu_seqlens is not None:
        # what it holds may differ each time
        check_packing(OP, x.shape[0], x.shape[1], seq_idx, cu_seqlens)
    # forcing it works before OPS says that it is chosen by itself
    name = select(OP, x.device)
    if name == "triton":
        from .triton_scan import selective_scan_triton as implementation
    else:
        implementation = selective_scan_ref if name == "reference" else selective_scan_eager
    with on_device(x.device):
        return implementation(
            x,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
