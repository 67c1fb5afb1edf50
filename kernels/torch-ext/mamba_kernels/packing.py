"""Packed sequences: several sequences in one row, told apart by `seq_idx` or `cu_seqlens`.

`seq_idx` (B, L) holds the sequence number of each token. The recurrent state starts anew wherever the number differs from
that of the token before. A negative number marks padding: such a token gives output 0, receives no gradient and leaves the
state as it was, so a row's final state is the state at its last real token.

`cu_seqlens` (n + 1,) holds the cumulative lengths of n sequences laid end to end in a batch of one, as FlashAttention's
variable-length functions take them: `[0, len_0, len_0 + len_1, …, L]`. Sequences of length 0 are allowed. Every sequence has
its own initial and final state.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from .checks import check_dtype, check_shape, check_tensor

__all__ = [
    "check_packing",
    "cu_seqlens_to_seq_idx",
    "remember_while_captured",
    "remembered",
    "resets_and_valid",
    "segments_and_valid",
]

T = TypeVar("T")

INTEGER_DTYPES = (torch.int32, torch.int64)


def check_packing(op: str, batch: int, length: int, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Check packing metadata and return the number of states an op keeps: n with `cu_seqlens`, else `batch`.

    Raises:
        TypeError: not an integer tensor.
        ValueError: both given, wrong shape, or `cu_seqlens` that does not rise from 0 to `length` in a batch of one.
    """
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError(f"{op}: `seq_idx` and `cu_seqlens` both describe the packing; give only one of them.")
    if seq_idx is not None:
        check_tensor(op, "seq_idx", seq_idx)
        check_dtype(op, "seq_idx", seq_idx, INTEGER_DTYPES)
        check_shape(op, "seq_idx", seq_idx, (batch, length), "(B, L)")
    if cu_seqlens is None:
        return batch
    check_tensor(op, "cu_seqlens", cu_seqlens)
    check_dtype(op, "cu_seqlens", cu_seqlens, INTEGER_DTYPES)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{op}: `cu_seqlens` must have shape (n + 1,) with n >= 1, got {tuple(cu_seqlens.shape)}.")
    if batch != 1:
        raise ValueError(f"{op}: `cu_seqlens` packs all sequences into a batch of one, got a batch of {batch}.")
    # values are read only where that costs no device synchronisation and cannot break a graph
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != length or any(b < a for a, b in pairwise(values)):
            raise ValueError(
                f"{op}: `cu_seqlens` must rise from 0 to the length {length} without decreasing, got {values}."
            )
    return cu_seqlens.numel() - 1


def remembered(packing: Tensor, name: str, make: Callable[[], T]) -> T:
    """`make()`, kept on the tensor `packing`, which all layers of a model get, until its values change.

    While a CUDA graph is captured that is so for tensors given to `remember_while_captured` only: what was made before
    would not change when the graph is replayed.
    """
    if torch.compiler.is_compiling() or packing.is_inference():
        return make()
    if packing.is_cuda and torch.cuda.is_current_stream_capturing():
        made = getattr(packing, "_mamba_kernels_captured", None)
        if made is None:
            return make()
    else:
        version, made = getattr(packing, "_mamba_kernels_made", (None, {}))
        if version != packing._version:
            made = {}
            packing._mamba_kernels_made = (packing._version, made)  # type: ignore[attr-defined]
    if name not in made:
        made[name] = make()
    return made[name]


def remember_while_captured(packing: Tensor) -> Tensor:
    """Mark a tensor that was made within the CUDA graph now being captured, and is used in no other, for `remembered`."""
    packing._mamba_kernels_captured = {}  # type: ignore[attr-defined]
    return packing


def cu_seqlens_to_seq_idx(cu_seqlens: Tensor, length: int) -> Tensor:
    """Sequence number of each of `length` tokens, (1, length) int32, from `cu_seqlens` (n + 1,)."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)).to(torch.int32)[None]


def resets_and_valid(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Where the state starts anew and which tokens are real.

    Args:
        seq_idx: (B, L) integer; negative = padding.

    Returns:
        resets: (B, L) bool, True at each real token whose number differs from that of the real token before it.
        valid: (B, L) bool, True at real tokens.
    """
    valid = seq_idx >= 0
    length = seq_idx.shape[1]
    positions = torch.arange(length, device=seq_idx.device).expand_as(seq_idx)
    last_valid = torch.where(valid, positions, -1).cummax(dim=1).values if length else positions
    previous = torch.nn.functional.pad(last_valid, (1, 0), value=-1)[:, :length]
    previous_idx = seq_idx.gather(1, previous.clamp(min=0))
    return valid & (previous >= 0) & (previous_idx != seq_idx), valid


def segments_and_valid(seq_idx: Tensor) -> tuple[Tensor, Tensor | None]:
    """A number for each run of one sequence, and which tokens are real.

    Args:
        seq_idx: (B, L) integer; negative = padding.

    Returns:
        segments: (B, L) int64, how often the state has started anew up to each token; 0 for a row's first sequence.
        valid: (B, L) bool, True at real tokens; None where there is no padding and that can be seen for free.
    """
    resets, valid = resets_and_valid(seq_idx)
    segments = resets.cumsum(dim=1)
    if valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all()):
        return segments, None
    return segments, valid
