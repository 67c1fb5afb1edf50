"""The decoding step of a layer in few launches: a linear layer with its norm and residual, and what lies between two of them."""

from .interface import fused_linear, mamba2_step, mamba_step

__all__ = ["fused_linear", "mamba2_step", "mamba_step"]
