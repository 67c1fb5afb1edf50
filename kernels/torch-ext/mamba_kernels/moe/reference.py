"""The oracles of routed experts: plain loops over tokens and their choices, in fp64."""

import math

import torch
from torch import Tensor

__all__ = ["activation_ref", "experts_step_ref", "route_ref", "routed_experts_ref"]


def activation_ref(x: Tensor, activation: str) -> Tensor:
    """relu, silu or gelu (with erf) of x."""
    if activation == "relu":
        return x.clamp(min=0)
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def route_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, scoring: str, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`route` in fp64."""
    x, weight = x.double(), weight.double()
    all_logits, all_weights, all_indices = [], [], []
    for token in x:
        logits = (weight * token).sum(1)
        if bias is not None:
            logits = logits + bias.double()
        exponentials = (logits - logits.detach().max()).exp()
        scores = exponentials / exponentials.sum() if scoring == "softmax" else 1 / (1 + (-logits).exp())
        ranked = sorted(range(len(scores)), key=lambda expert: (-scores[expert].item(), expert))[:top_k]
        chosen = scores[ranked]
        all_logits.append(logits)
        all_weights.append(scale * (chosen / chosen.sum() if normalize else chosen))
        all_indices.append(torch.tensor(ranked, device=x.device))
    return torch.stack(all_logits), torch.stack(all_weights), torch.stack(all_indices)


def routed_experts_ref(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """`routed_experts` in fp64."""
    up, down = up.double(), down.double()
    outputs = []
    for token, chosen, token_weights in zip(x.double(), indices.tolist(), weights.double(), strict=True):
        out = torch.zeros_like(token)
        for expert, weight in zip(chosen, token_weights, strict=True):
            if not 0 <= expert < up.shape[0]:
                continue
            inner = (up[expert] * token).sum(1)
            if up_bias is not None:
                inner = inner + up_bias[expert].double()
            if gated:
                half = inner.shape[0] // 2
                inner = activation_ref(inner[:half], activation) * inner[half:]
            else:
                inner = activation_ref(inner, activation)
            result = (down[expert] * inner).sum(1)
            if down_bias is not None:
                result = result + down_bias[expert].double()
            out = out + weight * result
        outputs.append(out)
    return torch.stack(outputs) if outputs else x.double()


def experts_step_ref(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    indices: Tensor | None = None,
    weights: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    router_logits: Tensor | None = None,
    top_k: int = 1,
    scoring: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`experts_step` in fp64."""
    x = x.double()
    if indices is None or weights is None:
        assert router_logits is not None
        identity = torch.eye(router_logits.shape[1], dtype=torch.float64, device=x.device)
        _, weights, indices = route_ref(router_logits, identity, None, top_k, scoring, normalize, scale)
    if norm_weight is not None:
        x = x * (x.square().mean(1, keepdim=True) + eps).rsqrt() * norm_weight.double()
    y = routed_experts_ref(x, indices, weights, up, down, up_bias, down_bias, activation, gated)
    return y if residual is None else y + residual.double(), indices, weights
