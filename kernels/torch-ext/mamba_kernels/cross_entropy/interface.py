"""Cross-entropy of logits and its gradient, in the memory of the logits. Symbols: N tokens, V vocabulary."""

import torch
from torch import Tensor

from ..dispatch import left_to_eager, on_device, select

__all__ = ["cross_entropy_and_gradient"]


def cross_entropy_and_gradient(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, and its gradient, softmax minus one at the target.

    Args:
        logits: (N, V) with rows that are contiguous; given up, since the gradient may take their memory.
        targets: (N,) int64 in 0 … V - 1, or `ignore_index`.

    Returns:
        (N,) fp32 (fp64 for fp64 logits), 0 where the target is ignored, and (N, V) in the dtype of the logits, 0 there too.

    Not differentiable: it is the backward.
    """
    # where the norms have kernels, this has one
    in_triton = select("rms_norm", logits.device) == "triton" and not torch.compiler.is_compiling()
    if in_triton and not left_to_eager(logits):
        from .triton_cross_entropy import cross_entropy_triton

        with on_device(logits.device):
            return cross_entropy_triton(logits, targets, ignore_index)
    return _in_torch(logits, targets, ignore_index)


def _in_torch(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = targets != ignore_index
    index = targets.where(counts, 0)[:, None]
    logs = torch.log_softmax(logits, dim=-1, dtype=wide)
    chosen = logs.gather(1, index)
    gradient = logs.exp().to(logits.dtype) if torch.compiler.is_compiling() else torch.exp(logs, out=logits)
    # from the logarithm, or what is left of a probability near one would be lost to rounding
    gradient = gradient.scatter(1, index, torch.expm1(chosen).to(logits.dtype))
    return -chosen.squeeze(1).where(counts, 0), gradient.where(counts[:, None], 0)
