"""Heads on top of a recurrent backbone. Symbols: B batch, L length, d model width, V vocabulary, C classes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from ..generation.mixin import RecurrentGenerationMixin
from ..sequences import SequenceLayout, padding_mask, resolve_layout
from .inputs import check_labels, same_lengths
from .outputs import RecurrentCausalLMOutput, RecurrentClassifierOutput, cache_fields
from .recurrent import RecurrentModel, RecurrentPreTrainedModel

__all__ = ["RecurrentForCausalLM", "RecurrentForSequenceClassification", "RecurrentForTokenClassification"]


class _WithBackbone(RecurrentPreTrainedModel):
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


class RecurrentForCausalLM(RecurrentGenerationMixin, _WithBackbone):
    """A language model: backbone and a linear head, tied to the embedding if `tie_word_embeddings`."""

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
        **kwargs: Any,
    ) -> tuple | RecurrentCausalLMOutput:
        """Predict the next token at each position.

        Args:
            labels: (B, L) integer, shifted inside; -100 is ignored. A token that follows padding or another packed
                sequence is never a target, since there is nothing to predict it from.
            logits_to_keep: number of last positions to compute logits for, 0 = all; or a 1-D tensor of positions.
            **kwargs: `num_items_in_batch`, `ignore_index` and `shift_labels` (B, L), which replaces `labels` and is taken
                as it is, go to the loss; anything unknown is refused.

        All others as in the backbone. Logits are fp32.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        loss_kwargs = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if key in kwargs}
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            cache_params=cache_params,
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
        hidden_states = _keep_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states).float()
        loss = None
        targets = None
        shift_labels = loss_kwargs.pop("shift_labels", None)
        if labels is not None or shift_labels is not None:
            shape, advice = tuple(logits.shape[:2]), "; with labels leave `logits_to_keep` at 0"
            if shift_labels is not None:
                loss_kwargs["shift_labels"] = check_labels(shift_labels, shape, advice, name="shift_labels")
            if labels is not None:
                labels = check_labels(labels, shape, advice)
                cu_seqlens = same_lengths(cu_seq_lens_q, cu_seq_lens_k)
                targets = _without_first_tokens(labels, attention_mask, position_ids, seq_idx, cu_seqlens)
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=self.config.vocab_size, **loss_kwargs)
            loss = self.total_loss(loss, outputs, labels, loss_kwargs)
        output = self.make_output(outputs, loss, logits)
        if return_dict:
            return output
        return tuple(value for name, value in output.items() if name != "past_key_values")

    def make_output(self, outputs: Any, loss: Tensor | None, logits: Tensor) -> Any:
        """Assemble the output."""
        return self.output_class(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **cache_fields(outputs.cache_params),
            **self.extra_outputs(outputs),
        )


