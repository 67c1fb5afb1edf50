"""Shapes of a mixer's tensors, as mamba_ssm and transformers store them alike.

Symbols: d model width, D inner width, N state size, R time-step rank, W convolution width, H heads, G groups.
"""

from typing import Any

__all__ = ["mixer_shapes"]

Shape = tuple[int, ...]


def mixer_shapes(config: Any, mixer_type: str) -> dict[str, Shape]:
    """Name below `mixer.` → shape, for "mamba" or "mamba2" and a configuration with transformers' field names."""
    d, N, W = config.hidden_size, config.state_size, config.conv_kernel
    shapes: dict[str, Shape]
    if mixer_type == "mamba2":
        H = config.num_heads
        D = H * config.head_dim
        conv = D + 2 * config.n_groups * N
        projection = D + conv + H
        shapes = {"dt_bias": (H,), "A_log": (H,), "D": (H,), "norm.weight": (D,)}
    else:
        D, R = config.intermediate_size, int(config.time_step_rank)
        conv, projection = D, 2 * D
        shapes = {
            "A_log": (D, N),
            "D": (D,),
            "x_proj.weight": (R + 2 * N, D),
            "dt_proj.weight": (D, R),
            "dt_proj.bias": (D,),
        }
    shapes |= {"in_proj.weight": (projection, d), "conv1d.weight": (conv, 1, W), "out_proj.weight": (d, D)}
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (conv,)
    if config.use_bias:
        shapes |= {"in_proj.bias": (projection,), "out_proj.bias": (d,)}
    return shapes
