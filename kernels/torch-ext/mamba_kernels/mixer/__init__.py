"""Mixers from behind their first projection on, as one function of it in training."""

from .interface import MixerSizes, add_norm_linear, mamba2_inner, mixers_are_fused, projections_are_fused

__all__ = ["MixerSizes", "add_norm_linear", "mamba2_inner", "mixers_are_fused", "projections_are_fused"]
