"""Classifiers on top of a recurrent backbone. Symbols: B batch, L length, d model width, C classes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from ..cache_names import CACHE_NAMES
from ..sequences import padding_mask, resolve_layout
from .heads import WithBackbone
from .inputs import check_labels
from .outputs import RecurrentClassifierOutput

__all__ = ["RecurrentForSequenceClassification", "RecurrentForTokenClassification"]


class _Classifier(WithBackbone):
    """The forward that both classifiers share; they give `classify` and `classification_loss`."""

    output_class = RecurrentClassifierOutput
    _new_head = ("score.",)

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
        """Classify.

        Args:
            labels: as `classification_loss` takes them.
            **kwargs: `num_items_in_batch` and `ignore_index` go to the loss, `position_ids`, `seq_idx` and `cu_seq_lens_q`
                to the backbone; caches and anything unknown are refused.

        All others as in the backbone.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        loss_kwargs = _take_loss_arguments(type(self).__name__, kwargs)
        self.check_packing(kwargs)
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.classify(outputs.last_hidden_state, input_ids, attention_mask, kwargs.get("position_ids"))
        loss = None
        if labels is not None:
            loss, labels = self.classification_loss(logits, labels, loss_kwargs)
            loss = self.total_loss(loss, outputs, labels, loss_kwargs)
        output = self.output_class(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **self.extra_outputs(outputs)
        )
        return output if return_dict else output.to_tuple()

    def check_packing(self, kwargs: dict[str, Any]) -> None:
        """Raise if packing metadata is given that the head cannot honour."""

    def classify(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """Logits from the backbone's output (B, L, d)."""
        raise NotImplementedError

    def classification_loss(
        self, logits: Tensor, labels: Tensor, loss_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the labels in the form it took them."""
        raise NotImplementedError


class RecurrentForSequenceClassification(_Classifier):
    """A classifier that reads the last real token of each row.

    That token is found by `attention_mask`; without one, as the last token that is not `pad_token_id`. `labels` are (B,)
    classes or values, or (B, C) for several labels; see `config.problem_type`. Packed rows are refused.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def check_packing(self, kwargs: dict[str, Any]) -> None:
        for argument in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"):
            if kwargs.get(argument) is not None:
                raise ValueError(
                    f"{type(self).__name__} gives one answer for each row; drop `{argument}` and pad instead of packing."
                )

    def classify(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        _refuse_restarts(type(self).__name__, position_ids, attention_mask, hidden_states)
        last = self._last_tokens(input_ids, attention_mask, hidden_states)
        rows = torch.arange(last.shape[0], device=last.device)
        return self.score(hidden_states[rows, last])

    def classification_loss(
        self, logits: Tensor, labels: Tensor, loss_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        labels = _class_labels(labels, logits, self.config.problem_type)
        loss = self.loss_function(
            logits=logits, labels=labels, pooled_logits=logits, config=self.config, **loss_kwargs
        )
        items = loss_kwargs.get("num_items_in_batch")
        mean_anyway = self.config.problem_type in ("regression", "multi_label_classification")
        if items is not None and mean_anyway and self.loss_function is ForSequenceClassificationLoss:
            # transformers ignores the number of items here, while its Trainer counts on its being honoured
            loss = loss * labels.numel() / items
        return loss, labels

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


class RecurrentForTokenClassification(_Classifier):
    """A classifier of each token, which sees that token and all before it.

    `labels` are (B, L) classes; -100 is ignored.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.model_class(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def classify(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        return self.score(self.dropout(hidden_states))

    def classification_loss(
        self, logits: Tensor, labels: Tensor, loss_kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        labels = check_labels(labels, tuple(logits.shape[:2]))
        return self.loss_function(logits, labels, self.config, **loss_kwargs), labels


def _take_loss_arguments(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take what a classifier's loss reads out of `kwargs`, and refuse what asks for states."""
    for argument in (*CACHE_NAMES, "use_cache"):
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
