"""RMSNorm or LayerNorm before each mixer, and the gated, grouped RMSNorm inside Mamba-2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_kernels import rms_norm, rms_norm_gated

__all__ = ["GatedRMSNorm", "LayerNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467) with statistics in fp32.

    The output has the dtype of the weight, so a residual stream kept in fp32 comes out in the model's dtype.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        out = rms_norm(hidden_states, weight, eps=self.variance_epsilon)
        # a cast to the same type is not free on a decoding step
        return out if out.dtype == weight.dtype else out.to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class LayerNorm(nn.Module):
    """Layer norm with weight and bias (Ba et al., arXiv 1607.06450) and statistics in fp32.

    The output has the dtype of the weight, as that of `RMSNorm`.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        out = F.layer_norm(
            hidden_states.to(dtype),
            self.weight.shape,
            self.weight.to(dtype),
            self.bias.to(dtype),
            eps=self.variance_epsilon,
        )
        return out.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class GatedRMSNorm(nn.Module):
    """`rms_norm(x · silu(z))` over groups of `group_size` channels (Mamba-2, arXiv 2405.21060, section 7.2)."""

    def __init__(self, hidden_size: int, group_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.group_size = group_size
        self.variance_epsilon = eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return rms_norm_gated(x, self.weight, z, eps=self.variance_epsilon, group_size=self.group_size)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, group_size={self.group_size}, eps={self.variance_epsilon}"
