"""Mixers from behind their first projection on, as one function of it in training."""

from .interface import MixerSizes, mamba2_inner, mixers_are_fused

__all__ = ["MixerSizes", "mamba2_inner", "mixers_are_fused"]
