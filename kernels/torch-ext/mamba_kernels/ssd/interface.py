"""The public SSD scan: shapes, options and what packed sequences mean for it."""

import math

from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import on_device, select
from ..packing import check_packing
from ..signatures import once_per_signature
from .eager import ssd_chunk_scan_eager
from .reference import ssd_chunk_scan_ref

__all__ = ["ssd_chunk_scan"]

OP = "ssd_chunk_scan"


@once_per_signature
def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, value in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z), ("dt_bias", dt_bias)):
        if value is not None or name in ("x", "dt", "A", "B", "C"):
            check_tensor(OP, name, value)
            assert value is not None
            check_dtype(OP, name, value)
    check_shape(OP, "x", x, (None, None, None, None), "(B, L, H, P)")
    batch, length, heads, head_dim = x.shape
    check_shape(OP, "dt", dt, (batch, length, heads), "(B, L, H)")
    check_shape(OP, "A", A, (heads,), "(H,)")
    check_shape(OP, "B", B, (batch, length, None, None), "(B, L, G, N)")
    check_shape(OP, "C", C, tuple(B.shape), "(B, L, G, N)")
    groups = B.shape[2]
    if groups < 1 or heads % groups:
        raise ValueError(
            f"{OP}: the number of groups of `B` and `C` must divide the number of heads of `x`, "
            f"got {groups} groups and {heads} heads."
        )
    if D is not None and D.dim() != 1:
        check_shape(OP, "D", D, (heads, head_dim), "(H,) or (H, P)")
    elif D is not None:
        check_shape(OP, "D", D, (heads,), "(H,) or (H, P)")
    if z is not None:
        check_shape(OP, "z", z, tuple(x.shape), "(B, L, H, P)")
    if dt_bias is not None:
        check_shape(OP, "dt_bias", dt_bias, (heads,), "(H,)")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{OP}: `chunk_size` must be a positive integer, got {chunk_size!r}.")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{OP}: `dt_limit` must be (smallest, largest) with smallest <= largest, got {dt_limit}.")
    n_states = check_packing(OP, batch, length, seq_idx, cu_seqlens)
    if initial_states is not None:
        check_tensor(OP, "initial_states", initial_states)
        check_dtype(OP, "initial_states", initial_states)
        legend = "(B, H, P, N)" if cu_seqlens is None else "(n, H, P, N)"
        check_shape(OP, "initial_states", initial_states, (n_states, heads, head_dim, B.shape[3]), legend)
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


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's SSD scan (Dao and Gu, arXiv 2405.21060, section 6 and Listing 1).

    For each head, with `dt' = clamp(softplus(dt + dt_bias), dt_limit)`:
    `h[t] = exp(dt'[t] A) h[t-1] + dt'[t] x[t] B[t]ᵀ` and `y[t] = h[t] C[t] + D x[t]`, times `silu(z[t])` if there is a gate.

    B batch, L length, H heads, P head_dim, G groups, N state size, S states: B, or one a sequence with `cu_seqlens`.

    Args:
        x: (B, L, H, P), fp32, bf16, fp16 or fp64, any strides, any L ≥ 0.
        dt: (B, L, H), step sizes before bias and softplus.
        A: (H,), negative.
        B, C: (B, L, G, N); head h uses group h // (H / G).
        chunk_size: tokens a chunk, at most, a hint for speed. The result does not depend on it.
        D: (H,) or (H, P), skip connection, or None.
        z: (B, L, H, P), gate, or None.
        dt_bias: (H,) or None.
        dt_softplus: apply softplus to dt + dt_bias (linear above 20).
        dt_limit: smallest and largest step size; the gradient of a step outside is zero.
        initial_states: (S, H, P, N), state before the first token; None means zeros.
        seq_idx: (B, L) integer, the number of each token's sequence. The state starts from zero wherever it changes, and
            `initial_states` reaches only a row's first sequence. A negative number marks padding: output 0, no gradient,
            state untouched.
        cu_seqlens: (n + 1,) integer, cumulative lengths of n sequences laid end to end in a batch of one.
        return_final_states: also return the state after each row's last real token, or after each sequence with
            `cu_seqlens` (an empty one gives back its initial state).

    Returns:
        y (B, L, H, P) in x.dtype, or (y, final_states) with final_states (S, H, P, N) in fp32 (fp64 for fp64 `x`).

    Differentiable in every tensor, `initial_states` included, through `y` and `final_states`, once. State and sums are fp32.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype, for example a complex `A`.
        ValueError: a shape, device, `chunk_size`, `dt_limit` or packing that does not fit.

    Example:
        >>> import torch, mamba_kernels
        >>> x, dt, A = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 4), -torch.rand(4)
        >>> B, C = torch.randn(1, 10, 2, 16), torch.randn(1, 10, 2, 16)
        >>> y, state = mamba_kernels.ssd_chunk_scan(x, dt, A, B, C, return_final_states=True)
        >>> print(tuple(y.shape), tuple(state.shape))
        (1, 10, 4, 8) (1, 4, 8, 16)
    """
    _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_limit, initial_states, seq_idx, cu_seqlens)
    if cu_seqlens is not None:
        # its values count, too
        check_packing(OP, x.shape[0], x.shape[1], seq_idx, cu_seqlens)
    name = select(OP, x.device)
    if name == "triton":
        from .triton_scan import ssd_chunk_scan_triton as run
    elif name == "reference":
        run = ssd_chunk_scan_ref
    else:
        run = ssd_chunk_scan_eager
    with on_device(x.device):
        return run(
            x,
            dt,
            A,
            B,
            C,
            chunk_size=chunk_size,
            D=D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
