"""The ops as layers that transformers can put in place of its own functions.

Each class has the name under which transformers and `kernels` know the function, and exactly its parameters: the loader
compares number and kind. The classes hold no state. scripts/build_kernel.py puts this file into the package as
`mamba_kernels/layers.py`.

Shapes: B batch, L length, D channels, N state, H heads, P head dim, G groups, W convolution width.
"""

import math
from typing import Any

from torch import Tensor, nn

from . import compat
from .packing import cu_seqlens_to_seq_idx

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]


class causal_conv1d_fn(nn.Module):
    """Causal depthwise convolution of (B, D, L) with weights (D, W); packed sequences are kept apart."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        seq_idx = _seq_idx(kwargs, hidden_states.shape[-1])
        return compat.causal_conv1d_fn(hidden_states, weight, bias, seq_idx=seq_idx, activation=activation)


class causal_conv1d_update(nn.Module):
    """One more input (B, D, 1); `conv_state` (B, D, ≥ W - 1) is updated in place."""

    can_torch_compile = False
    has_backward = False

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        return compat.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


class selective_scan_fn(nn.Module):
    """Mamba's scan of (B, D, L); with `return_last_state` also the state (B, D, N) after the last token.

    `use_mambapy` and `use_associative_scan` choose among transformers' own implementations and mean nothing here.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        _refuse_packing("selective_scan_fn", kwargs)
        return compat.selective_scan_fn(
            hidden_states,
            dt,
            A,
            B,
            C,
            D=D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            return_last_state=return_last_state,
        )


class selective_state_update(nn.Module):
    """One token of Mamba, state (B, D, N), or of Mamba-2, state (B, H, P, N); the state is updated in place."""

    can_torch_compile = False
    has_backward = False

    def forward(
        self,
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return compat.selective_state_update(
            state, hidden_states, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
        )


class mamba_inner_fn(nn.Module):
    """A Mamba mixer behind its input projection: xz (B, 2 D, L) → (B, L, d)."""

    # Falcon-Mamba's constant norm weights are checked by value, which a graph cannot do
    can_torch_compile = False
    has_backward = True

    def forward(
        self,
        xz: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        x_proj_weight: Tensor,
        delta_proj_weight: Tensor,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        A: Tensor,
        B: Tensor | None = None,
        C: Tensor | None = None,
        D: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = True,
        b_rms_weight: Tensor | None = None,
        c_rms_weight: Tensor | None = None,
        dt_rms_weight: Tensor | None = None,
        b_c_dt_rms_eps: float = 1e-6,
        **kwargs: Any,
    ) -> Any:
        _refuse_packing("mamba_inner_fn", kwargs)
        return compat.mamba_inner_fn(
            xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            out_proj_weight,
            out_proj_bias,
            A,
            B,
            C,
            D,
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            b_rms_weight=b_rms_weight,
            c_rms_weight=c_rms_weight,
            dt_rms_weight=dt_rms_weight,
            b_c_dt_rms_eps=b_c_dt_rms_eps,
        )


class mamba_chunk_scan_combined(nn.Module):
    """Mamba-2's scan of (B, L, H, P); with `return_final_states` also the states (B, H, P, N)."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        return compat.mamba_chunk_scan_combined(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size,
            D=D,
            z=kwargs.get("z"),
            dt_bias=dt_bias,
            initial_states=initial_states,
            seq_idx=_seq_idx(kwargs, hidden_states.shape[1]),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=return_final_states,
        )


class mamba_split_conv1d_scan_combined(nn.Module):
    """A Mamba-2 mixer behind its input projection: zxbcdt (B, L, ·) → (B, L, d)."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        zxbcdt: Tensor,
        conv1d_weight: Tensor,
        conv1d_bias: Tensor | None,
        dt_bias: Tensor | None,
        A: Tensor,
        D: Tensor | None,
        chunk_size: int,
        initial_states: Tensor | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        activation: str | None = "silu",
        rmsnorm_weight: Tensor | None = None,
        rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None,
        outproj_bias: Tensor | None = None,
        headdim: int | None = None,
        ngroups: int = 1,
        norm_before_gate: bool = True,
        **kwargs: Any,
    ) -> Any:
        return compat.mamba_split_conv1d_scan_combined(
            zxbcdt,
            conv1d_weight,
            conv1d_bias,
            dt_bias,
            A,
            D,
            chunk_size,
            initial_states=initial_states,
            seq_idx=_seq_idx(kwargs, zxbcdt.shape[1]),
            dt_limit=dt_limit,
            return_final_states=return_final_states,
            activation=activation,
            rmsnorm_weight=rmsnorm_weight,
            rmsnorm_eps=rmsnorm_eps,
            outproj_weight=outproj_weight,
            outproj_bias=outproj_bias,
            headdim=headdim,
            ngroups=ngroups,
            norm_before_gate=norm_before_gate,
        )


def _seq_idx(kwargs: dict[str, Any], length: int) -> Tensor | None:
    """The sequence of each token (B, L), in whichever form the packing was given."""
    if kwargs.get("seq_idx") is not None:
        return kwargs["seq_idx"]
    cu_seqlens = kwargs.get("cu_seqlens")
    return None if cu_seqlens is None else cu_seqlens_to_seq_idx(cu_seqlens, length)


def _refuse_packing(name: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
        raise ValueError(
            f"{name}: transformers' Mamba layers have no packing, so `seq_idx` and `cu_seqlens` would mix the sequences; use "
            "hf_mamba's models, or pad."
        )
