"""The field's de-facto op names, signatures and layouts on top of this package's ops.

Code written for the CUDA packages `mamba_ssm` 2.3 and `causal_conv1d` 1.7 runs unchanged with these functions, on any device:

| here | there |
| --- | --- |
| `selective_scan_fn`, `mamba_inner_fn` | `mamba_ssm.ops.selective_scan_interface` |
| `selective_state_update` | `mamba_ssm.ops.triton.selective_state_update` |
| `mamba_chunk_scan_combined`, `mamba_split_conv1d_scan_combined` | `mamba_ssm.ops.triton.ssd_combined` |
| `rmsnorm_fn` | `mamba_ssm.ops.triton.layernorm_gated` |
| `layer_norm_fn`, `rms_norm_fn` | `mamba_ssm.ops.triton.layer_norm` |
| `causal_conv1d_fn`, `causal_conv1d_update` | `causal_conv1d` |
| `causal_conv1d_varlen_states` | `causal_conv1d.causal_conv1d_varlen` |

Where the originals are wrong these are right: gradients pass through `initial_states` and final states everywhere, norms of B, C
and dt sit where Falcon-Mamba has them, `D` and `dt_bias` may be None in the single step, and packed sequences get their initial
state also when they end in the first chunk. Complex `A` is not supported and refused.
"""

from .convolution import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from .mamba import mamba_inner_fn, selective_scan_fn
from .mamba2 import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from .normalisation import layer_norm_fn, rms_norm_fn, rmsnorm_fn
from .step import selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "layer_norm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_fn",
    "rmsnorm_fn",
    "selective_scan_fn",
    "selective_state_update",
]
