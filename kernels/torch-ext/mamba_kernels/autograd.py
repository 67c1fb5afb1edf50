"""Gradients that refuse to be differentiated a second time."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order_only"]

Backward = Callable[..., tuple[Tensor | None, ...]]


class _RefuseSecondOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} can be differentiated only once; for second derivatives use "
            "`with mamba_kernels.backend('reference'):`, which is slow."
        )


def first_order_only(name: str) -> Callable[[Backward], Backward]:
    """Decorator for the backward of the op `name`: a second differentiation of its gradients raises a RuntimeError.

    `torch.autograd.function.once_differentiable` raises only where the incoming gradient requires grad itself. Behind a
    plain `loss.sum()` it gives gradients that are constants, and a gradient penalty on them would be silently lost.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def wrapper(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            # backward runs with gradients enabled only under create_graph=True
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            with torch.no_grad():
                results = backward(ctx, *gradients)
            if torch.compiler.is_compiling():
                return results
            return tuple(
                result if result is None else _RefuseSecondOrder.apply(result.detach().requires_grad_(), name)
                for result in results
            )

        return wrapper

    return decorate
