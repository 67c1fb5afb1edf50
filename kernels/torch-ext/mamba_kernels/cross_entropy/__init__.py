"""Cross-entropy and its gradient out of the same logits: what a training step does with a part of them. Not a public op."""

from .interface import cross_entropy_and_gradient

__all__ = ["cross_entropy_and_gradient"]
