"""MoE-Mamba (Pióro et al., arXiv 2401.04081): the backbone and its heads.

Every layer is residual: a Mamba or Mamba-2 mixer, a layer of routed experts, a dense feed-forward layer, or a mixer and a
feed-forward layer side by side. The same classes hold BlackMamba (Anthony et al., arXiv 2402.01771) and Mamba-MLP.

Symbols: B batch, L length, N tokens = B·L, d model width, E experts, k experts per token, F expert width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers import LayerNorm, RMSNorm, SelectiveScanMixer, SSDMixer
from ...layers.fused_step import fused_step
from ...layers.switch import TopKRouter, load_balancing_loss, router_z_loss
from ...sequences import SequenceLayout
from ..classifiers import RecurrentForSequenceClassification, RecurrentForTokenClassification
from ..heads import RecurrentForCausalLM
from ..outputs import RecurrentCausalLMOutput, RecurrentClassifierOutput, RecurrentModelOutput
from ..pretrained import RecurrentPreTrainedModel
from ..recurrent import RecurrentModel
from .configuration_moe_mamba import MoeMambaConfig
from .experts import MoeMambaMLP, MoeMambaSparseMoe, StackedExperts, truncated_normal_
from .fused import FUSED, fused_block_step

__all__ = [
    "MoeMambaCausalLMOutput",
    "MoeMambaClassifierOutput",
    "MoeMambaForCausalLM",
    "MoeMambaForSequenceClassification",
    "MoeMambaForTokenClassification",
    "MoeMambaModel",
    "MoeMambaModelOutput",
    "MoeMambaPreTrainedModel",
]


@dataclass
class MoeMambaModelOutput(RecurrentModelOutput):
    """`RecurrentModelOutput` and what the routers did.

    Attributes:
        aux_loss: (), the load-balancing loss without its coefficient; in training, or with `output_router_logits`.
        z_loss: (), the router z-loss without its coefficient, if `router_z_loss_coef` is not 0; at the same times.
        router_logits: one (B·L, E) fp32 for each layer with experts, tokens in the order of the input; with
            `output_router_logits`.
    """

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoeMambaCausalLMOutput(RecurrentCausalLMOutput):
    """`RecurrentCausalLMOutput` and the router fields of `MoeMambaModelOutput`."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoeMambaClassifierOutput(RecurrentClassifierOutput):
    """`RecurrentClassifierOutput` and the router fields of `MoeMambaModelOutput`."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class MoeMambaBlock(GradientCheckpointingLayer):
    """One residual layer: `x + mixer(norm(x))`, `x + feed_forward(norm(x))`, or both side by side.

    The sub-modules there are: `norm`; `mixer`; `moe` or `mlp`; and `feed_forward_norm` if the two sides of a parallel
    layer have a norm each.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        kind = config.layers_block_type[layer_idx]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = make_norm(config, config.norm_type)
        self.mixer: nn.Module | None = None
        self.moe: MoeMambaSparseMoe | None = None
        self.mlp: MoeMambaMLP | None = None
        self.feed_forward_norm: nn.Module | None = None
        if kind == "mamba" or kind.startswith("parallel"):
            mixer_class = SSDMixer if config.mixer_type == "mamba2" else SelectiveScanMixer
            self.mixer = mixer_class(config, layer_idx)
        if kind.endswith("moe"):
            counts = config.layers_num_experts
            self.moe = MoeMambaSparseMoe(config, None if counts is None else counts[layer_idx])
        if kind.endswith("mlp"):
            self.mlp = MoeMambaMLP(
                config.hidden_size,
                config.mlp_intermediate_size,
                activation=config.mlp_hidden_act,
                gated=config.mlp_gated,
                bias=config.mlp_bias,
            )
        if kind.startswith("parallel") and config.parallel_norm == "separate":
            self.feed_forward_norm = make_norm(config, config.norm_type)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        seq_idx: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream (B, L, d) after this layer, and the router logits (B, L, E) if it has experts."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        out = hidden_states.to(dtype) if self.residual_in_fp32 else hidden_states
        if cache is not None and self.mixer is not None and self.moe is None and self.mlp is None:
            stepped = fused_step(self.norm, self.mixer, out, cache, seq_idx)
            if stepped is not None:
                return stepped, None
        if cache is not None and self.moe is not None and self.mixer is None:
            routed = fused_block_step(self.norm, self.moe, out)
            if routed is not None:
                return routed
        normed = self.norm(hidden_states)
        if self.mixer is not None:
            out = out + self.mixer(normed, cache=cache, seq_idx=seq_idx)
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(hidden_states)
        router_logits = None
        if self.moe is not None:
            # a token that is dropped or jittered would not be decoded the way it was prefilled
            update, router_logits = self.moe(normed, valid=valid, dropless=cache is not None)
            out = out + update
        if self.mlp is not None:
            out = out + self.mlp(normed)
        return out, router_logits


