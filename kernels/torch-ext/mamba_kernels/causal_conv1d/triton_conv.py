"""The causal convolution in Triton as a differentiable op: `causal_conv1d_triton`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..dispatch import left_to_eager
from ..launch import launch
from ..packing import cu_seqlens_to_seq_idx, remembered, segments_and_valid
from ..reduction import sum_partials
from .eager import causal_conv1d_eager
from .triton_backward import BACKWARD, conv_bwd_kernel, conv_initial_gradient_kernel
from .triton_common import Tuning
from .triton_forward import FORWARD, conv_final_states_kernel, conv_fwd_kernel

__all__ = ["CausalConv1dTritonFunction", "causal_conv1d_triton", "conv_backward", "conv_forward", "layout_of"]


class Layout(NamedTuple):
    """How tokens are packed: what the kernels call numbers, bounds and ends."""

    numbers: Tensor | None  # (B, L) int32
    bounds: Tensor | None  # (n + 1,)
    ends: Tensor | None  # (B,) int32


def layout_of(x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    """The kernels' view of `seq_idx` or `cu_seqlens`."""
    length = x.shape[1]
    if cu_seqlens is not None:
        numbers = remembered(cu_seqlens, f"numbers {length}", lambda: cu_seqlens_to_seq_idx(cu_seqlens, length))
        return Layout(numbers, cu_seqlens.contiguous(), None)
    if seq_idx is None:
        return Layout(None, None, None)
    return remembered(seq_idx, "convolution", lambda: _marks_of(seq_idx))


def _marks_of(seq_idx: Tensor) -> Layout:
    segments, valid = segments_and_valid(seq_idx)
    if valid is None:
        valid = torch.ones_like(seq_idx, dtype=torch.bool)
    marks = segments.to(torch.int32) * 2 + valid.to(torch.int32)
    positions = torch.arange(1, seq_idx.shape[1] + 1, device=seq_idx.device, dtype=torch.int32)
    return Layout(marks, None, torch.where(valid, positions, 0).amax(1))


