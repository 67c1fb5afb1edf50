"""Mixers from behind their first projection on, as one function of it in training."""

from .interface import (
    MAMBA_OPS,
    MixerSizes,
    add_norm_linear,
    mamba2_inner,
    mamba_inner,
    mixers_are_fused,
    projections_are_fused,
)

__all__ = [
    "MAMBA_OPS",
    "MixerSizes",
    "add_norm_linear",
    "mamba2_inner",
    "mamba_inner",
    "mixers_are_fused",
    "projections_are_fused",
]
