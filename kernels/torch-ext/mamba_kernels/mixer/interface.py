"""What lies behind the first projection of a layer as one function, and what lies before the first one as another.

Values are those of the ops one after the other, and on everything but a GPU
that is what runs. In Triton, backward has one gradient of the projection, which all ops write into, where autograd would join
theirs; and the input of the last projection, needed for the gradient of its weight alone, is made again by the norm's backward in
place of being kept.

Symbols: B batch, L length, H heads, P head dim, D' = H P inner width, G groups, N state size, W convolution width, d model width.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..causal_conv1d import causal_conv1d
from ..checks import check_shape, check_tensor
from ..dispatch import left_to_eager, on_device, select
from ..norm import add_rms_norm, rms_norm_gated
from ..selective_scan import selective_scan
from ..ssd import ssd_chunk_scan
from ..ssd.sizes import fits_16_bits

__all__ = [
    "MAMBA2_OPS",
    "MAMBA_OPS",
    "MixerSizes",
    "add_norm_linear",
    "mamba2_inner",
    "mamba_inner",
    "mixers_are_fused",
    "projections_are_fused",
]

MAMBA_OPS = ("causal_conv1d", "selective_scan")
MAMBA2_OPS = ("causal_conv1d", "ssd_chunk_scan", "rms_norm_gated")


class MixerSizes(NamedTuple):
    """Sizes and options of a Mamba-2 layer."""

    heads: int
    head_dim: int
    groups: int
    state_size: int
    eps: float
    group_size: int  # channels that are normalised together
    silu: bool = True  # after the convolution
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of z, of x with B and C, and of dt, in the order of the projection."""
        inner = self.heads * self.head_dim
        return inner, inner + 2 * self.groups * self.state_size, self.heads

    def fit(self, dtype: torch.dtype) -> bool:
        """Whether the scan takes values of `dtype` as they lie in the convolution's output."""
        return dtype == torch.float32 or fits_16_bits(self.head_dim, self.state_size)


def _trains_in_triton(ops: tuple[str, ...], *values: Tensor | None) -> bool:
    """Whether `ops` run in Triton, with a gradient, and outside of torch.compile and autocast."""
    device = next(value.device for value in values if value is not None)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type):
        return False
    if not any(value is not None and value.requires_grad for value in values):
        return False
    return all(select(op, device) == "triton" for op in ops)


def mixers_are_fused(
    projected: Tensor, *others: Tensor | None, state_size: int, taps: int, ops: tuple[str, ...] = MAMBA2_OPS
) -> bool:
    """Whether `mamba2_inner` of such operands runs as one function, or `mamba_inner` with `MAMBA_OPS`."""
    if not _trains_in_triton(ops, projected, *others):
        return False
    return not left_to_eager(projected, *others, state_size=state_size, taps=taps)


