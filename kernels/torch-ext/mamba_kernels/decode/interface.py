"""The public decoding ops: argument checks and dispatch."""

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape, check_tensor
from ..dispatch import on_device, select
from ..signatures import once_per_signature
from .eager import fused_linear_eager, mamba2_step_eager, mamba_step_eager
from .reference import fused_linear_ref, mamba2_step_ref, mamba_step_ref

__all__ = ["fused_linear", "mamba2_step", "mamba_step"]


def _check_inputs(op: str, first: str, **values: Tensor | None) -> None:
    """Check that all are float tensors on one device, and that no gradient is expected of them."""
    differentiates = torch.is_grad_enabled()
    for name, value in values.items():
        if value is None:
            continue
        check_tensor(op, name, value)
        check_dtype(op, name, value)
        if differentiates and value.requires_grad:
            raise RuntimeError(
                f"{op} is for decoding and has no gradient, but `{name}` requires one; run it under torch.no_grad()."
            )
    tensor = values[first]
    assert tensor is not None
    check_same_device(op, (first, tensor), **values)


@once_per_signature
def _check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    z: Tensor | None,
    group_size: int | None,
    residual: Tensor | None,
) -> None:
    op = "fused_linear"
    _check_inputs(op, "x", x=x, weight=weight, bias=bias, norm_weight=norm_weight, z=z, residual=residual)
    check_shape(op, "x", x, (None, None), "(B, K)")
    rows, inputs = x.shape
    check_shape(op, "weight", weight, (None, inputs), "(O, K)")
    if bias is not None:
        check_shape(op, "bias", bias, (weight.shape[0],), "(O,)")
    if norm_weight is not None:
        check_shape(op, "norm_weight", norm_weight, (inputs,), "(K,)")
    if z is not None:
        check_shape(op, "z", z, (rows, inputs), "(B, K)")
        if norm_weight is None:
            raise ValueError(f"{op}: `z` gates what is normalised, so it needs `norm_weight`.")
    if group_size is not None and (z is None or group_size < 1 or inputs % group_size != 0):
        raise ValueError(
            f"{op}: `group_size` must divide the {inputs} inputs and needs `z`, got {group_size} "
            f"{'without' if z is None else 'with'} `z`."
        )
    if residual is not None:
        check_shape(op, "residual", residual, (rows, weight.shape[0]), "(B, O)")


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    z: Tensor | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + weight @ norm(x) + bias` for a few rows: a projection of a decoding step.

    On a GPU and for up to 8 rows in 16 bits, 4 in fp32, the time is about that of reading the weight: in one launch for one row,
    in two for several rows of a large weight. The norm is RMSNorm (Zhang and Sennrich,
    arXiv 1910.07467), or Mamba-2's gated one over groups of channels where `z` is given (arXiv 2405.21060, section 7.1).
    Sums are in fp32. In one launch nothing in between is rounded, in two the normalised x is, to the weight's dtype. No gradients.

    Args:
        x: (B, K) fp32, bf16 or fp16, contiguous rows.
        weight: (O, K).
        bias: (O,), or None.
        norm_weight: (K,), scales the normalised x; None = no norm.
        eps: added to the mean square.
        z: (B, K); x silu(z) is normalised. Needs `norm_weight`.
        group_size: channels that are normalised together, K by default. Only with `z`.
        residual: (B, O), added at the end; the result then has the wider one of its dtype and the weight's.

    Returns:
        (B, O) in the weight's dtype, or as said under `residual`.

    Raises:
        TypeError: something that is no tensor, or of a dtype that is not taken.
        ValueError: shapes or devices that do not fit, or `z` and `group_size` without what they need.
        RuntimeError: an argument requires a gradient.

    Example:
        >>> import torch
        >>> from mamba_kernels.decode import fused_linear
        >>> x, weight = torch.randn(1, 16), torch.randn(6, 16)
        >>> y = fused_linear(x, weight, norm_weight=torch.ones(16), residual=torch.zeros(1, 6))
        >>> y.shape
        torch.Size([1, 6])
    """
    _check_linear(x, weight, bias, norm_weight, z, group_size, residual)
    name = select("fused_linear", x.device)
    if name == "triton":
        from .triton_linear import fused_linear_triton as run
    else:
        run = fused_linear_ref if name == "reference" else fused_linear_eager
    with on_device(x.device):
        out = run(
            x,
            weight,
            bias=bias,
            norm_weight=norm_weight,
            eps=eps,
            z=z,
            group_size=group_size,
            residual=residual,
        )
    if name == "reference":
        return out.to(weight.dtype if residual is None else torch.promote_types(residual.dtype, weight.dtype))
    return out


@once_per_signature
def _check_mamba(
    state: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
) -> None:
    op = "mamba_step"
    _check_inputs(
        op,
        "x",
        x=x,
        state=state,
        parameters=parameters,
        dt_weight=dt_weight,
        dt_bias=dt_bias,
        A_log=A_log,
        D=D,
        z=z,
    )
    check_shape(op, "x", x, (None, None), "(B, D)")
    batch, channels = x.shape
    check_shape(op, "A_log", A_log, (channels, None), "(D, N)")
    size = A_log.shape[1]
    check_shape(op, "state", state, (batch, channels, size), "(B, D, N)")
    check_shape(op, "dt_weight", dt_weight, (channels, None), "(D, R)")
    check_shape(op, "parameters", parameters, (batch, dt_weight.shape[1] + 2 * size), "(B, R + 2 N)")
    check_shape(op, "dt_bias", dt_bias, (channels,), "(D,)")
    check_shape(op, "D", D, (channels,), "(D,)")
    check_shape(op, "z", z, (batch, channels), "(B, D)")


def mamba_step(
    state: Tensor,
    x: Tensor,
    parameters: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor,
    norm_eps: float | None = None,
) -> Tensor:
    """What Mamba does with one token between `x_proj` and `out_proj`, in one launch: `dt_proj`, the recurrence and the gate.

    Mamba, arXiv 2312.00752, Algorithm 2; Falcon-Mamba's norm of dt, B and C: arXiv 2410.05355, section 2.3. No gradients.

    Args:
        state: (B, D, N) fp32 (or another float type), updated in place.
        x: (B, D), after the convolution.
        parameters: (B, R + 2 N), the output of `x_proj`: dt of rank R, B and C.
        dt_weight: (D, R), the weight of `dt_proj`.
        dt_bias: (D,), its bias.
        A_log: (D, N) fp32; A = -exp(A_log).
        D: (D,).
        z: (B, D), the gate before silu.
        norm_eps: dt, B and C are divided by their root mean square with this epsilon; None = they are not.

    Returns:
        (B, D) in x.dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear`.
    """
    _check_mamba(state, x, parameters, dt_weight, dt_bias, A_log, D, z)
    name = select("mamba_step", x.device)
    if name == "triton":
        from .triton_steps import mamba_step_triton as run
    else:
        run = mamba_step_ref if name == "reference" else mamba_step_eager
    with on_device(x.device):
        return run(state, x, parameters, dt_weight, dt_bias, A_log, D, z, norm_eps=norm_eps).to(x.dtype)


@once_per_signature
def _check_mamba2(
    state: Tensor, xBC: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, groups: int
) -> None:
    op = "mamba2_step"
    _check_inputs(op, "xBC", xBC=xBC, state=state, dt=dt, dt_bias=dt_bias, A_log=A_log, D=D)
    check_shape(op, "state", state, (None, None, None, None), "(B, H, P, N)")
    batch, heads, head_dim, size = state.shape
    if groups < 1 or heads % groups != 0:
        raise ValueError(f"{op}: `groups` must divide the {heads} heads, got {groups}.")
    width = heads * head_dim + 2 * groups * size
    check_shape(op, "xBC", xBC, (batch, width), "(B, H P + 2 G N)")
    check_shape(op, "dt", dt, (batch, heads), "(B, H)")
    for name, value in (("dt_bias", dt_bias), ("A_log", A_log), ("D", D)):
        check_shape(op, name, value, (heads,), "(H,)")


def mamba2_step(
    state: Tensor,
    xBC: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    groups: int,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """What Mamba-2 does with one token between its convolution and its gated norm, in one launch.

    Mamba-2, arXiv 2405.21060, section 3. No gradients.

    Args:
        state: (B, H, P, N) fp32 (or another float type), updated in place.
        xBC: (B, H P + 2 G N), after the convolution: x, B and C side by side.
        dt: (B, H).
        dt_bias: (H,).
        A_log: (H,) fp32; A = -exp(A_log).
        D: (H,).
        groups: G, divides H.
        dt_limit: bounds of the time step after softplus.

    Returns:
        (B, H P) in xBC.dtype, not gated.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_linear`; or groups that do not divide the heads.
    """
    _check_mamba2(state, xBC, dt, dt_bias, A_log, D, groups)
    name = select("mamba2_step", xBC.device)
    if name == "triton":
        from .triton_steps import mamba2_step_triton as run
    else:
        run = mamba2_step_ref if name == "reference" else mamba2_step_eager
    with on_device(xBC.device):
        return run(state, xBC, dt, dt_bias, A_log, D, groups, dt_limit=dt_limit).to(xBC.dtype)
