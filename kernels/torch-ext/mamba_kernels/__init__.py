"""State-space model ops for PyTorch: selective scan, SSD, causal convolution, state updates and norms.

Only torch is needed; Triton kernels are used where there are any for the device. `backend()` forces an implementation.
"""

from .causal_conv1d import causal_conv1d
from .decode import fused_linear, mamba2_step, mamba_step
from .dispatch import backend, forced_backend
from .norm import add_rms_norm, rms_norm, rms_norm_gated
from .selective_scan import selective_scan
from .ssd import ssd_chunk_scan
from .state_update import causal_conv1d_update, selective_state_update, ssd_state_update

__all__ = [
    "add_rms_norm",
    "backend",
    "causal_conv1d",
    "causal_conv1d_update",
    "forced_backend",
    "fused_linear",
    "mamba2_step",
    "mamba_step",
    "rms_norm",
    "rms_norm_gated",
    "selective_scan",
    "selective_state_update",
    "ssd_chunk_scan",
    "ssd_state_update",
]
