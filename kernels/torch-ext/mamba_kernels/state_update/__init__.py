"""Updates of a decoding cache by one or a few tokens: the recurrences of Mamba and Mamba-2, and the convolution."""

from .eager import causal_conv1d_update_eager, selective_state_update_eager, ssd_state_update_eager
from .interface import causal_conv1d_update, selective_state_update, ssd_state_update
from .reference import causal_conv1d_update_ref, selective_state_update_ref, ssd_state_update_ref

__all__ = [
    "causal_conv1d_update",
    "causal_conv1d_update_eager",
    "causal_conv1d_update_ref",
    "selective_state_update",
    "selective_state_update_eager",
    "selective_state_update_ref",
    "ssd_state_update",
    "ssd_state_update_eager",
    "ssd_state_update_ref",
]