class RecurrentForSequenceClassification(_WithBackbone):
    """A classifier that reads the last real token of each row."""

    output_class = RecurrentClassifierOutput
    _new_head = ("score.",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | RecurrentClassifierOutput:
        """Classify each row.

        The last real token is found by `attention_mask`; without one, as the last token that is not `pad_token_id`.

        Args:
            labels: (B,) classes or values, or (B, C) for several labels; see `config.problem_type`.
            **kwargs: `num_items_in_batch` and `ignore_index` go to the loss, `position_ids` to the backbone; packed rows,
                caches and anything unknown are refused.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        name = type(self).__name__
        loss_kwargs = _take_loss_arguments(name, kwargs)
        for argument in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(argument) is not None:
                raise ValueError(
                    f"{name} gives one answer for each row; drop `{argument}` and pad instead of packing."
                )
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        _refuse_restarts(name, kwargs.get("position_ids"), attention_mask, outputs.last_hidden_state)
        last = self._last_tokens(input_ids, attention_mask, outputs.last_hidden_state)
        rows = torch.arange(last.shape[0], device=last.device)
        logits = self.score(outputs.last_hidden_state[rows, last])
        loss = None
        if labels is not None:
            labels = _class_labels(labels, logits, self.config.problem_type)
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config, **loss_kwargs
            )
            items = loss_kwargs.get("num_items_in_batch")
            mean_anyway = self.config.problem_type in ("regression", "multi_label_classification")
            if items is not None and mean_anyway and self.loss_function is ForSequenceClassificationLoss:
                # transformers ignores the number of items here, while its Trainer counts on its being honoured
                loss = loss * labels.numel() / items
            loss = self.total_loss(loss, outputs, labels, loss_kwargs)
        output = self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **self.extra_outputs(outputs)
        )
        return output if return_dict else output.to_tuple()

    def _last_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        batch, length, _ = hidden_states.shape
        if length == 0:
            raise ValueError("There is no token to classify: the inputs have length 0.")
        if attention_mask is not None:
            real = attention_mask != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        else:
            return torch.full((batch,), length - 1, device=hidden_states.device)
        return (torch.arange(length, device=real.device) * real).argmax(dim=1).to(hidden_states.device)


class RecurrentForTokenClassification(_WithBackbone):
    """A classifier of each token, which sees that token and all before it."""

    output_class = RecurrentClassifierOutput
    _new_head = ("score.",)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.model_class(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | RecurrentClassifierOutput:
        """Classify each token.

        Args:
            labels: (B, L) classes; -100 is ignored.
            **kwargs: `num_items_in_batch` and `ignore_index` go to the loss, `position_ids`, `seq_idx` and `cu_seq_lens_q`
                to the backbone; caches and anything unknown are refused.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        loss_kwargs = _take_loss_arguments(type(self).__name__, kwargs)
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            labels = check_labels(labels, tuple(logits.shape[:2]))
            loss = self.loss_function(logits, labels, self.config, **loss_kwargs)
            loss = self.total_loss(loss, outputs, labels, loss_kwargs)
        output = self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **self.extra_outputs(outputs)
        )
        return output if return_dict else output.to_tuple()


# what the loss functions of transformers read
LOSS_ARGUMENTS = ("num_items_in_batch", "ignore_index", "shift_labels")


def _take_loss_arguments(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what a classifier's loss reads out of `kwargs`, and refuse what asks for states."""
    for argument in ("past_key_values", "cache_params", "use_cache"):
        value = kwargs.pop(argument, None)
        if value is not None and value is not False:
            raise ValueError(f"{name} reads a text at once and neither takes nor returns a cache; drop `{argument}`.")
    return {key: kwargs.pop(key) for key in ("num_items_in_batch", "ignore_index") if key in kwargs}


def _refuse_restarts(
    name: str, position_ids: Tensor | None, attention_mask: Tensor | None, hidden_states: Tensor
) -> None:
    """Raise if positions say that a row holds several sequences; not under torch.compile, where no value may be read."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    batch, length = hidden_states.shape[:2]
    padding = padding_mask(attention_mask, batch, length, None)
    seq_idx = resolve_layout(batch, length, padding=padding, position_ids=position_ids).seq_idx
    if seq_idx is not None and bool((seq_idx > 0).any()):
        raise ValueError(
            f"{name} gives one answer for each row, but `position_ids` start again within a row; pad instead of packing."
        )


def _class_labels(labels: Any, logits: Tensor, problem_type: str | None) -> Tensor:
    """Labels of rows as the loss of `problem_type` takes them, which is guessed as transformers guesses it.

    Raises:
        TypeError, ValueError: classes that are not integers, or a shape that does not fit `logits` (B, C).
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"`labels` must be a tensor, got {type(labels).__name__}; wrap it in torch.tensor(...).")
    batch, classes = logits.shape
    if problem_type is None:
        several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        problem_type = "regression" if classes == 1 else several
    one_each = problem_type == "single_label_classification" or classes == 1
    shapes = ((batch,), (batch, 1)) if one_each else ((batch, classes),)
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"`labels` must have shape {' or '.join(map(str, shapes))} for {problem_type} with {classes} labels, got "
            f"{tuple(labels.shape)}; see `config.problem_type` and `config.num_labels`."
        )
    if problem_type == "single_label_classification":
        return check_labels(labels, tuple(labels.shape))
    # the means over (B, 1) and (B,) would broadcast to (B, B)
    return labels.to(logits.dtype).view_as(logits)


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
