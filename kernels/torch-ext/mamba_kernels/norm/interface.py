"""The public RMS norms. They normalise over the last dimension and compute in fp32 (fp64 for fp64 input)."""

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import on_device, select
from ..signatures import once_per_signature
from .eager import add_rms_norm_eager, rms_norm_eager, rms_norm_gated_eager
from .reference import add_rms_norm_ref, rms_norm_gated_ref, rms_norm_ref

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_gated"]


@once_per_signature
def _check_input(
    op: str, x: Tensor, weight: Tensor | None, second: str = "second", operand: Tensor | None = None
) -> None:
    """`operand`, called `second`, has the shape of x."""
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: `x` must have at least one dimension, got a scalar.")
    if operand is not None:
        check_tensor(op, second, operand)
        check_dtype(op, second, operand)
        check_shape(op, second, operand, tuple(x.shape), "the shape of `x`")
    if weight is not None:
        check_tensor(op, "weight", weight)
        check_dtype(op, "weight", weight)
        check_shape(op, "weight", weight, (x.shape[-1],), "(D,)")
    check_same_device(op, ("x", x), weight=weight, **{second: operand})


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Root mean square norm, `x / sqrt(mean(x²) + eps) * weight` (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: (…, D), fp32, bf16, fp16 or fp64, any strides.
        weight: (D,) or None for no scale.
        eps: added to the mean square.

    Returns:
        (…, D) in x.dtype. The normalised value is rounded to x.dtype before it is scaled, as in transformers.

    Differentiable in `x` and `weight`, once.

    Raises:
        TypeError: an argument is no tensor or has no floating dtype.
        ValueError: a shape or device does not fit.

    Example:
        >>> import torch, mamba_kernels
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> y = mamba_kernels.rms_norm(x, torch.ones(2), eps=0.0)
        >>> print(y)
        tensor([[0.8485, 1.1314]])
    """
    _check_input("rms_norm", x, weight)
    name = select("rms_norm", x.device)
    if name == "triton":
        from .triton_norm import rms_norm_triton

        with on_device(x.device):
            return rms_norm_triton(x, weight, eps)
    if name == "reference":
        return rms_norm_ref(x, weight, eps)
    return rms_norm_eager(x, weight, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum: one block's entry in a pre-norm model.

    Args:
        x: (…, D), the output of the block before.
        residual: (…, D), any floating dtype, or None at the first block.
        weight: (D,) or None.
        eps: added to the mean square.
        residual_dtype: dtype of the new residual; None takes that of `residual`, or of `x` where there is none.

    Returns:
        The normed sum (…, D) in x.dtype and the sum itself (…, D) in `residual_dtype`. The sum is formed in fp32 and the
        norm is taken of the sum as returned.

    Differentiable in `x`, `residual` and `weight`, through both outputs, once.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not floating.
        ValueError: a shape or device does not fit.

    Example:
        >>> import torch, mamba_kernels
        >>> x = torch.ones(1, 3, 4, dtype=torch.bfloat16)
        >>> y, residual = mamba_kernels.add_rms_norm(x, torch.ones(1, 3, 4), torch.ones(4))
        >>> print(y.dtype, residual.dtype, residual[0, 0, 0].item())
        torch.bfloat16 torch.float32 2.0
    """
    _check_input("add_rms_norm", x, weight, "residual", residual)
    if residual_dtype is not None and residual_dtype not in FLOAT_DTYPES:
        raise TypeError(f"add_rms_norm: `residual_dtype` must be a floating dtype, got {residual_dtype}.")
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    name = select("add_rms_norm", x.device)
    if name == "triton":
        from .triton_norm import add_rms_norm_triton

        with on_device(x.device):
            return add_rms_norm_triton(x, residual, weight, eps, residual_dtype)
    if name == "reference":
        return add_rms_norm_ref(x, residual, weight, eps, residual_dtype)
    return add_rms_norm_eager(x, residual, weight, eps, residual_dtype)


def rms_norm_gated(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMS norm over groups of channels, gated by silu(z): Mamba-2's output norm (arXiv 2405.21060, section 7.1).

    Args:
        x: (…, D).
        weight: (D,) or None. One weight a channel also when there are groups.
        z: (…, D) gate, or None for no gate.
        eps: added to the mean square.
        group_size: channels a group, a divisor of D; None takes all D together.
        norm_before_gate: False gives `norm(x · silu(z)) · weight`, as every published Mamba-2 checkpoint has it; True
            gives `norm(x) · weight · silu(z)`.

    Returns:
        (…, D) in x.dtype.

    Differentiable in `x`, `weight` and `z`, once.

    Raises:
        TypeError: an argument is no tensor or has no floating dtype.
        ValueError: a shape or device does not fit, or `group_size` does not divide D.

    Example:
        >>> import torch, mamba_kernels
        >>> x, z = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> y = mamba_kernels.rms_norm_gated(x, torch.ones(8), z, group_size=4)
        >>> print(y.shape)
        torch.Size([2, 5, 8])
    """
    _check_input("rms_norm_gated", x, weight, "z", z)
    width = x.shape[-1]
    if group_size is None:
        group_size = max(width, 1)
    if not isinstance(group_size, int) or group_size < 1 or width % group_size:
        raise ValueError(f"rms_norm_gated: `group_size` must divide the width {width} of `x`, got {group_size}.")
    name = select("rms_norm_gated", x.device)
    if name == "triton":
        from .triton_norm import rms_norm_gated_triton

        with on_device(x.device):
            return rms_norm_gated_triton(x, weight, z, eps, group_size, norm_before_gate)
    if name == "reference":
        return rms_norm_gated_ref(x, weight, z, eps, group_size, norm_before_gate)
    return rms_norm_gated_eager(x, weight, z, eps, group_size, norm_before_gate)
