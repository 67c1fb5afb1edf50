"""Cross-entropy and its gradient in one launch: each program reads a row of logits three times, twice from the cache.

    m = max(x);  s = sum(exp(x - m));  loss = log(s) - (x[target] - m);  dx = exp(x - m) / s - [target]

Symbols: N tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_triton"]

# logits that a program holds at a time, and its warps
BLOCK_V, NUM_WARPS = 8192, 16


@triton.jit
def _cross_entropy_kernel(
    x_ptr,
    target_ptr,
    loss_ptr,
    stride_n,
    V,
    ignore_index,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # both are given in units of ALIGNED, which lets the compiler load that many logits at once
    stride_n, V = stride_n * ALIGNED, V * ALIGNED
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride_n
    target = tl.load(target_ptr + row)
    o_v = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        for start in range(0, V, BLOCK_V):
            b_zero = tl.zeros([BLOCK_V], dtype=x_ptr.dtype.element_ty)
            tl.store(p_x + start + o_v, b_zero, mask=start + o_v < V)
        tl.store(loss_ptr + row, 0.0)
    else:
        # sums of each lane apart: one reduction at the end
        b_max = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
        for start in range(0, V, BLOCK_V):
            b_x = tl.load(p_x + start + o_v, mask=start + o_v < V, other=float("-inf")).to(tl.float32)
            b_max = tl.maximum(b_max, b_x)
        largest = tl.max(b_max, 0)
        b_sum = tl.zeros([BLOCK_V], dtype=tl.float32)
        for start in range(0, V, BLOCK_V):
            b_x = tl.load(p_x + start + o_v, mask=start + o_v < V, other=float("-inf")).to(tl.float32)
            b_sum += tl.exp(b_x - largest)
        total = tl.sum(b_sum, 0)
        share = 1.0 / total
        chosen = tl.load(p_x + target).to(tl.float32)
        tl.store(loss_ptr + row, tl.log(total) - (chosen - largest))
        for start in range(0, V, BLOCK_V):
            b_x = tl.load(p_x + start + o_v, mask=start + o_v < V, other=float("-inf")).to(tl.float32)
            b_dx = tl.exp(b_x - largest) * share - tl.where(start + o_v == target, 1.0, 0.0)
            tl.store(p_x + start + o_v, b_dx.to(x_ptr.dtype.element_ty), mask=start + o_v < V)


def cross_entropy_triton(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """`cross_entropy_and_gradient`, the gradient in the memory of the logits."""
    tokens, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    # 16 bytes of bf16
    aligned = 8 if vocabulary % 8 == 0 and logits.stride(0) % 8 == 0 and logits.data_ptr() % 16 == 0 else 1
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(tokens,)](
        logits,
        targets.contiguous(),
        losses,
        logits.stride(0) // aligned,
        vocabulary // aligned,
        ignore_index,
        ALIGNED=aligned,
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
    )
    return losses, logits
