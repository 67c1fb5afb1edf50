"""The language-model head, and what all heads share. Symbols: B batch, L length, d model width, V vocabulary."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss

from ..generation.graphs import runs_graphs
from ..generation.mixin import RecurrentGenerationMixin
from ..layers.loss import chunked_cross_entropy
from ..layers.projection import project
from ..sequences import SequenceLayout, padding_mask, resolve_layout
from .inputs import check_labels, same_lengths, select_cache
from .outputs import RecurrentCausalLMOutput
from .pretrained import RecurrentPreTrainedModel
from .recurrent import RecurrentModel
from .sharding import HEAD_FSDP_PLAN
from .training_graph import graphed_output

__all__ = ["RecurrentForCausalLM", "WithBackbone"]


class WithBackbone(RecurrentPreTrainedModel):
    """A model with a backbone below a head."""

    model_class: type[RecurrentModel]
    output_class: type

    def total_loss(self, loss: Tensor, outputs: Any, labels: Tensor | None, loss_kwargs: dict[str, Any]) -> Tensor:
        """The loss of the labels and whatever else the backbone's `outputs` ask for; MoE-Mamba adds its router's losses."""
        return loss

    def extra_outputs(self, outputs: Any) -> dict[str, Any]:
        """Fields of the backbone's `outputs` that only this model has."""
        return {}

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)


