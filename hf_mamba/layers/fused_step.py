"""A block's decoding step on a GPU in four or five launches, seven for many rows: norm and residual go into the projections.

Only where calling the modules one after the other would do nothing else: everything plain, unhooked, and in one dtype. The
states are those of the ordinary step, so one can follow the other.

Symbols: B batch, d model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mamba_kernels import fused_linear, mamba2_step, mamba_step
from mamba_kernels.dispatch import select

from ..cache_layer import read_states
from .convolution import CausalConv1d
from .linear import is_plain_linear
from .norms import GatedRMSNorm, RMSNorm
from .selective_scan import SelectiveScanMixer, can_step
from .ssd import SSDMixer

__all__ = ["fused_step"]


def fused_step(
    norm: nn.Module, mixer: Any, residual: Tensor, cache: Cache | None, seq_idx: Tensor | None
) -> Tensor | None:
    """`residual + mixer(norm(residual))` for one token of every row, or None where the modules have to be called.

    Args:
        norm: in front of the mixer.
        mixer: of either kind.
        residual: (B, 1, d), in the dtype of the residual stream.
        cache: the states, updated in place.
        seq_idx: anything but None means that this is no plain step.
    """
    if not can_step(residual, seq_idx) or torch.compiler.is_compiling():
        return None
    if select("fused_linear", residual.device) != "triton":
        return None
    kind = type(mixer)
    if kind not in (SelectiveScanMixer, SSDMixer) or not _is_plain(norm, RMSNorm) or not _is_plain(mixer, kind):
        return None
    conv_state, ssm_state = read_states(cache, mixer.layer_idx)
    if conv_state is None or ssm_state is None:
        return None
    step = _selective_scan_step if kind is SelectiveScanMixer else _ssd_step
    out = step(norm, mixer, residual[:, 0], conv_state, ssm_state)
    return None if out is None else out[:, None]


def _selective_scan_step(norm: Any, mixer: Any, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor | None:
    if not _plain_projections(norm, mixer.conv1d, mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
        return None
    residual = x
    x, z = _project(mixer.in_proj, x, norm_weight=norm.weight, eps=norm.variance_epsilon).chunk(2, dim=-1)
    x = mixer.conv1d(x, conv_state=conv_state)
    y = mamba_step(
        ssm_state,
        x,
        _project(mixer.x_proj, x),
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
        z,
        norm_eps=mixer.parameter_norm_eps,
    )
    return _project(mixer.out_proj, y, residual=residual)


def _ssd_step(norm: Any, mixer: Any, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor | None:
    gated = mixer.norm
    if not _is_plain(gated, GatedRMSNorm) or not _plain_projections(norm, mixer.conv1d, mixer.in_proj, mixer.out_proj):
        return None
    residual = x
    projected = _project(mixer.in_proj, x, norm_weight=norm.weight, eps=norm.variance_epsilon)
    z, xBC, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    y = mamba2_step(
        ssm_state,
        mixer.conv1d(xBC, conv_state=conv_state),
        dt,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        groups=mixer.n_groups,
        dt_limit=mixer.time_step_limit,
    )
    return _project(
        mixer.out_proj,
        y,
        norm_weight=gated.weight,
        eps=gated.variance_epsilon,
        z=z,
        group_size=gated.group_size,
        residual=residual,
    )


def _project(linear: Any, x: Tensor, **options: Any) -> Tensor:
    return fused_linear(x, linear.weight, bias=linear.bias, **options)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs the `forward` of `kind` and nothing else."""
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _plain_projections(norm: Any, conv: Any, *linears: Any) -> bool:
    """Whether the linear layers are plain, in one dtype with the norm, and the convolution has its activation built in."""
    dtype = norm.weight.dtype
    return (
        all(is_plain_linear(linear) and linear.weight.dtype == dtype for linear in linears)
        and type(conv) is CausalConv1d
        and conv.fused_activation is not None
        and not torch.is_autocast_enabled(norm.weight.device.type)
    )
