"""Where sequences begin, and which tokens are padding: one layout for masks and packing metadata of every kind.

Padding masks (left, right or in between), `seq_idx`, `cu_seq_lens_q` and `position_ids` that start again all say the same
thing to a recurrent layer: which tokens belong together. `resolve_layout` turns any of them into one `SequenceLayout`. With
padding, the real tokens of each row are moved to its left, in order, so that padding is trailing and can reach neither a
convolution window nor a state; the outputs are moved back at the end.

Symbols: B batch, L length, n packed sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_kernels.packing import check_packing, cu_seqlens_to_seq_idx

__all__ = ["SequenceLayout", "padding_mask", "resolve_layout"]


@dataclass(frozen=True)
class SequenceLayout:
    """How the tokens of a batch are grouped into sequences.

    Attributes:
        seq_idx: (B, L) int32, the sequence number of each aligned token, -1 for padding; None when every row is one sequence
            without padding.
        order: (B, L) int64, the input position of each aligned token; None when tokens stay where they are.
    """

    seq_idx: Tensor | None = None
    order: Tensor | None = None

    def align(self, values: Tensor) -> Tensor:
        """Move the real tokens of each row of `values` (B, L, …) to its left."""
        return values if self.order is None else _gather_tokens(values, self.order)

    def restore(self, values: Tensor) -> Tensor:
        """Undo `align` on `values` (B, L, …)."""
        return values if self.order is None else _gather_tokens(values, self.order.argsort(dim=1))

    @property
    def starts(self) -> Tensor | None:
        """(B, L) bool in input order, True at each real token that has no real token of its sequence directly before it."""
        if self.seq_idx is None:
            return None
        seq_idx = self.restore(self.seq_idx)
        before = torch.nn.functional.pad(seq_idx, (1, 0), value=-1)[:, :-1]
        return (seq_idx >= 0) & (seq_idx != before)

    @property
    def valid(self) -> Tensor | None:
        """(B, L) bool, True at real tokens in aligned order; None when there is no padding information."""
        return None if self.seq_idx is None else self.seq_idx >= 0


def _gather_tokens(values: Tensor, order: Tensor) -> Tensor:
    index = order.view(*order.shape, *(1,) * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def padding_mask(attention_mask: Tensor | None, batch: int, length: int, seen: int | None) -> Tensor | None:
    """The columns of `attention_mask` that belong to the current tokens, (B, L) bool, or None if nothing is padding.

    Args:
        attention_mask: (B, L) for the current tokens or (B, seen + L) for the whole sequence; non-zero = real token.
        seen: tokens the cache has seen, 0 without a cache, None if the cache does not count them.

    Raises:
        ValueError: the mask is not two-dimensional or its length fits neither.
    """
    if attention_mask is None:
        return None
    allowed = {length, length + seen} if seen is not None else None
    fits = attention_mask.shape[-1] in allowed if allowed is not None else attention_mask.shape[-1] >= length
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or not fits:
        total = f" or ({batch}, {length + seen}) with the {seen} cached tokens" if seen else ""
        raise ValueError(
            f"`attention_mask` must have shape ({batch}, {length}){total}, got {tuple(attention_mask.shape)}; "
            "a recurrent model takes the 2-D padding mask the tokenizer returns."
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :]
    mask = mask if mask.dtype == torch.bool else mask != 0
    # under torch.compile no value may be read, so every mask is taken to hold padding
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def resolve_layout(
    batch: int,
    length: int,
    *,
    padding: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> SequenceLayout:
    """Combine padding and packing metadata into one layout.

    The first of `seq_idx`, `cu_seqlens` and `position_ids` that is given decides where sequences begin;
    `DataCollatorWithFlattening` emits all three for the same borders.

    Args:
        padding: (B, L) bool, False at padding, from `padding_mask`.
        position_ids: (B, L), (1, L) or (L,) integer; a sequence begins wherever a position does not follow the one before.
        seq_idx: (B, L) integer; a sequence begins wherever the number changes; negative = padding.
        cu_seqlens: (n + 1,) integer, cumulative lengths; needs B = 1.

    Raises:
        TypeError, ValueError: metadata of the wrong type or shape, or that does not add up to the length.
    """
    if cu_seqlens is not None:
        check_packing("cu_seq_lens_q", batch, length, None, cu_seqlens)
    if seq_idx is not None:
        check_packing("seq_idx", batch, length, seq_idx, None)
        if cu_seqlens is not None:
            _check_same_borders(seq_idx, cu_seqlens)
    elif cu_seqlens is not None:
        seq_idx = cu_seqlens_to_seq_idx(cu_seqlens, length)
    elif position_ids is not None and length > 1:
        return _layout_from_positions(batch, length, padding, position_ids)
    if padding is None:
        return _packed(seq_idx)
    if seq_idx is None:
        seq_idx = torch.zeros_like(padding, dtype=torch.int32)
    return _left_aligned(torch.where(padding, seq_idx, -1))


def _check_same_borders(seq_idx: Tensor, cu_seqlens: Tensor) -> None:
    """Raise unless both say the same about the real tokens; not under torch.compile, where no value may be read."""
    if torch.compiler.is_compiling() or seq_idx.shape[1] == 0:
        return
    other = cu_seqlens_to_seq_idx(cu_seqlens, seq_idx.shape[1])
    both_real = (seq_idx[:, 1:] >= 0) & (seq_idx[:, :-1] >= 0)
    differ = seq_idx.diff(dim=1).ne(0) != other.diff(dim=1).ne(0)
    if bool((both_real & differ).any()):
        raise ValueError(
            "`seq_idx` and `cu_seq_lens_q` put the borders between sequences at different tokens; give only one of them."
        )


def _layout_from_positions(batch: int, length: int, padding: Tensor | None, position_ids: Tensor) -> SequenceLayout:
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise TypeError(f"`position_ids` must be an integer tensor, got {position_ids.dtype}.")
    positions = position_ids[None] if position_ids.dim() == 1 else position_ids
    if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != length:
        raise ValueError(
            f"`position_ids` must have shape ({batch}, {length}), (1, {length}) or ({length},), "
            f"got {tuple(position_ids.shape)}."
        )
    positions = positions.expand(batch, length)
    if padding is None:
        return _packed(_numbered(positions))
    # positions at padding mean nothing: number the sequences after the real tokens have been brought together
    layout = _left_aligned(torch.where(padding, 0, -1).to(torch.int32))
    numbers = _numbered(layout.align(positions))
    return SequenceLayout(seq_idx=numbers.masked_fill(~layout.align(padding), -1), order=layout.order)


def _numbered(positions: Tensor) -> Tensor:
    begins = positions[:, 1:] != positions[:, :-1] + 1
    return torch.nn.functional.pad(begins.cumsum(dim=1), (1, 0)).to(torch.int32)


def _packed(seq_idx: Tensor | None) -> SequenceLayout:
    if seq_idx is None or seq_idx.numel() == 0:
        return SequenceLayout()
    # under torch.compile no value may be read: take the general way
    if torch.compiler.is_compiling():
        return _left_aligned(seq_idx)
    if bool((seq_idx < 0).any()):
        return _left_aligned(seq_idx)
    return SequenceLayout() if bool((seq_idx == seq_idx[:, :1]).all()) else SequenceLayout(seq_idx.to(torch.int32))


def _left_aligned(seq_idx: Tensor) -> SequenceLayout:
    order = (seq_idx < 0).to(torch.int8).argsort(dim=1, stable=True)
    return SequenceLayout(seq_idx=seq_idx.gather(1, order).to(torch.int32), order=order)
