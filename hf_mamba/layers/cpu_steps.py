"""One token through the blocks of a model on a CPU, in the fewest calls.

A step of a small model is bound by them: an operation of torch takes 3 to 10 µs whatever it does, and the call of a module, the
checks of an op and the views of a weight take as much. Here everything that stays the same from token to token is found once,
for a cache: the weights, as views of the shape in which they are multiplied, and whether the modules do no more than is done here.

Only in fp32, where nothing is rounded on the way, so that states and results are those of the modules.

Symbols: B batch, d model width, K inputs, O outputs, D inner width, W convolution width.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_kernels.dispatch import select
from mamba_kernels.norm.eager import rms_norm_eager, rms_norm_gated_eager
from mamba_kernels.state_update.eager import LOG2_E, convolve_, selective_step_, ssd_step_, steps_in_place

from ..cache import RecurrentCache
from .convolution import CausalConv1d
from .linear import is_plain_linear
from .norms import GatedRMSNorm, RMSNorm
from .projection import MAX_ROWS, parts_of, product_in_parts, splits
from .selective_scan import SelectiveScanMixer
from .ssd import SSDMixer

__all__ = ["run_cpu_steps"]


class _Linear:
    """A plain linear layer, (B, K) → (B, O)."""

    def __init__(self, linear: Any) -> None:
        self.weight, self.bias = linear.weight, linear.bias
        self.parts = parts_of(linear.weight) if splits(linear.weight, linear.weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.parts is None:
            return F.linear(x, self.weight, self.bias)
        out = product_in_parts(x, self.parts)
        return out if self.bias is None else out.add_(self.bias)


class _Norm:
    """A plain RMS norm of (B, d)."""

    def __init__(self, norm: Any) -> None:
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return rms_norm_eager(x, self.weight, eps=self.eps)
        # the scale of a single row as a number of Python's: a tensor would take a call for each operation on it
        norm = torch.linalg.vector_norm(x).item()
        mean = norm * norm / x.shape[1] + self.eps
        return torch.mul(x, self.weight).mul_(1 / math.sqrt(mean) if mean > 0 else math.nan)


class _GatedNorm(_Norm):
    """A plain gated norm of (B, D) with its gate (B, D); may write to the first."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm)
        self.group_size = norm.group_size

    def gated(self, x: Tensor, z: Tensor) -> Tensor:
        if len(x) == 1 and x.shape[1] == self.group_size:
            return self(x.mul_(F.silu(z)))
        return rms_norm_gated_eager(x, self.weight, z, self.eps, self.group_size, norm_before_gate=False)


class _Convolution:
    """A plain convolution with silu, (B, D) → (B, D) on a state (B, D, W - 1)."""

    def __init__(self, conv: Any) -> None:
        self.taps, self.bias = conv.weight.squeeze(1).unbind(1), conv.bias

    def __call__(self, x: Tensor, conv_state: Tensor) -> Tensor:
        return F.silu(convolve_(conv_state, x, self.taps, self.bias), inplace=True)


