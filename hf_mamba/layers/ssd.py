"""The Mamba-2 mixer: one projection, short convolution, SSD, gated norm (arXiv 2405.21060, §7).

Symbols: B batch, L length, d model width, D inner width, H heads, P head dim, G groups, N state size, W convolution width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from mamba_kernels import ssd_chunk_scan, ssd_state_update
from mamba_kernels.mixer import MixerSizes, mamba2_inner, mixers_are_fused

from ..cache_layer import read_states, write_states
from .convolution import CausalConv1d
from .linear import is_plain_linear, is_unhooked
from .norms import GatedRMSNorm
from .projection import project
from .selective_scan import can_step, initial_dt_bias

__all__ = ["SSDMixer"]


class SSDMixer(nn.Module):
    """Mamba-2's mixer, (B, L, d) → (B, L, d).

    Args:
        config: needs `hidden_size`, `expand`, `num_heads`, `head_dim`, `n_groups`, `state_size`, `conv_kernel`, `chunk_size`,
            `use_bias`, `use_conv_bias`, `hidden_act`, `layer_norm_epsilon` and the `time_step_*` fields.
        layer_idx: index of the layer's states in the cache.
    """

    # read by the PEFT integration: every projection is called as a module, so LoRA on any of them takes effect
    supports_lora_everywhere = True

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # in training, compute in backward again what takes little time; see `RecurrentPreTrainedModel.set_lean_training`
        self.is_lean = False
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.n_groups, self.ssm_state_size = config.n_groups, config.state_size
        self.intermediate_size = self.num_heads * self.head_dim
        self.chunk_size = config.chunk_size
        self.time_step_limit = (float(config.time_step_limit[0]), float(config.time_step_limit[1]))
        self.conv_dim = self.intermediate_size + 2 * self.n_groups * self.ssm_state_size

        self.conv1d = CausalConv1d(
            self.conv_dim, config.conv_kernel, bias=config.use_conv_bias, activation=config.hidden_act
        )
        projection_size = self.intermediate_size + self.conv_dim + self.num_heads
        self.in_proj = nn.Linear(config.hidden_size, projection_size, bias=config.use_bias)
        # the recurrence multiplies by exp(dt * A) thousands of times: these stay in fp32 whatever the model's dtype
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(
            self.intermediate_size,
            group_size=self.intermediate_size // self.n_groups,
            eps=config.layer_norm_epsilon,
        )
        self.out_proj = nn.Linear(self.intermediate_size, config.hidden_size, bias=config.use_bias)

    @torch.no_grad()
    def init_ssm_parameters(self) -> None:
        """-A uniform in [1, 16], D = 1, dt log-uniform in [time_step_min, time_step_max], as the Mamba-2 code does."""
        A = torch.empty(self.num_heads, dtype=torch.float32, device=self.A_log.device).uniform_(1, 16)
        init.copy_(self.A_log, torch.log(A))
        init.ones_(self.D)
        init.copy_(self.dt_bias, initial_dt_bias(self.config, self.num_heads, self.dt_bias.device))

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one row's convolution state and SSM state in a cache."""
        context = self.conv1d.kernel_size[0] - 1
        return (self.conv_dim, context), (self.num_heads, self.head_dim, self.ssm_state_size)

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
        widths = [self.intermediate_size, self.conv_dim, self.num_heads]
        if projected is None:
            assert hidden_states is not None
            projected = project(self.in_proj, hidden_states)
        if cache is None and real is None and self._is_fused(projected):
            return self._run_fused(projected, seq_idx)
        z, xBC, dt = projected.split(widths, dim=-1)
        conv_state, ssm_state = read_states(cache, self.layer_idx)
        A = -torch.exp(self.A_log.float()) if A is None else A
        if ssm_state is not None and can_step(projected, seq_idx):
            x, B, C = self._split(self.conv1d(xBC[:, 0], conv_state=conv_state))
            y: Any = ssd_state_update(
                ssm_state,
                x,
                dt[:, 0],
                A,
                B,
                C,
                D=self.D,
                dt_bias=self.dt_bias,
                dt_limit=self.time_step_limit,
            )
            return project(self.out_proj, self.norm(y.flatten(-2)[:, None], z))
        keep_states = cache is not None
        xBC = self.conv1d(
            xBC,
            initial_states=self.conv1d.context(conv_state),
            seq_idx=seq_idx,
            return_final_states=keep_states,
        )
        if cache is not None:
            xBC, final_conv_state = xBC
        x, B, C = self._split(xBC)
        if real is not None:
            B.mul_(real[..., None])
        y = ssd_chunk_scan(
            x,
            dt,
            A,
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.time_step_limit,
            initial_states=ssm_state,
            seq_idx=seq_idx,
            return_final_states=keep_states,
        )
        if cache is not None:
            y, final_ssm_state = y
            write_states(cache, self.layer_idx, final_conv_state, final_ssm_state)
        return project(self.out_proj, self.norm(y.flatten(-2), z))

    def _is_fused(self, projected: Tensor) -> bool:
        """Whether what follows on the projection runs as one function, which training on a GPU does.

        False where a module inside is of another kind, or somebody watches it.
        """
        conv, norm = self.conv1d, self.norm
        if not (type(conv) is CausalConv1d and type(norm) is GatedRMSNorm and conv.activation is None):
            return False
        if not is_unhooked(conv) or not is_unhooked(norm) or type(conv.weight) is not nn.Parameter:
            return False
        return mixers_are_fused(
            projected, conv.weight, norm.weight, state_size=self.ssm_state_size, taps=conv.kernel_size[0]
        )

    def _run_fused(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """The mixer's output from the projection (B, L, 2 D + 2 G N + H), without states."""
        sizes = MixerSizes(
            heads=self.num_heads,
            head_dim=self.head_dim,
            groups=self.n_groups,
            state_size=self.ssm_state_size,
            eps=self.norm.variance_epsilon,
            group_size=self.norm.group_size,
            silu=self.conv1d.fused_activation is not None,
            dt_limit=self.time_step_limit,
        )
        last = self.out_proj
        joins = is_plain_linear(last) and is_unhooked(last) and last.weight.dtype == projected.dtype
        y = mamba2_inner(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            -torch.exp(self.A_log.float()),
            self.D,
            self.dt_bias,
            self.norm.weight,
            sizes,
            out_weight=last.weight if joins else None,
            out_bias=last.bias if joins else None,
            seq_idx=seq_idx,
            recompute=self.is_lean,
        )
        return y if joins else last(y)

    @property
    def pads_in_front(self) -> bool:
        """Whether padding in front of a row that is 0 goes through as 0, with B = 0 there, and leaves no trace in the states."""
        return all(is_plain_linear(linear) and linear.bias is None for linear in (self.in_proj, self.out_proj))

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, H, P), B and C (…, G, N) out of the convolution's output."""
        group_width = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, group_width, group_width], dim=-1)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            B.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            C.unflatten(-1, (self.n_groups, self.ssm_state_size)),
        )
