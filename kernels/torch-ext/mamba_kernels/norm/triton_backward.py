"""Backward of the RMS norms in Triton; `triton_forward` has the formulas and the symbols."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..reduction import sum_partials
from .triton_forward import Tuning, as_rows, contiguous_like, load, scaled, tile_of

__all__ = ["norm_backward"]

# rows of up to LONGEST_SHORT channels: few registers, so that several programs fit, and SHORT_STAGES rows in flight; longer
# ones fill a multiprocessor as it is
SHORT, LONG = Tuning(tile=1024, per_warp=256), Tuning(tile=4096, per_warp=512)
LONGEST_SHORT, SHORT_STAGES = 2048, 4
# bytes of shared memory for them; with the sums it stays within the 64 KB of a T4
ROOM = 48 * 1024
# the programs have this many warps together: 32 for each multiprocessor of an H100
BACKWARD_WARPS = 4224


@triton.jit
def _backward_operands(dy, x, extra, weight, mask, channel_mask, EXTRA: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """dy, x, the second operand, v and dn; in fp32, zeros outside of `mask`."""
    dy = load(dy, mask)
    x = load(x, mask)
    value = x
    dnormed = dy
    if HAS_WEIGHT:
        dnormed *= load(weight, channel_mask)
    if EXTRA == "nothing":
        extra = x
    else:
        extra = load(extra, mask)
    if EXTRA == "gate first":
        value = x * (extra * tl.sigmoid(extra))
    if EXTRA == "gate last":
        dnormed *= extra * tl.sigmoid(extra)
    return dy, x, extra, value, dnormed


@triton.jit
def _row_terms(squares, products, eps, W: tl.constexpr):
    """1 / sqrt(mean(v^2) + eps) and mean(dn n), from the sums of v^2 and dn v."""
    inverse = tl.rsqrt(squares / W + eps)
    return inverse, products * inverse / W


@triton.jit
def _gradients(
    dy,
    x,
    extra,
    value,
    dnormed,
    weight,
    inverse,
    projection,
    mask,
    channel_mask,
    dtype: tl.constexpr,
    EXTRA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Gradients of x, of the second operand and of the weight."""
    normed = value * inverse
    dx = inverse * (dnormed - normed * projection)
    dextra = dx
    if EXTRA == "residual":
        # `extra` is the gradient of the sum itself
        dx += extra
        dextra = dx
    elif EXTRA != "nothing":
        sigmoid = tl.sigmoid(extra)
        slope = sigmoid * (1.0 + extra * (1.0 - sigmoid))
        if EXTRA == "gate first":
            dextra = dx * x * slope
            dx *= extra * sigmoid
        else:
            dextra = dy * normed * slope
            if HAS_WEIGHT:
                dextra *= load(weight, channel_mask)
    if EXTRA == "gate last":
        dweight = dy * (extra * tl.sigmoid(extra)) * normed
    else:
        dweight = dy * normed.to(dtype).to(tl.float32)
    # a row that does not exist may have an infinite `inverse`
    return dx, dextra, tl.where(mask, dweight, 0.0)


@triton.jit
def _store_again(y, normed, extra, scale, mask, EXTRA: tl.constexpr):
    """The output, from the normalised value, z and the weight."""
    gate = 1.0
    if EXTRA == "gate last":
        gate = extra * tl.sigmoid(extra)
    tl.store(y, scaled(normed, gate, scale, y.dtype.element_ty, EXTRA), mask=mask)