class RecurrentForCausalLM(RecurrentGenerationMixin, WithBackbone):
    """A language model: backbone and a linear head, tied to the embedding if `tie_word_embeddings`.

    Attributes:
        skip_logits: in training with labels, compute the loss a part of the tokens at a time and return no logits. Off by
            default; set it on a model that goes to a Trainer.
        graph_training: in training with labels on a GPU, replay forward, loss and backward as one CUDA graph, without logits. A
            batch that it cannot be captured for (padded, packed, with other arguments, of a shape that comes once) takes the usual
            way. Off by default: the graph keeps the memory of a step and of the gradients.
    """

    skip_logits = False
    graph_training = False
    _fsdp_plan = HEAD_FSDP_PLAN
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}
    output_class: type = RecurrentCausalLMOutput

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.backbone = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=getattr(config, "lm_head_bias", False))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        graph_training: bool | None = None,
        **kwargs: Any,
    ) -> tuple | RecurrentCausalLMOutput:
        """Predict the next token at each position.

        Args:
            labels: (B, L) integer, shifted inside; -100 is ignored. A token that follows padding or another packed
                sequence is never a target, since there is nothing to predict it from.
            logits_to_keep: number of last positions to compute logits for, 0 = all; or a 1-D tensor of positions.
            skip_logits: compute the loss without the logits of all tokens ever existing, and return none; needs labels. By
                default what `self.skip_logits` says, in training with labels.
            graph_training: take the loss from a CUDA graph if there is one; by default what `self.graph_training` says.
            **kwargs: `num_items_in_batch`, `ignore_index` and `shift_labels` (B, L), which replaces `labels` and is taken
                as it is, go to the loss; anything unknown is refused.

        All others as in the backbone. Logits are fp32.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        loss_kwargs = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if key in kwargs}
        graph_training = self.graph_training if graph_training is None else graph_training
        if graph_training:
            rest = (
                inputs_embeds,
                cache,
                past_key_values,
                cache_params,
                position_ids,
                seq_idx,
                cu_seq_lens_q,
                cu_seq_lens_k,
            )
            asked = (use_cache, output_hidden_states or self.config.output_hidden_states, logits_to_keep, kwargs)
            given = any(value is not None for value in rest) or any(not isinstance(v, Tensor) and v for v in asked)
            if not given and skip_logits is not False and not isinstance(logits_to_keep, Tensor):
                found = self._graphed_output(input_ids, attention_mask, labels, **loss_kwargs)
                if found is not None:
                    output = self.output_class(**found)
                    return output if return_dict else output.to_tuple()
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=select_cache(cache, past_key_values, cache_params),
            use_cache=use_cache,
            position_ids=position_ids,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        shift_labels = loss_kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if skip_logits is None:
            # the same from every batch, whether a graph has it or not
            skip_logits = (self.skip_logits or graph_training) and self.training and has_labels
        if skip_logits and not has_labels:
            raise ValueError("`skip_logits` leaves the loss alone to return, which needs `labels`.")
        hidden_states = _keep_positions(outputs.last_hidden_state, logits_to_keep)
        logits = None if skip_logits else project(self.lm_head, hidden_states).float()
        loss = None
        if has_labels:
            shape, advice = tuple(hidden_states.shape[:2]), "; with labels leave `logits_to_keep` at 0"
            targets = None
            if shift_labels is not None:
                loss_kwargs["shift_labels"] = check_labels(shift_labels, shape, advice, name="shift_labels")
            if labels is not None:
                labels = check_labels(labels, shape, advice)
                cu_seqlens = same_lengths(cu_seq_lens_q, cu_seq_lens_k)
                targets = _without_first_tokens(labels, attention_mask, position_ids, seq_idx, cu_seqlens)
            if logits is None:
                loss = self._loss_without_logits(hidden_states, targets, **loss_kwargs)
            else:
                loss = self.loss_function(
                    logits=logits, labels=targets, vocab_size=self.config.vocab_size, **loss_kwargs
                )
            loss = self.total_loss(loss, outputs, labels, loss_kwargs)
        output = self.make_output(outputs, loss, logits)
        return output if return_dict else output.to_tuple()

    def _graphed_output(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> dict[str, Any] | None:
        """Fields of the output from a graph of the training step, or None if there is none for this batch."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling() or others:
            return None
        if input_ids is None or labels is None or not runs_graphs(input_ids.device) or input_ids.shape != labels.shape:
            return None
        if input_ids.dim() != 2 or labels.device != input_ids.device or self.loss_function is not ForCausalLMLoss:
            return None
        # looked at here, since a graph cannot
        if attention_mask is not None and not bool(attention_mask.all()):
            return None
        return graphed_output(self, input_ids, labels, num_items_in_batch)

    def _loss_without_logits(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """What `ForCausalLMLoss` of transformers computes from logits, from the backbone's output (B, L, d)."""
        if self.loss_function is not ForCausalLMLoss:
            raise ValueError(
                "`skip_logits` computes the cross-entropy of the next token, but the model has another `loss_function`; "
                "leave it at False."
            )
        if shift_labels is None:
            shift_labels = F.pad(cast(Tensor, labels)[:, 1:], (0, 1), value=ignore_index)
        return chunked_cross_entropy(
            self.lm_head,
            hidden_states,
            shift_labels,
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            vocab_size=self.config.vocab_size,
        )

    def make_output(self, outputs: Any, loss: Tensor | None, logits: Tensor | None) -> Any:
        """Assemble the output."""
        return self.output_class(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            cache=outputs.cache,
            **self.extra_outputs(outputs),
        )


# what the loss functions of transformers read
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


def _keep_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.is_floating_point():
            raise ValueError(
                "`logits_to_keep` must be a number or a 1-D tensor of positions, got a tensor of shape "
                f"{tuple(logits_to_keep.shape)} and dtype {logits_to_keep.dtype}."
            )
        return hidden_states[:, logits_to_keep]
    if isinstance(logits_to_keep, float) or logits_to_keep < 0:
        raise ValueError(f"`logits_to_keep` must be an integer from 0 (all positions) up, got {logits_to_keep!r}.")
    return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states


def _without_first_tokens(
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Labels with the first token of every sequence ignored: padding or another sequence cannot predict it."""
    batch, length = labels.shape
    layout: SequenceLayout = resolve_layout(
        batch,
        length,
        padding=padding_mask(attention_mask, batch, length, None),
        position_ids=position_ids,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    starts = layout.starts
    return labels if starts is None else labels.masked_fill(starts, -100)
