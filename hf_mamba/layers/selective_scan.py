"""The Mamba mixer: projection, short convolution, input-dependent SSM parameters, selective scan (arXiv 2312.00752, §3).

Symbols: B batch, L length, d model width, D inner width, N state size, R time-step rank, W convolution width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from mamba_kernels import rms_norm, selective_scan, selective_state_update
from mamba_kernels.mixer import MAMBA_OPS, mamba_inner, mixers_are_fused

from ..cache_layer import read_states, write_states
from .convolution import CausalConv1d
from .linear import is_plain_linear, is_unhooked
from .projection import project

__all__ = ["SelectiveScanMixer"]


class SelectiveScanMixer(nn.Module):
    """Mamba's mixer, (B, L, d) → (B, L, d).

    Args:
        config: needs `hidden_size`, `intermediate_size`, `state_size`, `conv_kernel`, `time_step_rank`, `use_bias`,
            `use_conv_bias`, `hidden_act` and the `time_step_*` initialisation fields.
        layer_idx: index of the layer's states in the cache.
        parameter_norm_eps: if given, dt, B and C pass an RMSNorm without weights before `dt_proj` and the scan, in
            training as in inference (Falcon-Mamba, arXiv 2410.05355, §2.3).
    """

    # read by the PEFT integration: every projection is called as a module, so LoRA on any of them takes effect
    supports_lora_everywhere = True

    def __init__(self, config, layer_idx: int, parameter_norm_eps: float | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # in training, compute in backward again what takes little time; see `RecurrentPreTrainedModel.set_lean_training`
        self.is_lean = False
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.ssm_state_size = config.state_size
        self.time_step_rank = int(config.time_step_rank)
        self.parameter_norm_eps = parameter_norm_eps

        self.conv1d = CausalConv1d(
            self.intermediate_size, config.conv_kernel, bias=config.use_conv_bias, activation=config.hidden_act
        )
        self.in_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=config.use_bias)
        self.x_proj = nn.Linear(self.intermediate_size, self.time_step_rank + 2 * self.ssm_state_size, bias=False)
        self.dt_proj = nn.Linear(self.time_step_rank, self.intermediate_size, bias=True)
        # the recurrence multiplies by exp(dt * A) thousands of times: these stay in fp32 whatever the model's dtype
        self.A_log = nn.Parameter(torch.empty(self.intermediate_size, self.ssm_state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.intermediate_size, dtype=torch.float32))
        self.out_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=config.use_bias)

    @torch.no_grad()
    def init_ssm_parameters(self) -> None:
        """A = -(1, …, N) (S4D-Real), D = 1, and dt log-uniform in [time_step_min, time_step_max] (Mamba, §3.6)."""
        config = self.config
        A = torch.arange(1, self.ssm_state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(A).expand(self.intermediate_size, -1))
        init.ones_(self.D)
        std = self.time_step_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            init.constant_(self.dt_proj.weight, std)
        else:
            init.uniform_(self.dt_proj.weight, -std, std)
        init.copy_(self.dt_proj.bias, initial_dt_bias(config, self.intermediate_size, self.dt_proj.bias.device))

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one row's convolution state and SSM state in a cache."""
        context = self.conv1d.kernel_size[0] - 1
        return (self.intermediate_size, context), (self.intermediate_size, self.ssm_state_size)

    def forward(
        self,
        hidden_states: Tensor | None,
        cache: Cache | None = None,
        seq_idx: Tensor | None = None,
        real: Tensor | None = None,
        A: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """Mix over time.

        Args:
            hidden_states: (B, L, d).
            cache: states to continue from and to update, or None.
            seq_idx: (B, L), sequence numbers, trailing negatives = padding; None = one sequence a row.
            real: (B, L, 1) in the dtype of `hidden_states`, 0 at padding in front of a row and 1 behind, where
                `hidden_states` is 0 at padding and there is no state yet; see `pads_in_front`. Without gradients only.
            A: `-exp(A_log)`, from a caller that has computed it for all layers at once.
            projected: the output of `in_proj`, from a caller that has computed it; `hidden_states` is not looked at then.
        """
        if projected is None:
            assert hidden_states is not None
            projected = project(self.in_proj, hidden_states)
        if cache is None and real is None and self._is_fused(projected):
            return self._run_fused(projected, seq_idx)
        x, z = projected.chunk(2, dim=-1)
        conv_state, ssm_state = read_states(cache, self.layer_idx)
        if ssm_state is not None and can_step(projected, seq_idx):
            x = self.conv1d(x[:, 0], conv_state=conv_state)
            dt, B, C, dt_bias = self._ssm_parameters(x)
            y: Any = selective_state_update(
                ssm_state,
                x,
                dt,
                self._A(),
                B,
                C,
                D=self.D,
                z=z[:, 0],
                dt_bias=dt_bias,
            )
            return project(self.out_proj, y[:, None])
        keep_states = cache is not None
        x = self.conv1d(
            x,
            initial_states=self.conv1d.context(conv_state),
            seq_idx=seq_idx,
            return_final_states=keep_states,
        )
        if cache is not None:
            x, final_conv_state = x
        dt, B, C, dt_bias = self._ssm_parameters(x, real)
        y = selective_scan(
            x,
            dt,
            self._A() if A is None else A,
            B,
            C,
            D=self.D,
            z=z,
            dt_bias=dt_bias,
            initial_states=ssm_state,
            seq_idx=seq_idx,
            return_final_states=keep_states,
        )
        if cache is not None:
            y, final_ssm_state = y
            write_states(cache, self.layer_idx, final_conv_state, final_ssm_state)
        return project(self.out_proj, y)

    def _is_fused(self, projected: Tensor) -> bool:
        """Whether what follows on the projection runs as one function, which training on a GPU does.

        False where a module inside is of another kind, or somebody watches it.
        """
        conv, linears = self.conv1d, (self.x_proj, self.dt_proj, self.out_proj)
        if self.parameter_norm_eps is not None or type(conv) is not CausalConv1d or conv.activation is not None:
            return False
        if not is_unhooked(conv) or type(conv.weight) is not nn.Parameter:
            return False
        if not all(is_plain_linear(linear) and is_unhooked(linear) for linear in linears):
            return False
        if any(linear.weight.dtype != projected.dtype for linear in linears) or self.x_proj.bias is not None:
            return False
        return mixers_are_fused(
            projected,
            conv.weight,
            *(linear.weight for linear in linears),
            state_size=self.ssm_state_size,
            taps=conv.kernel_size[0],
            ops=MAMBA_OPS,
        )

    def _run_fused(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The mixer's output from the projection (B, L, 2 D), without states."""
        return mamba_inner(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self._A(),
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
            silu=self.conv1d.fused_activation is not None,
            seq_idx=seq_idx,
            recompute=self.is_lean,
        )

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    @property
    def pads_in_front(self) -> bool:
        """Whether padding in front of a row that is 0 goes through as 0, with B = 0 there, and leaves no trace in the states."""
        return all(is_plain_linear(linear) and linear.bias is None for linear in (self.in_proj, self.out_proj))

    def _ssm_parameters(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dt (…, D), B and C (…, N), and the time-step bias if it is not in dt yet."""
        parameters = self.x_proj(x)
        if real is not None:
            parameters = parameters.mul_(real)
        dt, B, C = parameters.split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        if self.parameter_norm_eps is not None:
            dt, B, C = (rms_norm(value, None, eps=self.parameter_norm_eps) for value in (dt, B, C))
        if is_plain_linear(self.dt_proj):
            # the bias is added in fp32 inside the scan: in bf16, dt would lose up to two percent
            return F.linear(dt, self.dt_proj.weight), B, C, self.dt_proj.bias
        return self.dt_proj(dt), B, C, None


def can_step(hidden_states: Tensor, seq_idx: Tensor | None) -> bool:
    """Whether the in-place single-token update applies to states at hand: one real token, no gradient wanted."""
    return hidden_states.shape[1] == 1 and seq_idx is None and not torch.is_grad_enabled()


def initial_dt_bias(config, size: int, device: torch.device) -> Tensor:
    """Inverse softplus of time steps drawn log-uniformly from [time_step_min, time_step_max], floored; (size,) fp32."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    dt = torch.exp(torch.rand(size, device=device, dtype=torch.float32) * (high - low) + low)
    dt = dt.clamp(min=config.time_step_floor)
    return dt + torch.log(-torch.expm1(-dt))