@triton.jit(do_not_specialize=["rows", "programs"])
def _rms_norm_bwd_kernel(
    dy,
    x,
    extra,
    weight,
    dx,
    dextra,
    y,
    partials,
    rows,
    programs,
    stride_dy_r,
    stride_dy_d,
    stride_x_r,
    stride_x_d,
    stride_extra_r,
    stride_extra_d,
    stride_dextra_r,
    eps,
    W: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXTRA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DEXTRA: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_Y: tl.constexpr,
    EIGHTHS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, with HAS_DEXTRA the gradient of the second operand, and one row of `partials` (programs, D) of dweight.

    x is what was normalised, or its factor x beside z; `extra` is z or the gradient of the sum. With HAS_Y also y, what the
    forward gave.
    """
    # as in the forward
    eps = tl.cast(eps, tl.float32)
    if EIGHTHS:
        stride_extra_r = stride_extra_r // 8 * 8
        stride_dextra_r = stride_dextra_r // 8 * 8
    pid = tl.program_id(0).to(tl.int64)
    program = pid // GROUPS
    first = (pid % GROUPS) * W
    column = tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = dy.dtype.element_ty
    x += first * stride_x_d
    extra += first * stride_extra_d
    dy += first * stride_dy_d
    weight += first
    dx += first
    dextra += first
    y += first
    partials += program * (GROUPS * W) + first
    if BLOCK >= W:
        is_channel = column < W
        d = column.to(tl.int64)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        # loaded in the loop once more, it would take shared memory for each row in flight
        scale = 1.0
        if HAS_Y and HAS_WEIGHT:
            scale = load(weight + column, is_channel)
        for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
            row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
            mask = (row < rows) & is_channel
            b_dy, b_x, b_extra, value, dnormed = _backward_operands(
                dy + row * stride_dy_r + d * stride_dy_d,
                x + row * stride_x_r + d * stride_x_d,
                extra + row * stride_extra_r + d * stride_extra_d,
                weight + column,
                mask,
                is_channel,
                EXTRA,
                HAS_WEIGHT,
            )
            squares = tl.sum(value * value, 1, keep_dims=True)
            products = tl.sum(dnormed * value, 1, keep_dims=True)
            inverse, projection = _row_terms(squares, products, eps, W)
            b_dx, b_dextra, b_dweight = _gradients(
                b_dy,
                b_x,
                b_extra,
                value,
                dnormed,
                weight + column,
                inverse,
                projection,
                mask,
                is_channel,
                dtype,
                EXTRA,
                HAS_WEIGHT,
            )
            out = row * (GROUPS * W) + column
            tl.store(dx + out, b_dx.to(dx.dtype.element_ty), mask=mask)
            if HAS_DEXTRA:
                tl.store(dextra + row * stride_dextra_r + column, b_dextra.to(dextra.dtype.element_ty), mask=mask)
            if HAS_Y:
                _store_again(y + out, value * inverse, b_extra, scale, mask, EXTRA)
            if HAS_DWEIGHT:
                total += b_dweight
        if HAS_DWEIGHT:
            tl.store(partials + column, tl.sum(total, 0, keep_dims=True), mask=is_channel)
    else:
        for start in range(program, rows, programs):
            row = start + tl.zeros((1, 1), tl.int64)
            sum_squares = tl.zeros((1, BLOCK), tl.float32)
            sum_products = tl.zeros((1, BLOCK), tl.float32)
            for begin in range(0, W, BLOCK):
                c = begin + column
                d = c.to(tl.int64)
                mask = c < W
                b_dy, b_x, b_extra, value, dnormed = _backward_operands(
                    dy + row * stride_dy_r + d * stride_dy_d,
                    x + row * stride_x_r + d * stride_x_d,
                    extra + row * stride_extra_r + d * stride_extra_d,
                    weight + c,
                    mask,
                    mask,
                    EXTRA,
                    HAS_WEIGHT,
                )
                sum_squares += value * value
                sum_products += dnormed * value
            squares = tl.sum(sum_squares, 1, keep_dims=True)
            products = tl.sum(sum_products, 1, keep_dims=True)
            inverse, projection = _row_terms(squares, products, eps, W)
            for begin in range(0, W, BLOCK):
                c = begin + column
                d = c.to(tl.int64)
                mask = c < W
                b_dy, b_x, b_extra, value, dnormed = _backward_operands(
                    dy + row * stride_dy_r + d * stride_dy_d,
                    x + row * stride_x_r + d * stride_x_d,
                    extra + row * stride_extra_r + d * stride_extra_d,
                    weight + c,
                    mask,
                    mask,
                    EXTRA,
                    HAS_WEIGHT,
                )
                b_dx, b_dextra, b_dweight = _gradients(
                    b_dy,
                    b_x,
                    b_extra,
                    value,
                    dnormed,
                    weight + c,
                    inverse,
                    projection,
                    mask,
                    mask,
                    dtype,
                    EXTRA,
                    HAS_WEIGHT,
                )
                out = row * (GROUPS * W) + c
                tl.store(dx + out, b_dx.to(dx.dtype.element_ty), mask=mask)
                if HAS_DEXTRA:
                    tl.store(dextra + row * stride_dextra_r + c, b_dextra.to(dextra.dtype.element_ty), mask=mask)
                if HAS_Y:
                    scale = 1.0
                    if HAS_WEIGHT:
                        scale = load(weight + c, mask)
                    _store_again(y + out, value * inverse, b_extra, scale, mask, EXTRA)
                if HAS_DWEIGHT:
                    # this program's own row, which is too long for registers
                    before = tl.load(partials + c, mask=mask & (row != program), other=0.0)
                    tl.store(partials + c, before + b_dweight, mask=mask)
            if HAS_DWEIGHT:
                tl.debug_barrier()


def row_stride_of(value: Tensor) -> int:
    """The stride of the rows of (…, D), which is the same for all leading dimensions."""
    return value.shape[-1] if value.is_contiguous() else value.flatten(0, -2).stride(0)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    extra: Tensor | None,
    weight: Tensor | None,
    eps: float,
    width: int,
    extra_is: str,
    wants_dweight: bool,
    dx_dtype: torch.dtype,
    dextra_dtype: torch.dtype | None = None,
    dextra: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the second operand (that of x where `dextra_dtype` is None) and of the weight, or None.

    Args:
        dextra: where the gradient of the second operand is to be written, (…, D) with one stride of rows and innermost stride 1.
        y: where what the forward gave is to be written once more, (…, D) contiguous.
    """
    channels = x.shape[-1]
    dx = contiguous_like(x, dx_dtype)
    has_dextra = dextra_dtype is not None or dextra is not None
    if dextra is None:
        dextra = dx if dextra_dtype is None else contiguous_like(x, dextra_dtype)
    is_short = width <= LONGEST_SHORT
    block, rows, warps = tile_of(width, SHORT if is_short else LONG)
    count, groups = dx.numel() // channels, channels // width
    programs = min(-(-count // rows), max(1, BACKWARD_WARPS // (warps * groups)))
    partials = dx
    if wants_dweight:
        partials = torch.empty((programs, 1, channels), dtype=torch.float32, device=x.device)
    dy, stride_dy_r, stride_dy_d = as_rows(dy)
    x, stride_r, stride_d = as_rows(x)
    extra, stride_extra_r, stride_extra_d = (x, 0, 0) if extra is None else as_rows(extra)
    stride_dextra = row_stride_of(dextra)
    stages = 1
    if is_short:
        in_flight = block * rows * (dy.element_size() + x.element_size() + extra.element_size())
        stages = max(1, min(SHORT_STAGES, ROOM // in_flight))
    launch(
        _rms_norm_bwd_kernel,
        (programs * groups,),
        dy,
        x,
        extra,
        x if weight is None else weight.contiguous(),
        dx,
        dextra,
        dx if y is None else y,
        partials,
        count,
        programs,
        stride_dy_r,
        stride_dy_d,
        stride_r,
        stride_d,
        stride_extra_r,
        stride_extra_d,
        stride_dextra,
        eps,
        W=width,
        GROUPS=groups,
        BLOCK=block,
        ROWS=rows,
        EXTRA=extra_is,
        HAS_WEIGHT=weight is not None,
        HAS_DEXTRA=has_dextra,
        HAS_DWEIGHT=wants_dweight,
        HAS_Y=y is not None,
        EIGHTHS=stride_extra_r % 8 == 0 and stride_dextra % 8 == 0,
        STAGES=stages,
        num_warps=warps,
    )
    if weight is None or not wants_dweight:
        return dx, dextra, None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    sum_partials(partials, dweight)
    return dx, dextra, dweight
