"""The decoding step of a layer in few launches: a linear layer with its norm and residual, and what lies between two of them.

The ops named verify do the same for drafted tokens, with the state after each of them.
"""

from .interface import fused_linear, mamba2_step, mamba_step
from .verify import conv_verify, mamba2_verify, mamba_verify

__all__ = ["conv_verify", "fused_linear", "mamba2_step", "mamba2_verify", "mamba_step", "mamba_verify"]
