"""RMS norms: plain, with the residual addition in front, and grouped with a gate."""

from .eager import add_rms_norm_eager, rms_norm_eager, rms_norm_gated_eager
from .interface import add_rms_norm, rms_norm, rms_norm_gated
from .reference import add_rms_norm_ref, rms_norm_gated_ref, rms_norm_ref

__all__ = [
    "add_rms_norm",
    "add_rms_norm_eager",
    "add_rms_norm_ref",
    "rms_norm",
    "rms_norm_eager",
    "rms_norm_gated",
    "rms_norm_gated_eager",
    "rms_norm_gated_ref",
    "rms_norm_ref",
]
