"""Token-choice routing: the router, expert capacity and the router's losses.

Sources: Switch Transformer (Fedus et al., arXiv 2101.03961, §2), ST-MoE (Zoph et al., arXiv 2202.08906, §3), MoE-Mamba
(Pióro et al., arXiv 2401.04081).

Symbols: N tokens, d model width, E experts, k experts per token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

__all__ = [
    "TopKRouter",
    "balance_statistics",
    "load_balancing_loss",
    "router_scores",
    "router_z_loss",
    "within_capacity",
]


def router_scores(router_logits: Tensor, scoring: str) -> Tensor:
    """Scores (N, E) of each expert for each token: "softmax" or "sigmoid" of the logits (N, E)."""
    return router_logits.softmax(dim=-1) if scoring == "softmax" else router_logits.sigmoid()


class TopKRouter(nn.Module):
    """Sends each token to the k experts with the highest scores.

    Everything is computed in fp32, under autocast too: bf16 logits would change the choice of experts.

    Args:
        hidden_size, num_experts, top_k: d, E and k.
        scoring: "softmax" or "sigmoid".
        normalize: divide the k weights of a token by their sum.
        bias: whether the logits have a bias.
        jitter_noise: width of the multiplicative noise on the input (Switch Transformer, §2.2), 0 = none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        scoring: str = "softmax",
        normalize: bool = False,
        bias: bool = False,
        jitter_noise: float = 0.0,
    ):
        super().__init__()
        self.top_k, self.scoring, self.normalize, self.jitter_noise = top_k, scoring, normalize, jitter_noise
        # in fp32 whatever the model's dtype, as from_pretrained keeps them
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if bias else None

    def forward(self, hidden_states: Tensor, noisy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_states: (N, d).
            noisy: apply the jitter.

        Returns:
            Router logits (N, E) fp32, the chosen experts' weights (N, k) fp32 and indices (N, k) int64.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            inputs = hidden_states.to(dtype)
            if noisy and self.jitter_noise > 0:
                inputs = inputs * torch.empty_like(inputs).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            bias = None if self.bias is None else self.bias.to(dtype)
            router_logits = F.linear(inputs, self.weight.to(dtype), bias)
            weights, indices = router_scores(router_logits, self.scoring).topk(self.top_k, dim=-1)
            if self.normalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return router_logits, weights, indices

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"{hidden_size}, num_experts={num_experts}, top_k={self.top_k}, scoring={self.scoring}"


@torch.no_grad()
def within_capacity(indices: Tensor, num_experts: int, capacity_factor: float, valid: Tensor | None = None) -> Tensor:
    """Which of a token's experts still have room for it.

    An expert takes the first `int(capacity_factor * N * k / E)` tokens that chose it, in the order of the tokens. N
    counts real tokens only, and padding takes no room.

    Args:
        indices: (N, k) int64, distinct experts of each token.
        valid: (N,) bool, False at padding; None = all real.

    Returns:
        (N, k) bool; False at padding.
    """
    tokens, top_k = indices.shape
    capacity: Tensor | int
    if valid is None:
        capacity = int(capacity_factor * tokens * top_k / num_experts)
    else:
        # counted on the device: no synchronisation. fp64 (where it exists) gives the same integer as python
        dtype = torch.float32 if valid.device.type == "mps" else torch.float64
        capacity = (capacity_factor * valid.sum(dtype=dtype) * top_k / num_experts).to(torch.int64)
        # a number of its own for padding, so that it queues for no expert
        indices = indices.masked_fill(~valid[:, None], num_experts)
    queue, order = indices.flatten().sort(stable=True)
    place = torch.arange(queue.numel(), device=queue.device) - torch.searchsorted(queue, queue)
    kept = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, place < capacity).view(tokens, top_k)
    return kept if valid is None else kept & valid[:, None]


def balance_statistics(
    router_logits: Tensor, top_k: int, scoring: str, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How one layer spreads the tokens, before any are dropped for capacity.

    Args:
        router_logits: (N, E).
        valid: (N,) bool, False at padding; None = all real.

    Returns:
        f (E,), the fraction of tokens that chose each expert (it adds up to k; no gradient), and P (E,), the mean
        probability of each expert. Sigmoid scores are divided by their sum over the experts first.
    """
    scores = router_scores(router_logits, scoring)
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=-1).indices, 1.0)
    probabilities = scores if scoring == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
    return _token_mean(chosen, valid), _token_mean(probabilities, valid)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...],
    top_k: int,
    scoring: str = "softmax",
    valid: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """The loss `E * sum_i f_i * P_i` that is least when the experts are used evenly (Switch Transformer, equation 4).

    Args:
        router_logits: one (N, E) for each layer.
        valid: (N,) bool, False at padding, which counts nowhere; None = all real.
        reduction: "sum" adds up the layers' losses (MoE-Mamba); "pooled" is the loss of f and P averaged over the
            layers (Mixtral), in which an uneven layer can make up for another.

    Returns:
        () fp32, without its coefficient.
    """
    statistics = [balance_statistics(logits, top_k, scoring, valid) for logits in router_logits]
    fractions, probabilities = (torch.stack(values) for values in zip(*statistics, strict=True))
    num_experts = fractions.shape[-1]
    if reduction == "pooled":
        return num_experts * (fractions.mean(dim=0) * probabilities.mean(dim=0)).sum()
    return num_experts * (fractions * probabilities).sum()


def router_z_loss(router_logits: tuple[Tensor, ...], valid: Tensor | None = None) -> Tensor:
    """Sum over layers of the mean of `logsumexp(logits)²`, which keeps the logits small (ST-MoE, equation 5).

    Args:
        router_logits: one (N, E) for each layer.
        valid: (N,) bool, False at padding; None = all real.
    """
    total = router_logits[0].new_zeros(())
    for logits in router_logits:
        total = total + _token_mean(logits.logsumexp(dim=-1).square(), valid)
    return total


def _token_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the real tokens of `values` (N, …); 0 if there are none."""
    if valid is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    real = valid.to(values.dtype)
    return torch.tensordot(real, values, dims=1) / real.sum().clamp(min=1)