class BiasedRMSNorm(RMSNorm):
    """`RMSNorm` with a bias, as in the code of the MoE-Mamba paper."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + self.bias


NORM_CLASSES = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "biased_rmsnorm": BiasedRMSNorm}


def make_norm(config, norm_type: str) -> nn.Module:
    """The norm of that type over the model width."""
    return NORM_CLASSES[norm_type](config.hidden_size, eps=config.layer_norm_epsilon)


class MoeMambaPreTrainedModel(RecurrentPreTrainedModel):
    """Configuration class, placement rules and initialisation."""

    config: MoeMambaConfig
    config_class = MoeMambaConfig
    _no_split_modules = ["MoeMambaBlock"]
    # the choice of experts is as sensitive to rounding as the recurrence
    _keep_in_fp32_modules_strict = [*RecurrentPreTrainedModel._keep_in_fp32_modules_strict, "moe.router"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the file of this class, but the experts have a file of their own
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # transformers' default is grouped_mm, which ours is too where its kernels do not run
        if requested_experts is None and super().get_correct_experts_implementation(None) == "grouped_mm":
            return FUSED
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scale = self.config.initializer_scale
        if isinstance(module, nn.Embedding):
            # a tied embedding is also the head, which has a fan-in
            fan_in = self.config.hidden_size if self.config.tie_word_embeddings else 1
            truncated_normal_(module.weight, scale, fan_in=fan_in)
        elif isinstance(module, TopKRouter):
            truncated_normal_(module.weight, scale, fan_in=self.config.hidden_size)
            for bias in (module.bias, module.selection_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, StackedExperts):
            module.init_weights(scale)
        elif isinstance(module, nn.Linear):
            # dense layers and heads; those of the mixers are drawn again below
            truncated_normal_(module.weight, scale, fan_in=module.in_features)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, SelectiveScanMixer | SSDMixer):
            for child in module.children():
                super()._init_weights(child)
            super()._init_weights(module)
        else:
            super()._init_weights(module)

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """Parameters that take part in the computation of one token: of the routed experts, only k out of E.

        Args:
            exclude_embeddings: leave out the embedding and the language model's head, as the paper's counts do.
        """
        inactive = 0
        for module in self.modules():
            if isinstance(module, StackedExperts):
                idle = module.num_experts - self.config.num_experts_per_tok
                inactive += sum(p.numel() // module.num_experts * idle for p in module.parameters())
        skipped = set()
        if exclude_embeddings:
            ends = (self.get_input_embeddings(), getattr(self, "lm_head", None))
            skipped = {id(p) for end in ends if end is not None for p in end.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in skipped) - inactive


class MoeMambaModel(MoeMambaPreTrainedModel, RecurrentModel):
    """The backbone: embedding, layers and, if configured, a final norm.

    `forward` takes the arguments of the other backbones and `output_router_logits`.
    """

    block_class = MoeMambaBlock
    output_class = MoeMambaModelOutput

    def make_final_norm(self, config) -> nn.Module:
        return make_norm(config, config.final_norm_type) if config.final_norm else nn.Identity()

    def take_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = kwargs.pop("output_router_logits", None)
        return {"output_router_logits": self.config.output_router_logits if given is None else given}

    def run_layers(
        self,
        hidden_states: Tensor,
        cache: Cache | None,
        layout: SequenceLayout,
        output_hidden_states: bool,
        finish: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> tuple[Tensor, list[Tensor] | None, dict[str, Any]]:
        collected: list[Tensor] | None = [] if output_hidden_states else None
        output_router_logits = options["output_router_logits"]
        valid = layout.valid
        router_logits = []
        for layer in self.layers:
            if collected is not None:
                collected.append(hidden_states)
            hidden_states, logits = layer(hidden_states, cache=cache, seq_idx=layout.seq_idx, valid=valid)
            if logits is not None and (output_router_logits or self.training):
                router_logits.append(finish(logits).flatten(0, 1))
        if self.config.final_norm:
            hidden_states = self.norm_f(hidden_states)
        else:
            # as a norm would: back from the residual stream's dtype to the model's
            hidden_states = hidden_states.to(cast(Any, self.layers[-1]).norm.weight.dtype)
        if collected is not None:
            collected.append(hidden_states)
        extras = self._router_outputs(tuple(router_logits), None if valid is None else finish(valid).flatten())
        if output_router_logits:
            extras["router_logits"] = tuple(router_logits)
        return hidden_states, collected, extras

    def _router_outputs(self, router_logits: tuple[Tensor, ...], valid: Tensor | None) -> dict[str, Any]:
        """The routers' losses, of the new tokens in input order, if there are logits to compute them from."""
        if not router_logits:
            return {}
        losses = {
            "aux_loss": load_balancing_loss(
                router_logits,
                top_k=self.config.num_experts_per_tok,
                scoring=self.config.router_scoring,
                valid=valid,
                reduction=self.config.router_aux_loss_reduction,
                indices=self._choices(router_logits),
            )
        }
        if self.config.router_z_loss_coef:
            losses["z_loss"] = router_z_loss(router_logits, valid)
        return losses

    @torch.no_grad()
    def _choices(self, router_logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The experts (N, k) that each router chooses by its logits."""
        layers = [cast(MoeMambaBlock, layer).moe for layer in self.layers]
        routers = [moe.router for moe in layers if moe is not None]
        return tuple(router.choose(logits) for router, logits in zip(routers, router_logits, strict=True))


class _WithRouterLosses(MoeMambaPreTrainedModel):
    """What the heads have in common: the routers' losses and logits in loss and output.

    The losses are added in training, so that the experts are balanced without further ado, and whenever
    `output_router_logits` is set; an evaluation loss is otherwise the plain one.
    """

    def total_loss(self, loss: Tensor, outputs: Any, labels: Tensor | None, loss_kwargs: dict[str, Any]) -> Tensor:
        share = self._share(labels, loss_kwargs)
        for name in ("aux_loss", "z_loss"):
            value = outputs.get(name)
            if value is not None:
                loss = loss + share * getattr(self.config, f"router_{name}_coef") * value.to(loss.device)
        return loss

    def _share(self, labels: Any, loss_kwargs: dict[str, Any]) -> Tensor | float:
        """The part of an accumulated batch that these labels are.

        With `num_items_in_batch` the other loss terms are sums divided by the items of all micro-batches together; the
        routers' losses are means, which would otherwise count once for each micro-batch.
        """
        items = loss_kwargs.get("num_items_in_batch")
        if items is None:
            return 1.0
        if loss_kwargs.get("shift_labels") is not None:
            labels = loss_kwargs["shift_labels"]
        elif isinstance(self, RecurrentForCausalLM):
            labels = labels[..., 1:]
        counted = (labels != loss_kwargs.get("ignore_index", -100)).sum()
        return counted / (items.to(counted.device) if isinstance(items, Tensor) else items)

    def extra_outputs(self, outputs: Any) -> dict[str, Any]:
        return {name: outputs.get(name) for name in ("aux_loss", "z_loss", "router_logits")}


class MoeMambaForCausalLM(_WithRouterLosses, RecurrentForCausalLM):
    """MoE-Mamba as a language model."""

    model_class = MoeMambaModel
    output_class = MoeMambaCausalLMOutput


class MoeMambaForSequenceClassification(_WithRouterLosses, RecurrentForSequenceClassification):
    """MoE-Mamba as a classifier of texts, pooled at the last real token of each row."""

    model_class = MoeMambaModel
    output_class = MoeMambaClassifierOutput


class MoeMambaForTokenClassification(_WithRouterLosses, RecurrentForTokenClassification):
    """MoE-Mamba as a classifier of tokens."""

    model_class = MoeMambaModel
    output_class = MoeMambaClassifierOutput
