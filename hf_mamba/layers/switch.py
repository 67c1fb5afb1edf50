"""Token-choice routing: the router, expert capacity and the router's losses.

Sources: Switch Transformer (Fedus et al., arXiv 2101.03961, §2), ST-MoE (Zoph et al., arXiv 2202.08906, §3), MoE-Mamba
(Pióro et al., arXiv 2401.04081).

Symbols: N tokens, d model width, E experts, k experts per token.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

__all__ = [
    "Routing",
    "TopKRouter",
    "balance_statistics",
    "load_balancing_loss",
    "router_probabilities",
    "router_scores",
    "router_z_loss",
    "within_capacity",
]


def router_scores(router_logits: Tensor, scoring: str) -> Tensor:
    """Scores (N, E) of each expert for each token: "softmax" or "sigmoid" of the logits (N, E)."""
    return router_logits.softmax(dim=-1) if scoring == "softmax" else router_logits.sigmoid()


def router_probabilities(scores: Tensor, scoring: str) -> Tensor:
    """The scores (N, E) as probabilities: those of a sigmoid divided by their sum over the experts."""
    return scores if scoring == "softmax" else scores / scores.sum(dim=-1, keepdim=True)


class Routing(NamedTuple):
    """What a layer did with its N tokens, padding included; without gradients.

    Attributes:
        router_logits: (N, E) fp32.
        weights: (N, k) fp32, 0 where the token was dropped.
        indices: (N, k) int64, the chosen experts.
        kept: (N, k) bool, False where an expert had no room for the token; None = nothing was dropped.
        valid: (N,) bool, False at padding; None = all real.
        training: whether this was a step of training, with jitter and capacity, rather than evaluation or decoding.
    """

    router_logits: Tensor
    weights: Tensor
    indices: Tensor
    kept: Tensor | None
    valid: Tensor | None
    training: bool


class TopKRouter(nn.Module):
    """Sends each token to the k experts with the highest scores.

    Everything is computed in fp32, under autocast too: bf16 logits would change the choice of experts.

    Args:
        hidden_size, num_experts, top_k: d, E and k.
        scoring: "softmax" or "sigmoid".
        normalize: divide the k weights of a token by their sum.
        bias: whether the logits have a bias.
        jitter_noise: width of the multiplicative noise on the input (Switch Transformer, §2.2), 0 = none.
        scaling_factor: the weights are multiplied by it, after they are normalised.
        selection_bias: keep a bias (E,) that is added to the scores when experts are chosen, and has no part in the weights
            (DeepSeek-V3, arXiv 2412.19437, §2.1.2). It is a buffer: nothing here trains it.
        num_groups, topk_groups: the experts form that many groups of neighbours; only those of the best `topk_groups` can
            be chosen. A group is as good as its best expert, or, with a selection bias, as its two best together.
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
        scaling_factor: float = 1.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.top_k, self.scoring, self.normalize, self.jitter_noise = top_k, scoring, normalize, jitter_noise
        self.scaling_factor, self.num_groups, self.topk_groups = scaling_factor, num_groups, topk_groups
        # in fp32 whatever the model's dtype, as from_pretrained keeps them
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if bias else None
        self.selection_bias: Tensor | None
        self.register_buffer(
            "selection_bias", torch.zeros(num_experts, dtype=torch.float32) if selection_bias else None
        )

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
            scores = router_scores(router_logits, self.scoring)
            if self._chooses_by_score():
                weights, indices = scores.topk(self.top_k, dim=-1)
            else:
                indices = self._choose(scores)
                weights = scores.gather(-1, indices)
            if self.normalize:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            if self.scaling_factor != 1.0:
                weights = weights * self.scaling_factor
        return router_logits, weights, indices

    def choose(self, router_logits: Tensor) -> Tensor:
        """The experts (N, k) int64 of tokens with these logits (N, E)."""
        return self._choose(router_scores(router_logits, self.scoring))

    def _chooses_by_score(self) -> bool:
        return self.selection_bias is None and self.num_groups == 1

    def _choose(self, scores: Tensor) -> Tensor:
        if self._chooses_by_score():
            return scores.topk(self.top_k, dim=-1).indices
        ranking = scores.detach()
        if self.selection_bias is not None:
            ranking = ranking + self.selection_bias.to(device=scores.device, dtype=scores.dtype)
        if self.num_groups > 1:
            groups = ranking.unflatten(-1, (self.num_groups, -1))
            best = groups.amax(dim=-1) if self.selection_bias is None else groups.topk(2, dim=-1).values.sum(dim=-1)
            excluded = torch.ones_like(best, dtype=torch.bool)
            excluded.scatter_(-1, best.topk(self.topk_groups, dim=-1).indices, False)
            ranking = groups.masked_fill(excluded[..., None], -torch.inf).flatten(-2)
        return ranking.topk(self.top_k, dim=-1).indices

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
    router_logits: Tensor,
    top_k: int,
    scoring: str,
    valid: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How one layer spreads the tokens, before any are dropped for capacity.

    Args:
        router_logits: (N, E).
        valid: (N,) bool, False at padding; None = all real.
        indices: (N, k), the experts that were chosen; None = those with the highest scores.

    Returns:
        f (E,), the fraction of tokens that chose each expert (it adds up to k; no gradient), and P (E,), the mean
        probability of each expert. Sigmoid scores are divided by their sum over the experts first.
    """
    scores = router_scores(router_logits, scoring)
    indices = scores.topk(top_k, dim=-1).indices if indices is None else indices
    chosen = torch.zeros_like(scores).scatter_(1, indices, 1.0)
    return _token_mean(chosen, valid), _token_mean(router_probabilities(scores, scoring), valid)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...],
    top_k: int,
    scoring: str = "softmax",
    valid: Tensor | None = None,
    reduction: str = "sum",
    indices: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """The loss `E * sum_i f_i * P_i` that is least when the experts are used evenly (Switch Transformer, equation 4).

    Args:
        router_logits: one (N, E) for each layer; with reduction "sum" the layers may differ in E.
        valid: (N,) bool, False at padding, which counts nowhere; None = all real.
        reduction: "sum" adds up the layers' losses (MoE-Mamba); "pooled" is the loss of f and P averaged over the
            layers (Mixtral), in which an uneven layer can make up for another.
        indices: for each layer the experts (N, k) that were chosen; None = those with the highest scores.

    Returns:
        () fp32, without its coefficient.
    """
    choices = (None,) * len(router_logits) if indices is None else indices
    statistics = [
        balance_statistics(logits, top_k, scoring, valid, chosen)
        for logits, chosen in zip(router_logits, choices, strict=True)
    ]
    if reduction == "pooled":
        fractions, probabilities = (torch.stack(values).mean(dim=0) for values in zip(*statistics, strict=True))
        return fractions.shape[-1] * (fractions * probabilities).sum()
    return torch.stack([f.shape[-1] * (f * p).sum() for f, p in statistics]).sum()


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
