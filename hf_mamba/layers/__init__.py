"""Building blocks of the models: mixers, convolution and norms around the ops of `mamba_kernels`."""

from .convolution import CausalConv1d
from .norms import GatedRMSNorm, LayerNorm, RMSNorm
from .selective_scan import SelectiveScanMixer
from .ssd import SSDMixer

__all__ = ["CausalConv1d", "GatedRMSNorm", "LayerNorm", "RMSNorm", "SSDMixer", "SelectiveScanMixer"]
