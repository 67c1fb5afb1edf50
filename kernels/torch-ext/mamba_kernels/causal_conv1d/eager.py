"""The causal convolution in vectorised torch: W shifted multiply-adds on blocks of tokens that stay in the cache.

On a CPU this is two to five times faster than `conv1d` with as many groups as channels, which wants channel-first input.
Backward recomputes the value before the activation from `x`, so `x` and the parameters are all that is saved.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order_only
from ..packing import cu_seqlens_to_seq_idx, segments_and_valid

__all__ = ["causal_conv1d_eager"]

# elements of a block of tokens, 1 MB in fp32: halves of a few fit the second-level caches of two cores (docs/performance.md)
BLOCK_ELEMENTS = 2**18


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    """Ranges of tokens to work on one after the other; a single one where a compiler or a GPU does better with it."""
    batch, length, width = x.shape
    step = length
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(16, BLOCK_ELEMENTS // max(1, batch * width))
    return [(start, min(start + step, length)) for start in range(0, length, max(step, 1))]


def _tap(
    x: Tensor, start: int, end: int, shift: int, segments: Tensor | None, dtype: torch.dtype
) -> tuple[int, Tensor]:
    """Inputs `shift` tokens before tokens start … end, as far as they exist: the first such token and the inputs."""
    first = min(max(start, shift), end)
    value = x[:, first - shift : end - shift].to(dtype)
    if segments is not None and shift:
        value = value * (segments[:, first:end] == segments[:, first - shift : end - shift])[..., None]
    return first, value


class CausalConv1dFunction(torch.autograd.Function):
    """The convolution without states.

    x (B, L, D); weight (D, W); bias (D,) or None; extra (B, W - 1, D) or (n, W - 1, D) or None, what the initial states add
    before the activation to the tokens listed in `extra_index`: the first tokens of each row (None), or (n, W - 1) positions
    in a batch of one, where L stands for nowhere; segments (B, L) or None, equal inside a sequence.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        extra: Tensor | None,
        extra_index: Tensor | None,
        segments: Tensor | None,
        silu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, extra, extra_index, segments)
        ctx.silu = silu
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        taps, offset = _parameters(x, weight, bias)
        spread = _spread(extra, extra_index, x.shape[1])
        for start, end in _blocks(x):
            pre = _pre_activation(x, taps, offset, spread, segments, start, end)
            y[:, start:end] = torch.nn.functional.silu(pre) if silu else pre
        return y

    @staticmethod
    @first_order_only("causal_conv1d")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, extra, extra_index, segments = ctx.saved_tensors
        taps, offset = _parameters(x, weight, bias)
        length = x.shape[1]
        n_taps = len(taps)
        spread = _spread(extra, extra_index, length)
        dpre = torch.empty(x.shape, dtype=taps.dtype, device=x.device)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtaps = torch.zeros_like(taps)
        # from the end, since the gradient of an input comes from the outputs up to W - 1 tokens after it
        for start, end in reversed(_blocks(x)):
            block = dy[:, start:end].to(taps.dtype)
            if ctx.silu:
                pre = _pre_activation(x, taps, offset, spread, segments, start, end)
                block = torch.ops.aten.silu_backward(block, pre)
            dpre[:, start:end] = block
            for shift in range(n_taps):
                first, value = _tap(x, start, end, shift, segments, taps.dtype)
                if first < end:
                    dtaps[n_taps - 1 - shift] += (dpre[:, first:end] * value).sum((0, 1))
            gradient = dpre[:, start:end] * taps[n_taps - 1]
            for shift in range(1, n_taps):
                stop = min(end, length - shift)
                if stop <= start:
                    continue
                value = dpre[:, start + shift : stop + shift]
                if segments is not None:
                    same = segments[:, start + shift : stop + shift] == segments[:, start:stop]
                    value = value * same[..., None]
                gradient[:, : stop - start].addcmul_(value, taps[n_taps - 1 - shift])
            dx[:, start:end] = gradient
        dbias = None if bias is None else dpre.sum((0, 1)).to(bias.dtype)
        dextra = None
        if extra is not None:
            if extra_index is None:
                dextra = torch.zeros_like(extra)
                dextra[:, :length] = dpre[:, : extra.shape[1]]
            else:
                padded = torch.nn.functional.pad(dpre[0], (0, 0, 0, 1))
                dextra = padded[extra_index]
            dextra = dextra.to(extra.dtype)
        return dx, dtaps.t().to(weight.dtype), dbias, dextra, None, None, None


def _parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Taps (W, D) and bias (D,) in the dtype of the sums."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.t().to(dtype).contiguous()
    return taps, taps.new_zeros(taps.shape[1]) if bias is None else bias.to(dtype)


def _spread(extra: Tensor | None, extra_index: Tensor | None, length: int) -> Tensor | None:
    """`extra` laid out over the tokens it belongs to: (B, up to W - 1, D), or (1, L, D) for packed sequences."""
    if extra is None:
        return None
    if extra_index is None:
        return extra[:, :length]
    # position L collects what belongs to no token
    spread = extra.new_zeros(length + 1, extra.shape[-1])
    spread.index_copy_(0, extra_index.flatten(), extra.flatten(0, 1))
    return spread[None, :length]


