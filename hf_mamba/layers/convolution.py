"""The short causal convolution in front of the scan, as a module that is always called, so that hooks and wrappers work."""

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mamba_kernels import causal_conv1d, causal_conv1d_update

__all__ = ["CausalConv1d"]


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over time with left context only, then an activation.

    Parameters have the names and shapes of the checkpoints: `weight` (D, 1, W) and `bias` (D,).

    Args:
        channels: D.
        width: W, at least 1.
        bias: whether there is a bias.
        activation: name of the activation that follows.
    """

    def __init__(self, channels: int, width: int, bias: bool, activation: str):
        super().__init__(channels, channels, width, groups=channels, bias=bias, padding=width - 1)
        # silu is fused into the op; anything else runs after it
        self.fused_activation = activation if activation in ("silu", "swish") else None
        self.activation = None if self.fused_activation else ACT2FN[activation]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_final_states: bool = False,
        conv_state: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolve a whole sequence, or take one step on a state.

        Args:
            x: (B, L, D), or (B, D) with `conv_state`.
            initial_states: (B, D, W - 1), the inputs before `x`.
            seq_idx: (B, L), sequence numbers; negative = padding.
            return_final_states: also return the last W - 1 inputs of each row, (B, D, W - 1).
            conv_state: (B, D, ≥ W - 1), updated in place; takes one step.
        """
        weight = self.weight.squeeze(1)
        if conv_state is not None:
            out = causal_conv1d_update(x, conv_state, weight, self.bias, activation=self.fused_activation)
            return out if self.activation is None else self.activation(out)
        result: Any = causal_conv1d(
            x,
            weight,
            self.bias,
            activation=self.fused_activation,
            initial_states=initial_states,
            seq_idx=seq_idx,
            return_final_states=return_final_states,
        )
        if self.activation is None:
            return result
        if return_final_states:
            return self.activation(result[0]), result[1]
        return self.activation(result)

    def context(self, conv_state: Tensor | None) -> Tensor | None:
        """The last W - 1 inputs out of a state (B, D, ≥ W - 1), as `initial_states`."""
        if conv_state is None:
            return None
        context = self.kernel_size[0] - 1
        return conv_state[..., conv_state.shape[-1] - context :]