class _SelectiveScanStep:
    """`x + mixer(norm(x))` of a Mamba block, (B, d) → (B, d), on its two states."""

    def __init__(self, norm: Any, mixer: Any) -> None:
        self.norm, self.convolution = _Norm(norm), _Convolution(mixer.conv1d)
        self.in_proj, self.x_proj = _Linear(mixer.in_proj), _Linear(mixer.x_proj)
        self.dt_proj, self.out_proj = _Linear(mixer.dt_proj), _Linear(mixer.out_proj)
        self.A_log, self.D = mixer.A_log, mixer.D
        self.parameter_eps = mixer.parameter_norm_eps
        self.widths = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]

    def __call__(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        x, z = self.in_proj(self.norm(hidden_states)).chunk(2, dim=1)
        x = self.convolution(x, conv_state)
        dt, B, C = self.x_proj(x).split(self.widths, dim=1)
        if self.parameter_eps is not None:
            dt, B, C = (rms_norm_eager(value, None, eps=self.parameter_eps) for value in (dt, B, C))
        delta = F.softplus(self.dt_proj(dt))
        # A = -exp(A_log), with its sign in the few steps and not in the many decays
        decay = torch.mul((delta * -LOG2_E)[..., None], torch.exp(self.A_log)).exp2_()
        return self.out_proj(selective_step_(ssm_state, x, delta, decay, B, C, self.D, z)).add_(hidden_states)


class _SSDStep:
    """`x + mixer(norm(x))` of a Mamba-2 block, (B, d) → (B, d), on its two states."""

    def __init__(self, norm: Any, mixer: Any) -> None:
        self.norm, self.convolution, self.gated_norm = _Norm(norm), _Convolution(mixer.conv1d), _GatedNorm(mixer.norm)
        self.in_proj, self.out_proj = _Linear(mixer.in_proj), _Linear(mixer.out_proj)
        self.A_log, self.D, self.dt_bias = mixer.A_log, mixer.D[:, None], mixer.dt_bias
        self.dt_limit = mixer.time_step_limit
        self.widths = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
        self.heads, self.groups = (mixer.num_heads, mixer.head_dim), (mixer.n_groups, mixer.ssm_state_size)
        group_width = mixer.n_groups * mixer.ssm_state_size
        self.inner_widths = [mixer.intermediate_size, group_width, group_width]

    def __call__(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        batch = len(hidden_states)
        z, xBC, dt = self.in_proj(self.norm(hidden_states)).split(self.widths, dim=1)
        x, B, C = self.convolution(xBC, conv_state).split(self.inner_widths, dim=1)
        delta = F.softplus(dt + self.dt_bias)
        if self.dt_limit != (0.0, math.inf):
            delta = delta.clamp_(*self.dt_limit)
        decay = torch.mul(delta, torch.exp(self.A_log)).neg_().exp_()
        x, B, C = x.view(batch, *self.heads), B.view(batch, *self.groups), C.view(batch, *self.groups)
        y = ssd_step_(ssm_state, x, delta, decay, B, C, self.D, None).view(batch, -1)
        return self.out_proj(self.gated_norm.gated(y, z)).add_(hidden_states)


class _Steps:
    """The steps of all blocks, and what they were made from, to see later that it has not changed."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        """For blocks that are all `_is_plain`."""
        self.blocks = blocks
        self.run: list[_SelectiveScanStep | _SSDStep] = []
        for block in blocks:
            plain: Any = block
            kind = _SelectiveScanStep if type(plain.mixer) is SelectiveScanMixer else _SSDStep
            self.run.append(kind(plain.norm, plain.mixer))
        modules = list(blocks.modules())
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._variables = [vars(module) for module in modules]
        self._children = [(m._modules, name, child) for m in modules for name, child in m.named_children()]
        self._parameters = [
            (module._parameters, name, parameter, parameter.data_ptr())
            for module in modules
            for name, parameter in module.named_parameters(recurse=False)
        ]

    def hold(self, blocks: nn.ModuleList) -> bool:
        """Whether these are the steps of `blocks`, whose modules are what they were, with weights where they were."""
        return (
            self.blocks is blocks
            and not any(self._hooks)
            and not any("forward" in variables for variables in self._variables)
            and all(children.get(name) is child for children, name, child in self._children)
            and all(
                parameters.get(name) is parameter and parameter.data_ptr() == address
                for parameters, name, parameter, address in self._parameters
            )
        )


# by the cache, so that views of weights do not outlive the text that is being written
_prepared: WeakKeyDictionary[RecurrentCache, _Steps] = WeakKeyDictionary()


def run_cpu_steps(blocks: nn.ModuleList, hidden_states: Tensor, cache: Any) -> Tensor | None:
    """One token of every row through all blocks; None where their modules have to be called.

    Args:
        blocks: their `forward` adds `mixer(norm(x))` to x.
        hidden_states: (B, 1, d).
        cache: updated in place.
    """
    if (
        type(cache) is not RecurrentCache
        or cache.verifying
        # no wrapper of a tensor, whose numbers could not be looked at
        or type(hidden_states) is not Tensor
        or hidden_states.device.type != "cpu"
        or hidden_states.dtype != torch.float32
        or hidden_states.shape[1] != 1
        or not 0 < len(hidden_states) <= MAX_ROWS
        or blocks.training
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or select("mamba_step", hidden_states.device) != "eager"
    ):
        return None
    x, states = hidden_states[:, 0], cache.states()
    if len(states) != len(blocks) or not all(_fits(state, x) for pair in states for state in pair):
        return None
    steps = _prepared.get(cache)
    if steps is None or not steps.hold(blocks):
        if not all(_is_plain(block, index) for index, block in enumerate(blocks)):
            return None
        steps = _prepared[cache] = _Steps(blocks)
    for step, pair in zip(steps.run, states, strict=True):
        x = step(x, *pair)
    return x[:, None]


def _fits(state: Tensor, x: Tensor) -> bool:
    return len(state) == len(x) and steps_in_place(state, x, None, False)


def _is_plain(block: Any, index: int) -> bool:
    """Whether a block consists of plain modules with fp32 weights on the CPU, and has the states of its place."""
    mixer = block.mixer
    linears: tuple[Any, ...]
    if type(mixer) is SelectiveScanMixer:
        linears = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    elif type(mixer) is SSDMixer and type(mixer.norm) is GatedRMSNorm:
        linears = (mixer.in_proj, mixer.out_proj)
    else:
        return False
    return (
        type(block.norm) is RMSNorm
        and mixer.layer_idx == index
        and type(mixer.conv1d) is CausalConv1d
        and mixer.conv1d.fused_activation is not None
        and all(map(is_plain_linear, linears))
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in block.modules())
        and all(
            type(parameter) is nn.Parameter and parameter.dtype == torch.float32 and parameter.device.type == "cpu"
            for parameter in block.parameters()
        )
    )
