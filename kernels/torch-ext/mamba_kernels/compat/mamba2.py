"""Mamba-2: `mamba_chunk_scan_combined` and `mamba_split_conv1d_scan_combined`."""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..causal_conv1d import causal_conv1d
from ..checks import FLOAT_DTYPES, check_shape, check_tensor
from ..norm import rms_norm_gated
from ..packing import check_packing, cu_seqlens_to_seq_idx, resets_and_valid
from ..ssd import ssd_chunk_scan
from .layout import refuse_complex

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"]


def _check_state_dtype(op: str, state_dtype: torch.dtype | None) -> None:
    if state_dtype is not None and state_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: `state_dtype` must be a floating dtype or None, got {state_dtype}.")


def _check_same_borders(op: str, seq_idx: Tensor, cu_seqlens: Tensor, length: int) -> None:
    """Raise ValueError if the two descriptions of the packing disagree, where their values can be read for free."""
    if seq_idx.device.type != "cpu" or torch.compiler.is_compiling() or not length:
        return
    resets, valid = resets_and_valid(seq_idx)
    borders, _ = resets_and_valid(cu_seqlens_to_seq_idx(cu_seqlens, length))
    if not bool(valid.all()) or not torch.equal(resets, borders):
        raise ValueError(
            f"{op}: `seq_idx` and `cu_seqlens` describe different sequences; give cu_seqlens alone, or a seq_idx that "
            "changes exactly at its borders."
        )


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined` on `mamba_kernels.ssd_chunk_scan`.

    Args:
        x, z: (B, L, H, P); z may be None.
        dt: (B, L, H). A: (H,), real. B, C: (B, L, G, N). D: (H,), (H, P) or None. dt_bias: (H,) or None.
        chunk_size: a hint for speed.
        initial_states: (B, H, P, N) or None. It reaches only the first sequence of a row.
        seq_idx: (B, L) integer, the sequence of each token; negative = padding.
        cu_seqlens: (n + 1,) integer, cumulative lengths in a batch of one. Unlike the original, the sequences are kept apart
            also without `seq_idx`; if both are given they must agree.
        dt_softplus, dt_limit: how dt becomes the step size.
        return_final_states: also return the state after each row's last token, (B, H, P, N) fp32.
        return_varlen_states: also return the state after each sequence of `cu_seqlens`, (n, H, P, N).
        state_dtype: dtype of the varlen states; None for fp32, in which states are always computed.

    Returns:
        out (B, L, H, P) in x.dtype, or a tuple of out, the final states if asked for, and the varlen states if asked for.
        All are differentiable.

    Raises:
        TypeError: complex A, or an argument is no floating tensor.
        ValueError: a shape that does not fit, `return_varlen_states` without `cu_seqlens`, or `seq_idx` and `cu_seqlens`
            that disagree.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import mamba_chunk_scan_combined
        >>> x, dt, A = torch.randn(1, 10, 4, 8), torch.rand(1, 10, 4), -torch.rand(4)
        >>> B, C = torch.randn(1, 10, 1, 16), torch.randn(1, 10, 1, 16)
        >>> print(mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256).shape)
        torch.Size([1, 10, 4, 8])
    """
    op = "mamba_chunk_scan_combined"
    for name, value in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C)):
        check_tensor(op, name, value)
    refuse_complex(op, A=A, B=B, C=C)
    check_shape(op, "x", x, (None, None, None, None), "(B, L, H, P)")
    check_shape(op, "B", B, (*x.shape[:2], None, None), "(B, L, G, N)")
    _check_state_dtype(op, state_dtype)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{op}: `return_varlen_states` needs `cu_seqlens`, which says where the sequences end.")
    batch, length, heads, head_dim = x.shape
    if initial_states is not None:
        check_tensor(op, "initial_states", initial_states)
        check_shape(op, "initial_states", initial_states, (batch, heads, head_dim, B.shape[3]), "(B, H, P, N)")
    states = initial_states
    if cu_seqlens is not None:
        n = check_packing(op, batch, length, None, cu_seqlens)
        if seq_idx is not None:
            check_packing(op, batch, length, seq_idx, None)
            _check_same_borders(op, seq_idx, cu_seqlens, length)
        if initial_states is not None:
            states = torch.cat([initial_states, initial_states.new_zeros(n - 1, heads, head_dim, B.shape[3])])
    result = ssd_chunk_scan(
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
        initial_states=states,
        seq_idx=seq_idx if cu_seqlens is None else None,
        cu_seqlens=cu_seqlens,
        return_final_states=return_final_states or return_varlen_states,
    )
    if not isinstance(result, tuple):
        return result
    out, final = result
    outputs = [out]
    if return_final_states:
        if cu_seqlens is None:
            outputs.append(final)
        else:
            # the row ends with its last sequence that has tokens
            lengths = cu_seqlens.diff()
            last = ((lengths > 0) * torch.arange(len(lengths), device=lengths.device)).amax()
            outputs.append(final.index_select(0, last[None]))
    if return_varlen_states:
        outputs.append(final if state_dtype is None else final.to(state_dtype))
    return tuple(outputs)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined`: a Mamba-2 block from after in_proj.

    D' = H · P is the inner width, M the width of the optional gated MLP beside the SSM (`d_nonssm`), d the model width.

    Args:
        zxbcdt: (B, L, 2 M + 2 D' + 2 G N + H), in the order [z0, x0 | z, x, B, C | dt].
        conv1d_weight: (D' + 2 G N, W). conv1d_bias: (D' + 2 G N,) or None.
        dt_bias: (H,) or None. A: (H,), real. D: (H,), (H, P) or None.
        chunk_size: a hint for speed.
        initial_states: (B, H, P, N) or None, of the SSM; the convolution starts from zeros.
        seq_idx: (B, L) integer, the sequence of each token; negative = padding.
        dt_limit: smallest and largest step size.
        return_final_states: also return the SSM state after each row's last token, (B, H, P, N) fp32.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (D',), or None for a plain gate `y · silu(z)`. The norm runs over groups of D' / G channels.
        rmsnorm_eps: its eps.
        outproj_weight: (d, M + D') or None for no projection; it follows autocast. outproj_bias: (d,) or None.
        headdim: P; needed unless D is (H, P).
        ngroups: G.
        norm_before_gate: True (the default, as there) gives `norm(y) · silu(z)`, False `norm(y · silu(z))`, which is what
            every published Mamba-2 checkpoint wants.
        state_dtype: accepted and without effect on results: states are always computed and returned in fp32.

    Returns:
        out (B, L, M + D'), or (B, L, d) with `outproj_weight`; or (out, final_states).

    Raises:
        TypeError: complex A, or an argument is no floating tensor.
        ValueError: widths that do not add up, no `headdim`, or an `outproj_bias` without a weight.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import mamba_split_conv1d_scan_combined
        >>> H, P, N = 2, 4, 3
        >>> zxbcdt, conv = torch.randn(1, 10, 2 * H * P + 2 * N + H), torch.randn(H * P + 2 * N, 4)
        >>> out = mamba_split_conv1d_scan_combined(zxbcdt, conv, None, None, -torch.rand(H), torch.ones(H), 256, headdim=P)
        >>> print(out.shape)
        torch.Size([1, 10, 8])
    """
    op = "mamba_split_conv1d_scan_combined"
    for name, value in (("zxbcdt", zxbcdt), ("conv1d_weight", conv1d_weight), ("A", A)):
        check_tensor(op, name, value)
    refuse_complex(op, A=A)
    _check_state_dtype(op, state_dtype)
    check_shape(op, "zxbcdt", zxbcdt, (None, None, None), "(B, L, 2 M + 2 D' + 2 G N + H)")
    check_shape(op, "A", A, (None,), "(H,)")
    heads = A.shape[0]
    if D is not None and D.dim() == 2:
        if headdim is not None and headdim != D.shape[1]:
            raise ValueError(f"{op}: `headdim` is {headdim} but `D` has shape {tuple(D.shape)} = (H, P).")
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError(f"{op}: `headdim` is needed unless `D` has shape (H, P).")
    width = heads * headdim
    check_shape(op, "conv1d_weight", conv1d_weight, (None, None), "(D' + 2 G N, W)")
    channels = conv1d_weight.shape[0]
    if ngroups < 1 or heads % ngroups or channels < width or (channels - width) % (2 * ngroups):
        raise ValueError(
            f"{op}: `conv1d_weight` must have H P + 2 G N channels, with G a divisor of H; got {channels} channels for "
            f"H = {heads}, P = {headdim}, G = {ngroups}."
        )
    rest = zxbcdt.shape[2] - width - channels - heads
    if rest < 0 or rest % 2:
        raise ValueError(
            f"{op}: the width of `zxbcdt` must be 2 M + {width} + {channels} + {heads} (z, xBC and dt) with M >= 0, got "
            f"{zxbcdt.shape[2]}."
        )
    mlp = rest // 2
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError(f"{op}: `outproj_bias` needs `outproj_weight`; pass both or neither.")
    if rmsnorm_weight is not None:
        check_shape(op, "rmsnorm_weight", rmsnorm_weight, (width,), "(D',)")

    z0, x0, z, xBC, dt = zxbcdt.split([mlp, mlp, width, channels, heads], dim=-1)
    convolved = causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation=activation, seq_idx=seq_idx)
    assert isinstance(convolved, Tensor)
    state_width = (channels - width) // 2
    x, B, C = convolved.split([width, state_width, state_width], dim=-1)
    result = ssd_chunk_scan(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size=chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
        initial_states=initial_states,
        seq_idx=seq_idx,
        return_final_states=return_final_states,
    )
    y, final = result if isinstance(result, tuple) else (result, None)
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        out = rms_norm_gated(
            out,
            rmsnorm_weight,
            z,
            eps=rmsnorm_eps,
            group_size=width // ngroups,
            norm_before_gate=norm_before_gate,
        )
    if mlp:
        out = torch.cat([silu(z0) * x0, out], dim=-1)
    if outproj_weight is not None:
        out = linear(out, outproj_weight, outproj_bias)
    return out if final is None else (out, final)
