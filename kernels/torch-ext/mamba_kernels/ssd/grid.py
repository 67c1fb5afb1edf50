"""Sequences laid end to end, cut into chunks of which none holds tokens of two sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import cu_seqlens_to_seq_idx

__all__ = ["ChunkGrid", "chunk_grid"]


class ChunkGrid(NamedTuple):
    """Where tokens, initial and final states of n sequences go in a row of chunks.

    tokens (chunks · block,): the token at each place; filled (chunks · block,) bool: whether there is one; places (L,): the
    place of each token; enter (chunks,): the sequence that begins with a chunk, or -1; leave (chunks,): the sequence that
    ends with a chunk, or n.
    """

    tokens: Tensor
    filled: Tensor
    places: Tensor
    enter: Tensor
    leave: Tensor

    def gather(self, value: Tensor) -> Tensor:
        """(1, L, …) → (1, chunks · block, …), zero at places without a token."""
        gathered = value[0].index_select(0, self.tokens)
        return gathered.masked_fill(~self.filled.view(-1, *[1] * (value.dim() - 2)), 0.0)[None]


def chunk_grid(cu_seqlens: Tensor, length: int, block: int) -> ChunkGrid:
    """The grid for `cu_seqlens` (n + 1,), `length` ≥ 1 tokens and chunks of `block` tokens.

    The number of chunks depends on shapes alone, so that a graph can be traced and a GPU need not be waited for; on a CPU
    outside of a compiler the chunks that stay empty are dropped.
    """
    device = cu_seqlens.device
    n = cu_seqlens.numel() - 1
    cu_seqlens = cu_seqlens.long()
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = (ends - starts + block - 1) // block
    last_chunks = counts.cumsum(0)
    first_chunks = last_chunks - counts
    chunks = length // block + n
    if device.type == "cpu" and not torch.compiler.is_compiling():
        chunks = int(last_chunks[-1])
    numbers = torch.arange(chunks, device=device)
    sequence = torch.searchsorted(last_chunks, numbers, right=True)
    used = sequence < n
    sequence = sequence.clamp(max=n - 1)
    offset = (numbers - first_chunks[sequence]) * block
    tokens = (starts[sequence] + offset)[:, None] + torch.arange(block, device=device)
    filled = (tokens < ends[sequence][:, None]) & used[:, None]
    own = cu_seqlens_to_seq_idx(cu_seqlens, length)[0]
    return ChunkGrid(
        tokens=tokens.clamp(0, length - 1).flatten(),
        filled=filled.flatten(),
        places=torch.arange(length, device=device) - starts[own] + first_chunks[own] * block,
        enter=torch.where(used & (offset == 0), sequence, -1),
        leave=torch.where(used & (numbers == last_chunks[sequence] - 1), sequence, n),
    )
