"""Norms of `mamba_ssm`: the gated RMS norm, and the norm fused with the addition of a residual."""

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm, silu

from ..checks import check_dtype, check_shape, check_tensor
from ..norm import rms_norm, rms_norm_gated

__all__ = ["layer_norm_fn", "rms_norm_fn", "rmsnorm_fn"]


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn` on `mamba_kernels.rms_norm_gated`.

    Args:
        x, z: (…, D); z may be None.
        weight: (D,). bias: (D,) or None, added to the scaled norm.
        eps: added to the mean square.
        group_size: channels a group, a divisor of D; None takes all.
        norm_before_gate: True gives `(norm(x) · weight + bias) · silu(z)`, False `norm(x · silu(z)) · weight + bias`.

    Returns:
        (…, D) in x.dtype.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape that does not fit, or a `group_size` that does not divide D.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import rmsnorm_fn
        >>> x, z = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> print(rmsnorm_fn(x, torch.ones(8), None, z, norm_before_gate=False).shape)
        torch.Size([2, 5, 8])
    """
    if bias is None:
        return rms_norm_gated(x, weight, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
    check_tensor("rmsnorm_fn", "bias", bias)
    check_shape("rmsnorm_fn", "bias", bias, (x.shape[-1],), "(D,)")
    if z is None or not norm_before_gate:
        return (rms_norm_gated(x, weight, z, eps=eps, group_size=group_size) + bias).to(x.dtype)
    y = rms_norm_gated(x, weight, eps=eps, group_size=group_size) + bias
    return (y * silu(z.to(y.dtype))).to(x.dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool, dtype: torch.dtype) -> Tensor:
    if is_rms_norm:
        y = rms_norm(x, weight, eps=eps)
        return (y if bias is None else y + bias).to(dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    return layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias, eps).to(dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`mamba_ssm.ops.triton.layer_norm.layer_norm_fn`: add branches to the residual stream and normalise the sum.

    The sum is `residual + dropout(rowscale · x) + dropout(x1)`, formed in fp32.

    Args:
        x: (…, D).
        weight, bias: (D,); bias may be None.
        residual: (…, D) or None. x1: (…, D) or None, a second branch.
        weight1, bias1: (D,) or None, a second norm of the same sum.
        eps: of the norms.
        dropout_p: probability of dropping an entry of a branch, at every call.
        rowscale: (…) or None, a factor for each row of x; not together with x1.
        prenorm: also return the sum.
        residual_in_fp32: keep the sum in fp32 where `residual` is None; otherwise it has the dtype of `residual`.
        is_rms_norm: RMS norm in place of LayerNorm.
        return_dropout_mask: not supported; must be False.

    Returns:
        The normed sum in x.dtype; or a tuple of it, the second normed sum if `weight1` is given, and the sum if `prenorm`.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape that does not fit, `rowscale` with `x1`, or a dropout mask asked for.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import layer_norm_fn
        >>> x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> y, residual = layer_norm_fn(x, torch.ones(8), None, residual=residual, prenorm=True, is_rms_norm=True)
        >>> print(y.shape, residual.shape)
        torch.Size([2, 5, 8]) torch.Size([2, 5, 8])
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    width = x.shape[-1]
    for name, value, shape in (
        ("weight", weight, (width,)),
        ("bias", bias, (width,)),
        ("weight1", weight1, (width,)),
        ("bias1", bias1, (width,)),
        ("residual", residual, tuple(x.shape)),
        ("x1", x1, tuple(x.shape)),
        ("rowscale", rowscale, tuple(x.shape[:-1])),
    ):
        if value is not None or name == "weight":
            check_tensor(op, name, value)
            assert value is not None
            check_shape(op, name, value, shape, str(shape))
    if return_dropout_mask:
        raise ValueError(
            f"{op}: `return_dropout_mask` is not supported; pass False and apply dropout yourself if needed."
        )
    if rowscale is not None and x1 is not None:
        raise ValueError(f"{op}: `rowscale` scales a single branch; multiply x and x1 yourself and leave it out.")
    if bias1 is not None and weight1 is None:
        raise ValueError(f"{op}: `bias1` needs `weight1`; pass both or neither.")
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if rowscale is not None:
        total = total * rowscale.to(wide)[..., None]
    if dropout_p > 0:
        total = dropout(total, dropout_p)
    if x1 is not None:
        branch = x1.to(wide)
        total = total + (dropout(branch, dropout_p) if dropout_p > 0 else branch)
    stream = x.dtype if not residual_in_fp32 else torch.float32
    if residual is not None:
        total = total + residual.to(wide)
        stream = residual.dtype
    outputs = [_norm(total, weight, bias, eps, is_rms_norm, x.dtype)]
    if weight1 is not None:
        outputs.append(_norm(total, weight1, bias1, eps, is_rms_norm, x.dtype))
    if prenorm:
        outputs.append(total.to(stream))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """`mamba_ssm.ops.triton.layer_norm.rms_norm_fn`: `layer_norm_fn` with an RMS norm. Same arguments, results and errors.

    Example:
        >>> import torch
        >>> from mamba_kernels.compat import rms_norm_fn
        >>> print(rms_norm_fn(torch.randn(2, 5, 8), torch.ones(8), None, eps=1e-5).shape)
        torch.Size([2, 5, 8])
    """
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        eps=eps,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )
