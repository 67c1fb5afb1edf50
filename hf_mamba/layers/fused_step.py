"""A block's decoding step on a GPU in four or five launches for one row, up to seven for more: norm and residual go into the projections.

A few tokens of a draft go the same way, with the states after each of them, on a CPU as well.

Only where calling the modules one after the other would do nothing else: everything plain, unhooked, and in one dtype. The
states are those of the ordinary step, so one can follow the other.

Symbols: B batch, T drafted tokens, d model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mamba_kernels import fused_linear, mamba2_step, mamba_step
from mamba_kernels.decode import conv_verify, mamba2_verify, mamba_verify
from mamba_kernels.dispatch import select

from ..cache_layer import Drafts, held_states, read_states
from .convolution import CausalConv1d
from .linear import is_plain_linear
from .norms import GatedRMSNorm, RMSNorm
from .projection import project
from .selective_scan import SelectiveScanMixer, can_step
from .ssd import SSDMixer

__all__ = ["MOST_DRAFTED", "fused_step"]

# tokens of one forward after each of which the states are kept
MOST_DRAFTED = 16


def fused_step(
    norm: nn.Module, mixer: Any, residual: Tensor, cache: Cache | None, seq_idx: Tensor | None
) -> Tensor | None:
    """`residual + mixer(norm(residual))` for one token of every row, or a few of a draft; None where modules have to be called.

    Args:
        norm: in front of the mixer.
        mixer: of either kind.
        residual: (B, 1, d), or (B, T, d) where the cache is recording or verifying, in the dtype of the residual stream.
        cache: the states, updated in place.
        seq_idx: anything but None means that this is no plain step.

    Raises:
        RuntimeError: the cache is one for verifying, and the modules would have to be called.
    """
    if getattr(cache, "verifying", False):
        return _verify(norm, mixer, residual, cache, seq_idx)
    if getattr(cache, "recording", False) and residual.shape[1] > 1:
        return _record(norm, mixer, residual, cache, seq_idx)
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


def _verify(norm: Any, mixer: Any, residual: Tensor, cache: Any, seq_idx: Tensor | None) -> Tensor:
    """The tokens after the accepted one of the forward before."""
    drafts = cache.layers[mixer.layer_idx].drafts
    out = None
    if drafts is not None and residual.shape[1] == drafts.tokens:
        out = _drafted(norm, mixer, residual, drafts, seq_idx)
    if out is None:
        raise RuntimeError("This model's mixers cannot verify drafted tokens, as they have to be called as modules.")
    return out


def _record(norm: Any, mixer: Any, residual: Tensor, cache: Any, seq_idx: Tensor | None) -> Tensor | None:
    """Tokens that may be taken back, after the states that the cache holds."""
    layer = cache.layers[mixer.layer_idx]
    pair = held_states(layer)
    if residual.shape[1] > MOST_DRAFTED or pair is None:
        return None
    last = residual.shape[1] - 1
    accepted = torch.full((len(residual),), last, device=residual.device)
    drafts = Drafts.for_states(*pair, last + 1, accepted)
    for state, held in zip(drafts.after(last), pair, strict=True):
        state.copy_(held)
    out = _drafted(norm, mixer, residual, drafts, seq_idx)
    if out is not None:
        layer.drafts = drafts
        layer.go_back(last)
    return out


def _drafted(norm: Any, mixer: Any, residual: Tensor, drafts: Drafts, seq_idx: Tensor | None) -> Tensor | None:
    """(B, T, d), with the states after every token left in `drafts`."""
    if seq_idx is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kind = type(mixer)
    if kind not in (SelectiveScanMixer, SSDMixer) or not _is_plain(mixer, kind):
        return None
    if not _is_plain(mixer.conv1d, CausalConv1d):
        return None
    return (_selective_scan_drafted if kind is SelectiveScanMixer else _ssd_drafted)(norm, mixer, residual, drafts)


def _selective_scan_drafted(norm: Any, mixer: Any, residual: Tensor, drafts: Drafts) -> Tensor | None:
    if not _plain_projections(norm, mixer.conv1d, mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
        return None
    x, z = _project_tokens(mixer.in_proj, residual, norm=norm).chunk(2, dim=-1)
    x = _convolve(mixer.conv1d, x, drafts)
    y = mamba_verify(
        drafts.states,
        drafts.accepted,
        x,
        _project_tokens(mixer.x_proj, x),
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
        z,
        norm_eps=mixer.parameter_norm_eps,
    )
    return _project_tokens(mixer.out_proj, y, residual=residual)


def _ssd_drafted(norm: Any, mixer: Any, residual: Tensor, drafts: Drafts) -> Tensor | None:
    gated = mixer.norm
    if not _is_plain(gated, GatedRMSNorm) or not _plain_projections(norm, mixer.conv1d, mixer.in_proj, mixer.out_proj):
        return None
    widths = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    z, xBC, dt = _project_tokens(mixer.in_proj, residual, norm=norm).split(widths, dim=-1)
    y = mamba2_verify(
        drafts.states,
        drafts.accepted,
        _convolve(mixer.conv1d, xBC, drafts),
        dt,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        groups=mixer.n_groups,
        dt_limit=mixer.time_step_limit,
    )
    return _project_tokens(mixer.out_proj, y, norm=gated, z=z, residual=residual)


def _convolve(conv: Any, x: Tensor, drafts: Drafts) -> Tensor:
    return conv_verify(
        drafts.history, drafts.accepted, x, conv.weight.squeeze(1), conv.bias, activation=conv.fused_activation
    )


def _project_tokens(
    linear: Any, x: Tensor, norm: Any = None, z: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`residual + linear(norm(x))` for x (B, T, ·); with `z`, the norm is a plain gated one."""
    fused = select("fused_linear", x.device) == "triton"
    if norm is not None and not (fused and (z is not None or _is_plain(norm, RMSNorm))):
        x, norm, z = norm(x) if z is None else norm(x, z), None, None
    if not fused:
        out = project(linear, x)
        return out if residual is None else residual + out
    options: dict[str, Any] = {}
    if norm is not None:
        options = {"norm_weight": norm.weight, "eps": norm.variance_epsilon}
    if z is not None:
        options |= {"z": z.flatten(0, 1), "group_size": norm.group_size}
    if residual is not None:
        options["residual"] = residual.flatten(0, 1)
    return _project(linear, x.flatten(0, 1), **options).unflatten(0, x.shape[:2])


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