def _blocks(channels: int, tuning: Tuning) -> tuple[int, int]:
    """Channels of a program, and how many programs they take."""
    block = min(tuning.channels, max(16, 1 << (channels - 1).bit_length()))
    return block, -(-channels // block)


def _in_eighths(*values: Tensor) -> bool:
    """Whether rows start at multiples of 8 elements."""
    return all(stride % 8 == 0 for value in values for stride in value.stride()[:2])


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    layout: Layout,
    silu: bool,
    return_final_states: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    tuning = FORWARD
    block, blocks = _blocks(channels, tuning)
    run = tuning.rounds(batch, length, blocks) * tuning.tokens
    runs = -(-length // run)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    flags = {
        "HAS_INITIAL": initial is not None,
        "MARKS": layout.ends is not None,
        "VARLEN": layout.bounds is not None,
    }
    operands = (
        x if initial is None else initial,
        x if layout.numbers is None else layout.numbers,
        x if layout.bounds is None else layout.bounds,
    )
    launch(
        conv_fwd_kernel,
        (batch * runs * blocks,),
        x,
        weight,
        x if bias is None else bias,
        *operands,
        y,
        *x.stride()[:2],
        length,
        channels,
        run,
        runs,
        STRIDE_D=weight.stride(0),
        STRIDE_W=weight.stride(1),
        W=taps,
        K=tuning.tokens,
        BC=block,
        HAS_BIAS=bias is not None,
        SILU=silu,
        EIGHTHS=_in_eighths(x),
        **flags,
        num_warps=1,
    )
    sequences = batch if layout.bounds is None else layout.bounds.shape[0] - 1
    if not return_final_states:
        return y, None
    final = torch.empty((sequences, channels, taps - 1), dtype=x.dtype, device=x.device)
    if final.numel():
        launch(
            conv_final_states_kernel,
            (sequences * blocks,),
            x,
            *operands,
            x if layout.ends is None else layout.ends,
            final,
            *x.stride()[:2],
            length,
            channels,
            W=taps,
            BC=block,
            **flags,
            num_warps=1,
        )
    return y, final


def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    layout: Layout,
    silu: bool,
    dy: Tensor,
    dfinal: Tensor | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial states; dx (B, L, D) is where the first is to be written, with innermost stride 1."""
    batch, length, channels = x.shape
    taps = weight.shape[1]
    tuning = BACKWARD
    block, blocks = _blocks(channels, tuning)
    # with the tokens beyond a run that send gradients back to it, whole rounds; eight taps take two rounds at least
    run = tuning.rounds(batch, length, blocks) * tuning.tokens - (taps - 1)
    runs = -(-length // run)
    dy = _dense_rows(dy)
    numbers, bounds, ends = layout
    has_final = dfinal is not None and taps > 1
    states = dfinal.contiguous() if dfinal is not None and has_final else x
    if dx is None:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = torch.empty((batch * runs, taps + (bias is not None), channels), dtype=torch.float32, device=x.device)
    flags: dict[str, Any] = {"HAS_BIAS": bias is not None, "MARKS": ends is not None, "VARLEN": bounds is not None}
    flags |= {"STRIDE_D": weight.stride(0), "STRIDE_W": weight.stride(1)}
    operands = (
        x,
        dy,
        weight,
        x if bias is None else bias,
        x if initial is None else initial,
        x if numbers is None else numbers,
        x if bounds is None else bounds,
        x if ends is None else ends,
        states,
    )
    strides = (*x.stride()[:2], *dy.stride()[:2])
    launch(
        conv_bwd_kernel,
        (batch * runs * blocks,),
        *operands,
        dx,
        sums,
        *strides,
        *dx.stride()[:2],
        length,
        channels,
        run,
        runs,
        W=taps,
        K=tuning.tokens,
        BC=block,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=has_final,
        SILU=silu,
        EIGHTHS=_in_eighths(x, dx),
        **flags,
        num_warps=1,
    )
    dinitial = None
    if initial is not None:
        dinitial = torch.empty_like(initial)
        if dinitial.numel():
            launch(
                conv_initial_gradient_kernel,
                (dinitial.shape[0] * blocks,),
                *operands,
                dinitial,
                *strides,
                length,
                channels,
                W=taps,
                BC=block,
                HAS_FINAL=has_final,
                SILU=silu,
                **flags,
                num_warps=1,
            )
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = None if bias is None else torch.empty_like(bias)
    sum_partials(sums, dweight, dbias)
    return dx, dweight, dbias, dinitial


class CausalConv1dTritonFunction(torch.autograd.Function):
    """The convolution, differentiable once; with final states a pair."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        numbers: Tensor | None,
        bounds: Tensor | None,
        ends: Tensor | None,
        silu: bool,
        return_final_states: bool,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, weight, bias, initial, numbers, bounds, ends)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        layout = Layout(numbers, bounds, ends)
        y, final = conv_forward(x, weight, bias, initial, layout, silu, return_final_states)
        return (y, final) if return_final_states else y

    @staticmethod
    @first_order_only("causal_conv1d")
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial, numbers, bounds, ends = ctx.saved_tensors
        if dy is None:
            # only the final states were used
            dy = torch.zeros_like(x)
        layout = Layout(numbers, bounds, ends)
        gradients = conv_backward(x, weight, bias, initial, layout, ctx.silu, dy, dfinal)
        return *gradients, *(None,) * 5


def _dense_rows(value: Tensor) -> Tensor:
    """`value` with its channels next to each other; a copy only where they are not."""
    return value if value.stride(-1) == 1 else value.contiguous()


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` in Triton; arguments as there, assumed to be checked. fp64, more than 8 taps and empty inputs run in eager."""
    if left_to_eager(x, weight, bias, initial_states, taps=weight.shape[1]):
        return causal_conv1d_eager(
            x,
            weight,
            bias=bias,
            activation=activation,
            initial_states=initial_states,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=return_final_states,
        )
    x = _dense_rows(x)
    bias = None if bias is None else bias.contiguous()
    initial = None if initial_states is None else initial_states.contiguous()
    layout = layout_of(x, seq_idx, cu_seqlens)
    floats = (x, weight, bias, initial)
    silu = activation is not None
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in floats):
        return CausalConv1dTritonFunction.apply(*floats, *layout, silu, return_final_states)
    y, final = conv_forward(x, weight, bias, initial, layout, silu, return_final_states)
    return y if final is None else (y, final)