def projections_are_fused(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `add_norm_linear` of such operands runs as one function."""
    return _trains_in_triton(("add_rms_norm",), x, *others) and not left_to_eager(x, *others)


def add_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` and a linear layer of its first result: a block's entry and the first projection of its mixer.

    In Triton what the norm gives is not kept; its backward makes it again.

    Args:
        x: (B, L, d), the output of the block before.
        residual: (B, L, d), any floating dtype, or None at the first block.
        norm_weight: (d,).
        weight: (M, d) in the dtype of `x`. bias: (M,) or None.
        eps: added to the mean square.
        residual_dtype: dtype of the new residual; None takes that of `residual`, or of `x` where there is none.

    Returns:
        The projection (B, L, M) in x.dtype and the sum (B, L, d) in `residual_dtype`.

    Differentiable in every tensor, through both outputs, once.

    Example:
        >>> import torch
        >>> from mamba_kernels.mixer import add_norm_linear
        >>> x = torch.randn(1, 3, 4)
        >>> projected, residual = add_norm_linear(x, torch.ones(1, 3, 4), torch.ones(4), torch.randn(6, 4))
        >>> print(tuple(projected.shape), tuple(residual.shape))
        (1, 3, 6) (1, 3, 4)
    """
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    if residual_dtype != torch.float64 and projections_are_fused(x, residual, norm_weight, weight, bias):
        from .triton_projection import AddNormLinearTritonFunction

        with on_device(x.device):
            return AddNormLinearTritonFunction.apply(x, residual, norm_weight, weight, bias, eps, residual_dtype)
    normed, total = add_rms_norm(x, residual, norm_weight, eps=eps, residual_dtype=residual_dtype)
    return F.linear(normed, weight, bias), total


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    sizes: MixerSizes,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Convolution, SSD and gated norm of a Mamba-2 layer (arXiv 2405.21060, section 7), and its last projection if it is given.

    Args:
        projected: (B, L, 2 D' + 2 G N + H), in the order z, x, B, C, dt.
        conv_weight: (D' + 2 G N, W). conv_bias: (D' + 2 G N,) or None.
        A: (H,), negative. D: (H,) or None. dt_bias: (H,) or None.
        norm_weight: (D',).
        sizes: everything that no shape says.
        out_weight: (d, D') in the dtype of `projected`, or None for no projection. out_bias: (d,) or None.
        seq_idx: (B, L) integer, the number of each token's sequence; negative = padding.
        recompute: compute the output of the convolution once more in backward in place of keeping it: B L (D' + 2 G N)
            elements less for the time of one convolution. Without effect where the ops run one by one.

    Returns:
        (B, L, D'), or (B, L, d) with `out_weight`, in the dtype of `projected`.

    Differentiable in every floating tensor, once.

    Raises:
        TypeError: `projected` is no tensor.
        ValueError: its width is another.

    Example:
        >>> import torch
        >>> from mamba_kernels.mixer import MixerSizes, mamba2_inner
        >>> sizes = MixerSizes(heads=2, head_dim=4, groups=1, state_size=3, eps=1e-5, group_size=8)
        >>> projected, A = torch.randn(1, 6, sum(sizes.widths)), -torch.rand(2)
        >>> y = mamba2_inner(projected, torch.randn(14, 4), None, A, None, None, torch.ones(8), sizes)
        >>> print(tuple(y.shape))
        (1, 6, 8)
    """
    check_tensor("mamba2_inner", "projected", projected)
    check_shape("mamba2_inner", "projected", projected, (None, None, sum(sizes.widths)), "(B, L, 2 D' + 2 G N + H)")
    floats = (projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, out_weight, out_bias)
    fused = mixers_are_fused(*floats, state_size=sizes.state_size, taps=conv_weight.shape[1])
    if fused and sizes.fit(projected.dtype):
        from .triton_mamba2 import mamba2_inner_triton

        with on_device(projected.device):
            return mamba2_inner_triton(*floats, sizes, seq_idx, recompute)
    z, xBC, dt = projected.split(sizes.widths, dim=-1)
    activation = "silu" if sizes.silu else None
    convolved: Any = causal_conv1d(xBC, conv_weight, conv_bias, activation=activation, seq_idx=seq_idx)
    inner, states = sizes.widths[0], sizes.groups * sizes.state_size
    x, B, C = convolved.split([inner, states, states], dim=-1)
    y: Any = ssd_chunk_scan(
        x.unflatten(-1, (sizes.heads, sizes.head_dim)),
        dt,
        A,
        B.unflatten(-1, (sizes.groups, sizes.state_size)),
        C.unflatten(-1, (sizes.groups, sizes.state_size)),
        D=D,
        dt_bias=dt_bias,
        dt_limit=sizes.dt_limit,
        seq_idx=seq_idx,
    )
    normed = rms_norm_gated(y.flatten(-2), norm_weight, z, eps=sizes.eps, group_size=sizes.group_size)
    return normed if out_weight is None else F.linear(normed, out_weight, out_bias)


def mamba_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    silu: bool = True,
    seq_idx: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Everything of a Mamba layer behind its first projection (arXiv 2312.00752, section 3.4): (B, L, 2 D) → (B, L, d).

    Args:
        projected: (B, L, 2 D), in the order x, z. All projections have its dtype.
        conv_weight: (D, W). conv_bias: (D,) or None.
        x_weight: (R + 2 N, D), the projection to the steps' R numbers, B and C.
        dt_weight: (D, R). dt_bias: (D,) or None, added in fp32.
        A: (D, N), negative. D: (D,) or None.
        out_weight: (d, D). out_bias: (d,) or None.
        silu: after the convolution.
        seq_idx: (B, L) integer, the number of each token's sequence; negative = padding.
        recompute: compute the output of the convolution and the steps once more in backward in place of keeping them: 2 B L D
            elements less for the time of one convolution and one small product. Without effect where the ops run one by one.

    Differentiable in every floating tensor, once.

    Raises:
        TypeError: `projected` is no tensor.
        ValueError: its width is another.

    Example:
        >>> import torch
        >>> from mamba_kernels.mixer import mamba_inner
        >>> x, conv, steps = torch.randn(1, 6, 8), torch.randn(4, 4), torch.randn(4, 2)
        >>> y = mamba_inner(x, conv, None, torch.randn(8, 4), steps, None, -torch.rand(4, 3), None, torch.randn(5, 4))
        >>> print(tuple(y.shape))
        (1, 6, 5)
    """
    check_tensor("mamba_inner", "projected", projected)
    check_shape("mamba_inner", "projected", projected, (None, None, 2 * A.shape[0]), "(B, L, 2 D)")
    floats = (projected, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A, D, out_weight, out_bias)
    if mixers_are_fused(*floats, state_size=A.shape[1], taps=conv_weight.shape[1], ops=MAMBA_OPS):
        from .triton_mamba import mamba_inner_triton

        with on_device(projected.device):
            return mamba_inner_triton(*floats, silu, seq_idx, recompute)
    x, z = projected.chunk(2, dim=-1)
    convolved: Any = causal_conv1d(x, conv_weight, conv_bias, activation="silu" if silu else None, seq_idx=seq_idx)
    steps, B, C = F.linear(convolved, x_weight).split([dt_weight.shape[1], A.shape[1], A.shape[1]], dim=-1)
    y: Any = selective_scan(convolved, F.linear(steps, dt_weight), A, B, C, D=D, z=z, dt_bias=dt_bias, seq_idx=seq_idx)
    return F.linear(y, out_weight, out_bias)
