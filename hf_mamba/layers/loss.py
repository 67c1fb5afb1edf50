"""Cross-entropy of a linear head, a part of the tokens at a time, so that the logits of all of them never exist.

At a vocabulary of 50,000 and 16,384 tokens, logits and their gradient are 3.3 GB each in fp32: more than all the layers of a
small model keep. Here a part of them exists at a time. The gradient of the loss needs nothing that comes after it, so it is made
of the same logits and nothing is computed twice; of a head that has to be called (an adapter, quantised, offloaded), backward
computes the parts again.

torch 2.13's own `linear_cross_entropy` was measured beside it and returns a loss in the dtype of its inputs: in bf16 the sum
over 2,048 tokens was 4 % off. Liger's kernel, which works as this does, is used on GPUs where it is installed (`pip install
hf-mamba[liger]`).

Symbols: N tokens, d model width, V vocabulary.
"""

import functools
import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mamba_kernels.cross_entropy import cross_entropy_and_gradient

from .linear import is_plain_linear

__all__ = ["chunked_cross_entropy"]

# logits that exist at a time: 128 MiB in fp32, and 256 MiB where they are 16 bits wide
MAX_LOGITS = 2**25


def chunked_cross_entropy(
    head: nn.Module,
    hidden_states: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """The cross-entropy of `head(hidden_states)` in fp32, without the logits of all tokens.

    Args:
        head: a linear layer of d inputs and V outputs, of any kind: plain, with an adapter, quantised, offloaded.
        hidden_states: (…, d).
        targets: (…) int64, `ignore_index` where there is none; already shifted.
        num_items: what the sum is divided by, the targets of all accumulated batches; None = the number of targets here.
        chunk_size: tokens at a time; by default as many as make `MAX_LOGITS` logits.
        vocab_size: V, for a head in a wrapper that does not show its `out_features`.

    Returns:
        () fp32, differentiable in `hidden_states` and the parameters of `head`; NaN, as that of transformers, if there is
        neither a target nor `num_items`.

    Example:
        >>> import torch
        >>> from hf_mamba.layers.loss import chunked_cross_entropy
        >>> head, x, targets = torch.nn.Linear(4, 9), torch.randn(2, 5, 4), torch.randint(9, (2, 5))
        >>> whole = torch.nn.functional.cross_entropy(head(x).flatten(0, 1), targets.flatten())
        >>> torch.allclose(chunked_cross_entropy(head, x, targets, chunk_size=3), whole)
        True
    """
    hidden_states, targets = hidden_states.flatten(0, -2), targets.flatten().to(hidden_states.device)
    items = (targets != ignore_index).sum() if num_items is None else num_items
    items = items.to(hidden_states.device) if isinstance(items, Tensor) else items
    # without a gradient of its input, Liger's has none for the head either
    fits_liger = hidden_states.is_cuda and hidden_states.requires_grad and is_plain_linear(head)
    if fits_liger and not torch.compiler.is_compiling() and _has_liger():
        return _liger_sum(head, hidden_states, targets, ignore_index) / items
    if chunk_size is None:
        # a quantised weight may not show the vocabulary
        chunk_size = max(1, MAX_LOGITS // (vocab_size or cast(Any, head).out_features))
        if hidden_states.is_cuda and is_plain_linear(head) and hidden_states.dtype in (torch.bfloat16, torch.float16):
            # there, logits exist in 16 bits alone; longer parts make better products
            chunk_size *= 4
    if is_plain_linear(head):
        return (
            LinearCrossEntropy.apply(hidden_states, head.weight, head.bias, targets, ignore_index, chunk_size) / items
        )

    def summed(x: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(x).float(), wanted, ignore_index=ignore_index, reduction="sum")

    # dropout in an adapter must drop the same values twice; otherwise reading the generators would be for nothing
    keep_generators = not is_plain_linear(head)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    for x, wanted in zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            part: Any = checkpoint(summed, x, wanted, use_reentrant=False, preserve_rng_state=keep_generators)
        else:
            part = summed(x, wanted)
        total = total + part
    return total / items


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of `x @ weight.T + bias`; gradients are made in forward, of the same logits.

    x (N, d), weight (V, d), bias (V,) or None, targets (N,); returns () fp32. The gradients of weight and bias are summed
    over the parts in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        chunk_size: int,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(dtype, torch.float32)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        parts_of_x: list[Tensor] = []
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants_bias else None
        total = x.new_zeros((), dtype=wide)
        with torch.autocast(device, enabled=False):
            for whole, wanted in zip(x.split(chunk_size), targets.split(chunk_size), strict=True):
                part = whole.to(dtype)
                logits = F.linear(part, head, offset)
                if not any((wants_x, wants_weight, wants_bias)):
                    total = total + F.cross_entropy(
                        logits.to(wide), wanted, ignore_index=ignore_index, reduction="sum"
                    )
                    continue
                losses, grads = cross_entropy_and_gradient(logits, wanted, ignore_index)
                total = total + losses.sum()
                if wants_x:
                    parts_of_x.append((grads @ head).to(x.dtype))
                if grad_weight is not None:
                    grad_weight = _add_product(grad_weight, grads, part)
                if grad_bias is not None:
                    grad_bias = grad_bias + grads.sum(dim=0, dtype=wide)
        ctx.save_for_backward(torch.cat(parts_of_x) if wants_x else None, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_x is None else grad_x * grad,
            None if grad_weight is None else _scaled(grad_weight, grad, weight_dtype),
            None if grad_bias is None else _scaled(grad_bias, grad, bias_dtype),
            None,
            None,
            None,
        )


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`total * factor` in `dtype`, without another tensor in the dtype of `total`."""
    if torch.compiler.is_compiling():
        return (total * factor).to(dtype)
    return torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))


def _add_product(total: Tensor, grads: Tensor, x: Tensor) -> Tensor:
    """`total + grads.T @ x`, summed in the dtype of `total`, in place if it can be."""
    if torch.compiler.is_compiling():
        return total + grads.mT @ x
    if total.dtype == x.dtype:
        return torch.addmm(total, grads.mT, x, out=total)
    if x.is_cuda:
        # without rounding the product first
        return torch.addmm(total, grads.mT, x, out_dtype=total.dtype, out=total)
    return total.add_(grads.mT @ x)


@functools.cache
def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _liger_sum(head: Any, hidden_states: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(
        hidden_states,
        head.weight,
        targets,
        bias=head.bias,
        ignore_index=ignore_index,
        reduction="sum",
    )
    return loss.float()