def _pre_activation(
    x: Tensor, taps: Tensor, bias: Tensor, spread: Tensor | None, segments: Tensor | None, start: int, end: int
) -> Tensor:
    """Tokens start … end of the convolution before the activation, (B, end - start, D)."""
    newest = len(taps) - 1
    pre = torch.addcmul(bias, x[:, start:end].to(taps.dtype), taps[newest])
    for shift in range(1, newest + 1):
        first, value = _tap(x, start, end, shift, segments, taps.dtype)
        if first < end:
            pre[:, first - start :].addcmul_(value, taps[newest - shift])
    if spread is not None and start < spread.shape[1]:
        stop = min(end, spread.shape[1])
        pre[:, : stop - start] += spread[:, start:stop]
    return pre


def _from_states(states: Tensor, weight: Tensor) -> Tensor:
    """What inputs before the first token add to the first W - 1 outputs; states (S, D, W - 1) → (S, W - 1, D)."""
    before = states.shape[-1]
    # output p sees input i of the states through tap i - p
    columns = [(states[..., p:] * weight[:, : before - p]).sum(-1) for p in range(before)]
    return torch.stack(columns, dim=1)


def _final_states(
    x: Tensor,
    states: Tensor,
    starts: Tensor,
    ends: Tensor,
    uses_states: Tensor,
    segments: Tensor | None,
) -> Tensor:
    """The last W - 1 inputs of each sequence, (S, W - 1, D).

    x (B, L, D) or a batch of one with S sequences in it; states (S, W - 1, D), the inputs before `starts`; starts, ends (S,),
    first token and one past the last; uses_states (S,) bool; segments (B, L) or None.
    """
    n_states, before, _ = states.shape
    length = x.shape[1]
    positions = ends[:, None] + torch.arange(-before, 0, device=x.device)
    relative = positions - starts[:, None]
    rows = torch.arange(n_states, device=x.device)[:, None]
    # one of `before` inputs of the states, or their zeros where the sequence began afresh
    old = states[rows, (relative + before).clamp(0, max(before - 1, 0))] * uses_states[:, None, None]
    if length == 0:
        return old
    inside = positions.clamp(0, length - 1)
    x_rows = rows if x.shape[0] == n_states else torch.zeros_like(rows)
    new = x[x_rows, inside]
    if segments is not None:
        last = segments[x_rows, (ends[:, None] - 1).clamp(min=0)]
        new = new * (segments[x_rows, inside] == last)[..., None]
    return torch.where((relative >= 0)[..., None], new, old)


def causal_conv1d_eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` without its argument checks."""
    length, width = x.shape[1:]
    before = weight.shape[1] - 1
    device = x.device
    segments = valid = None
    if cu_seqlens is not None:
        segments = cu_seqlens_to_seq_idx(cu_seqlens, length)
    elif seq_idx is not None:
        segments, valid = segments_and_valid(seq_idx)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
    extra = extra_index = None
    if initial_states is not None and before:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        extra = _from_states(initial_states.to(dtype), weight.to(dtype))
        steps = torch.arange(before, device=device)
        if cu_seqlens is not None:
            positions = cu_seqlens[:-1, None] + steps
            extra_index = torch.where(positions < cu_seqlens[1:, None], positions, length)
        elif segments is not None:
            reached = torch.nn.functional.pad(segments[:, :before] == 0, (0, max(0, before - length)))
            extra = extra * reached[..., None]
    y = CausalConv1dFunction.apply(x, weight, bias, extra, extra_index, segments, activation is not None)
    if valid is not None:
        y = y.masked_fill(~valid[..., None], 0.0)
    if not return_final_states:
        return y
    n_states = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if before == 0:
        return y, x.new_zeros(n_states, width, 0)
    if initial_states is None:
        states = x.new_zeros(n_states, before, width)
    else:
        states = initial_states.transpose(1, 2).to(x.dtype)
    if segments is None:
        final = torch.cat([states, x[:, max(0, length - before) :]], dim=1)[:, -before:]
    elif cu_seqlens is not None:
        always = torch.ones(n_states, dtype=torch.bool, device=device)
        final = _final_states(x, states, cu_seqlens[:-1], cu_seqlens[1:], always, None)
    else:
        if valid is None:
            ends = torch.full((n_states,), length, device=device)
        else:
            tokens = torch.arange(1, length + 1, device=device)
            ends = (valid * tokens).amax(dim=1) if length else tokens.new_zeros(n_states)
        # no reset anywhere: the row's last sequence is its first
        first = segments[:, -1] == 0 if length else torch.ones(n_states, dtype=torch.bool, device=device)
        final = _final_states(x, states, torch.zeros_like(ends), ends, first, segments)
    return y, final.transpose(1, 2).contiguous()
