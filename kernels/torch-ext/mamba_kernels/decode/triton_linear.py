"""`fused_linear` in Triton: the product of a weight with a few rows, at the speed of the memory that holds the weight.

    y_bo = residual_bo + bias_o + r_b sum_k W_ok n_k v_bk,    v = x or x silu(z),    r = 1 / sqrt(mean(v^2) + eps)

The factor r of a row is the same for all k, so the norm (Zhang and Sennrich, arXiv 1910.07467) needs no pass of its own: the
sum of squares is gathered beside the product, and nothing waits for it before the weight is read. With groups of channels the
sums of a group are scaled and put aside when its last channel has been read.

A program reads BO rows of the weight, BK columns at a time, all of them once for all rows of x; partial sums stay in registers
as tiles (BO, BK) until the end. Sums are in fp32 and in a fixed order. A launch that starts early (`early`) fetches the first tiles
while the kernel in front of it is at work.

Symbols: B rows of x (a constant of the kernel), K inputs, O outputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import MOST_ROWS, left_to_eager
from ..early import launches_early
from .eager import fused_linear_eager
from .triton_rows import linear_of_many_rows
from .triton_skinny import multiplies

__all__ = ["Tuning", "choose", "fused_linear_triton", "takes_one_launch"]


class Tuning(NamedTuple):
    """Rows and columns of the weight that a program reads at a time, and its warps."""

    outputs: int
    inputs: int
    warps: int


# by the rows of x: the partial sums of all of them are in registers. 1024 columns are 8 for each of 128 threads, 16 bytes of a
# weight in half precision, and every row of the weight lies in all threads alike: anything else moves x between threads
TUNING = {1: Tuning(4, 1024, 4), 2: Tuning(2, 1024, 4), 4: Tuning(1, 1024, 4)}
# for one row and many outputs, what was fastest among six tunings at a width that published models have (docs/performance.md)
MEASURED = {2560: Tuning(4, 2048, 8), 5120: Tuning(4, 512, 2)}
# a grid of fewer programs than this leaves multiprocessors idle
FEWEST_PROGRAMS = 264
# elements of a weight up to which a launch is expected to be faster than two (`takes_one_launch`)
FEW_ELEMENTS, MANY_ELEMENTS = 1 << 20, 4 << 20
# values of weights that a thread holds while it waits
MOST_AHEAD = 64


@triton.jit
def _fused_linear_kernel(
    x,
    z,
    norm_weight,
    weight,
    bias,
    residual,
    y,
    outputs,
    stride_x,
    stride_z,
    stride_residual,
    eps,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y (B, O). With EARLY, the first AHEAD tiles of a program's weights are fetched before x is there."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    o = pid * BO + tl.arange(0, BO)
    is_output = o < outputs
    k = tl.arange(0, BK)
    tile = weight + pid.to(tl.int64) * (BO * K) + tl.arange(0, BO)[:, None] * K + k[None, :]
    fetched = ()
    for i in tl.static_range(AHEAD):
        mask = is_output[:, None] & (i * BK + k < K)[None, :]
        fetched = fetched + (tl.load(tile + i * BK, mask=mask, other=0.0, eviction_policy="evict_first"),)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    sums = ()
    done = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BO, BK), tl.float32),)
        done = done + (tl.zeros((BO, BK), tl.float32),)
        squares = squares + (tl.zeros((BK,), tl.float32),)
    for start in tl.static_range(0, K, BK):
        if K % BK == 0:
            inside = k < BK
        else:
            inside = start + k < K
        if start // BK < AHEAD:
            values = fetched[start // BK].to(tl.float32)
        else:
            values = tl.load(
                tile + start, mask=is_output[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
        scale = tl.zeros((BK,), tl.float32)
        if HAS_NORM:
            scale = tl.load(norm_weight + start + k, mask=inside, other=0.0).to(tl.float32)
        new_sums = ()
        new_squares = ()
        for b in tl.static_range(ROWS):
            v = tl.load(x + b * stride_x + start + k, mask=inside, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(z + b * stride_z + start + k, mask=inside, other=0.0).to(tl.float32)
                v *= gate * tl.sigmoid(gate)
            new_squares = new_squares + (squares[b] + v * v,)
            if HAS_NORM:
                v *= scale
            new_sums = new_sums + (sums[b] + values * v[None, :],)
        sums = new_sums
        squares = new_squares
        if HAS_NORM and ((start + BK) % GROUP == 0 or start + BK >= K):
            new_done = ()
            new_sums = ()
            new_squares = ()
            for b in tl.static_range(ROWS):
                inverse = tl.rsqrt(tl.sum(squares[b], 0) / GROUP + eps)
                new_done = new_done + (done[b] + sums[b] * inverse,)
                new_sums = new_sums + (tl.zeros((BO, BK), tl.float32),)
                new_squares = new_squares + (tl.zeros((BK,), tl.float32),)
            done = new_done
            sums = new_sums
            squares = new_squares
    if HAS_NORM:
        sums = done
    for b in tl.static_range(ROWS):
        total = tl.sum(sums[b], 1)
        if HAS_BIAS:
            total += tl.load(bias + o, mask=is_output, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total += tl.load(residual + b * stride_residual + o, mask=is_output, other=0.0).to(tl.float32)
        tl.store(y + b * outputs + o, total.to(y.dtype.element_ty), mask=is_output)


def choose(rows: int, inputs: int, outputs: int, group: int, gated: bool = False) -> Tuning:
    """The tuning for B = `rows`; a block of columns lies within one group of the norm."""
    tuning = TUNING[triton.next_power_of_2(rows)]
    if rows == 1 and not gated and inputs in MEASURED and outputs >= 4 * FEWEST_PROGRAMS:
        tuning = MEASURED[inputs]
    block = min(tuning.inputs, triton.next_power_of_2(inputs))
    while block > 16 and group < inputs and group % block:
        block //= 2
    per_program = tuning.outputs
    while per_program > 1 and triton.cdiv(outputs, per_program) < FEWEST_PROGRAMS:
        per_program //= 2
    return Tuning(per_program, block, tuning.warps)


def takes_one_launch(rows: int, elements: int, normed: bool, gated: bool, skinny: bool) -> bool:
    """Whether the kernel of this file is faster than a norm and a product in turn, for a weight of so many elements.

    Its time grows with the rows: with one output a program, as it has for 3 and 4 rows, every program reads and normalises x
    anew, in fp32 where the norm is. A second launch costs about 2 µs, which only a large weight gives back. Measured on an H100
    in bf16 from 1.2 to 17 million elements (docs/performance.md), where 3 and 4 rows with a norm took 2 to 3 µs for a million
    elements here; below that, and with z below 8 million, inferred.

    Args:
        skinny: whether the product would be that of `triton_skinny`, and not torch's.
    """
    if rows > MOST_ROWS:
        return False
    if rows == 1:
        return True
    if rows == 2:
        return not (gated and skinny) or elements <= MANY_ELEMENTS
    if skinny:
        return elements <= (FEW_ELEMENTS if normed else MANY_ELEMENTS)
    return not normed or elements <= MANY_ELEMENTS


def fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    z: Tensor | None = None,
    group_size: int | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`fused_linear` in Triton; arguments as there, assumed to be checked. Many rows have a product of their own, fp64 is eager's."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    group = inputs if group_size is None else group_size
    tuning = choose(min(max(rows, 1), MOST_ROWS), inputs, outputs, group, z is not None) if inputs else None
    splits_badly = tuning is None or (group < inputs and group % tuning.inputs != 0)
    empty = rows == 0 or outputs == 0 or inputs == 0
    if empty or left_to_eager(x, weight, bias, norm_weight, z, residual):
        run = fused_linear_eager
    elif splits_badly or not takes_one_launch(
        rows,
        weight.numel(),
        norm_weight is not None,
        z is not None,
        multiplies(weight),
    ):
        run = linear_of_many_rows
        x = x if x.stride(1) == 1 else x.contiguous()
        z = z if z is None or z.stride(1) == 1 else z.contiguous()
    else:
        run = None
    if run is not None:
        return run(
            x,
            weight,
            bias=bias,
            norm_weight=norm_weight,
            eps=eps,
            z=z,
            group_size=group_size,
            residual=residual,
        )
    assert tuning is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    z_rows = x if z is None else z if z.stride(1) == 1 else z.contiguous()
    added = x if residual is None else residual if residual.stride(1) == 1 else residual.contiguous()
    dtype = weight.dtype if residual is None else torch.promote_types(residual.dtype, weight.dtype)
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    early = launches_early(x)
    ahead = 0
    if early:
        ahead = min(
            triton.cdiv(inputs, tuning.inputs), 32 * tuning.warps * MOST_AHEAD // (tuning.outputs * tuning.inputs)
        )
    _fused_linear_kernel[(triton.cdiv(outputs, tuning.outputs),)](
        x,
        z_rows,
        x if norm_weight is None else norm_weight,
        weight.contiguous(),
        x if bias is None else bias,
        added,
        y,
        outputs,
        x.stride(0),
        z_rows.stride(0),
        added.stride(0),
        eps,
        ROWS=rows,
        K=inputs,
        GROUP=group,
        BO=tuning.outputs,
        BK=tuning.inputs,
        HAS_NORM=norm_weight is not None,
        HAS_Z=z is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EARLY=early,
        AHEAD=ahead,
        num_warps=tuning.warps,
        **({"launch_pdl": True} if early else {}),
    )
    return y
