"""Which sizes the Triton SSD scan takes in 16 bits; all others it takes in fp32."""

from torch import Tensor

__all__ = ["fits_16_bits", "in_whole_rows"]

# Where a stride is a multiple of this, Triton knows it and fetches operands of 16 bits in whole words.
WHOLE = 16
SMALLEST_HEAD = 32


def fits_16_bits(head_dim: int, state_size: int) -> bool:
    """Whether heads of these sizes may be multiplied in 16 bits.

    With others, triton 3.6 made code for sm_90 whose backward faulted or gave wrong gradients: of B for head_dim 24, 40 and 120
    (NaN), of A for some of 24, 40, 48, 80 and 96, of x for 16. Published models have 64 or 128 (docs/performance.md).
    """
    return head_dim >= SMALLEST_HEAD and head_dim & (head_dim - 1) == 0 and state_size % WHOLE == 0


def in_whole_rows(*values: Tensor | None) -> bool:
    """Whether all strides but the innermost are multiples of `WHOLE`."""
    return all(stride % WHOLE == 0 for value in values if value is not None for stride in value.stride()[:-1])
