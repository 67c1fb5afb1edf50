"""The architectures of the MoE-Mamba paper (arXiv 2401.04081, §4) at equal active parameters, in one frame.

All have pre-LayerNorm residual layers, ReLU feed-forward layers, Switch layers and the initialisation of the paper; Mamba and
attention take each other's place.

| name | block | parameters of a block that a token meets |
| --- | --- | --- |
| transformer | attention, feed-forward of width 4d | 4d² + 8d² |
| mamba | Mamba, Mamba | 6d² + 6d² |
| mamba-mlp | Mamba, feed-forward of width 3d | 6d² + 6d² |
| transformer-moe | attention, Switch with experts of width 4d | 4d² + 8d² |
| moe-mamba-E | Mamba, Switch with E experts of width 3d | 6d² + 6d² |

Shapes: B batch, L length, d model width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_mamba import MoeMambaConfig
from hf_mamba.models.moe_mamba.modeling_moe_mamba import MoeMambaBlock, MoeMambaForCausalLM, MoeMambaModel

__all__ = ["CausalAttention", "TransformerForCausalLM", "architecture_names", "build_model"]

ROPE_BASE = 10000.0


class CausalAttention(nn.Module):
    """Multi-head attention with rotary positions (RoFormer, arXiv 2104.09864), without biases.

    It is called as a Mamba mixer is, but knows neither caches nor packed sequences.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"`heads` {num_heads} must leave an even width of hidden_size {hidden_size} to each head."
            )
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, cache: Any = None, seq_idx: Tensor | None = None) -> Tensor:
        """(B, L, d) → (B, L, d)."""
        if cache is not None or seq_idx is not None:
            raise ValueError(
                "this attention is for training on whole rows: it takes no cache and no packed sequences."
            )
        query, key, value = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of x (B, H, L, d / H) by the angle of their position."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TransformerBlock(MoeMambaBlock):
    """A residual layer of MoE-Mamba with attention in the place of Mamba."""

    def __init__(self, config: MoeMambaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if self.mixer is not None:
            self.mixer = CausalAttention(config.hidden_size, config.num_heads or 1)


class TransformerModel(MoeMambaModel):
    """The backbone of the two Transformers."""

    block_class = TransformerBlock


class TransformerForCausalLM(MoeMambaForCausalLM):
    """Transformer and Transformer-MoE as language models."""

    model_class = TransformerModel


def architecture_names(settings: dict[str, Any]) -> list[str]:
    """Everything that is trained: the five architectures, MoE-Mamba once for each number of experts."""
    sweep = [f"moe-mamba-{experts}" for experts in settings["experts"]]
    return ["transformer", "mamba", "mamba-mlp", "transformer-moe", *sweep]


def build_model(name: str, settings: dict[str, Any], vocab_size: int, **token_ids: int) -> MoeMambaForCausalLM:
    """A new model of one of `architecture_names`, of the sizes in `settings`; `token_ids` go to its configuration.

    Raises:
        ValueError: the name is none of them.
    """
    width, blocks = settings["hidden_size"], settings["blocks"]
    experts = settings["transformer_experts"]
    if name.startswith("moe-mamba-"):
        experts = int(name.removeprefix("moe-mamba-"))
    elif name not in ("transformer", "mamba", "mamba-mlp", "transformer-moe"):
        raise ValueError(f"there is no architecture {name!r}; choose from {', '.join(architecture_names(settings))}.")
    attention = name.startswith("transformer")
    feed_forward = "moe" if "moe" in name else "mamba" if name == "mamba" else "mlp"
    inner = (4 if attention else 3) * width
    config = MoeMambaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        layers_block_type=["mamba", feed_forward] * blocks,
        state_size=settings["state_size"],
        num_heads=settings["heads"] if attention else None,
        num_experts=experts,
        moe_intermediate_size=inner,
        mlp_intermediate_size=inner,
        capacity_factor=settings["capacity_factor"],
        router_aux_loss_coef=settings["router_aux_loss_coef"],
        use_cache=False,
        **token_ids,
    )
    return (TransformerForCausalLM if attention else MoeMambaForCausalLM)(config)
