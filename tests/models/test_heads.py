"""The heads: which token a classifier reads, the losses against formulas written out, and training with `Trainer`."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from .builders import ALL_MODELS, CLASSES, CONFIGS, make_model, random_ids

TOLERANCE = 1e-5
LENGTHS = (8, 3, 1, 6)


def make_head(kind: str, head: str, **overrides):
    """A model whose loss is that of the labels alone: no router losses."""
    if kind == "moe_mamba":
        overrides |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    return make_model(kind, head=head, **overrides)


def make_classifier(kind: str, **overrides):
    return make_head(kind, "ForSequenceClassification", **{"num_labels": 3, **overrides})


def padded_rows(side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The rows alone, and padded with `pad_token_id` 0 to a batch with its mask."""
    rows = [random_ids(1, length, seed=length) for length in LENGTHS]
    width = max(LENGTHS)
    pads = [(width - n, 0) if side == "left" else (0, width - n) for n in LENGTHS]
    ids = torch.cat([torch.nn.functional.pad(row, pad, value=0) for row, pad in zip(rows, pads, strict=True)])
    return rows, ids, (ids != 0).long()


@torch.no_grad()
def last_token_scores(model, row: torch.Tensor) -> torch.Tensor:
    """What the head says about a row alone, without any pooling code."""
    return model.score(model.backbone(row).last_hidden_state)[0, -1]


@ALL_MODELS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sequence_classifier_reads_the_last_real_token(kind: str, side: str) -> None:
    model = make_classifier(kind, use_bias=True)
    rows, ids, mask = padded_rows(side)
    expected = torch.stack([last_token_scores(model, row) for row in rows])
    logits = model(ids, attention_mask=mask).logits
    assert (logits - expected).abs().max() <= TOLERANCE
    for index in range(len(rows)):
        single = model(ids[[index]], attention_mask=mask[[index]]).logits
        assert (single[0] - expected[index]).abs().max() <= TOLERANCE
    embeds = model.get_input_embeddings()(ids)
    assert (model(inputs_embeds=embeds, attention_mask=mask).logits - expected).abs().max() <= TOLERANCE
    # positions that run on, whatever stands at padding, are not several sequences
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    assert (model(ids, attention_mask=mask, position_ids=positions).logits - expected).abs().max() <= TOLERANCE
    # the mask counts, not the ids: here every padding token is an ordinary word
    words = torch.where(mask.bool(), ids, 7)
    assert (model(words, attention_mask=mask.bool()).logits - expected).abs().max() <= TOLERANCE


@ALL_MODELS
@torch.no_grad()
def test_sequence_classifier_finds_right_padding_by_its_token(kind: str) -> None:
    model = make_classifier(kind)
    rows, ids, _ = padded_rows("right")
    expected = torch.stack([last_token_scores(model, row) for row in rows])
    assert (model(ids).logits - expected).abs().max() <= TOLERANCE
    assert (model(ids[[1]]).logits[0] - expected[1]).abs().max() <= TOLERANCE
    # without a padding token, every token is real
    model.config.pad_token_id = None
    assert (model(ids).logits[1] - last_token_scores(model, ids[[1]])).abs().max() <= TOLERANCE


@ALL_MODELS
def test_sequence_classifier_needs_a_token(kind: str) -> None:
    with pytest.raises(ValueError, match="no token to classify"):
        make_classifier(kind)(torch.zeros(2, 0, dtype=torch.long))


@ALL_MODELS
@torch.no_grad()
def test_token_classifier_scores_every_token(kind: str) -> None:
    model = make_head(kind, "ForTokenClassification", num_labels=4, use_bias=True)
    rows, ids, mask = padded_rows("left")
    logits = model(ids, attention_mask=mask).logits
    assert logits.shape == (4, 8, 4)
    for index, row in enumerate(rows):
        expected = model.score(model.backbone(row).last_hidden_state)[0]
        assert (logits[index][mask[index].bool()] - expected).abs().max() <= TOLERANCE


@ALL_MODELS
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@torch.no_grad()
def test_outputs_of_classifiers(kind: str, head: str) -> None:
    model = make_head(kind, head)
    ids = random_ids(2, 5)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)
    assert not any("past" in name or "cache" in name for name in output)


# losses


@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=["flat", "column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.long], ids=["float", "integer"])
def test_regression_of_one_value(shape: tuple, dtype: torch.dtype) -> None:
    model = make_classifier("mamba", num_labels=1)
    labels = torch.tensor([1.0, -2.0, 0.0, 3.0]).to(dtype)
    output = model(padded_rows("right")[1], labels=labels.view(shape))
    expected = sum((output.logits[i, 0].item() - labels[i].item()) ** 2 for i in range(4)) / 4
    assert abs(output.loss.item() - expected) <= 1e-5 * expected
    output.loss.backward()


def test_regression_of_several_values() -> None:
    model = make_classifier("mamba2", num_labels=2, problem_type="regression")
    labels = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    output = model(padded_rows("right")[1], labels=labels)
    assert torch.allclose(output.loss, (output.logits - labels).pow(2).mean())


@pytest.mark.parametrize("dtype", [torch.long, torch.int32], ids=["int64", "int32"])
def test_single_label_classification(dtype: torch.dtype) -> None:
    model = make_classifier("mamba")
    labels = torch.tensor([2, 0, -100, 1], dtype=dtype)
    output = model(padded_rows("left")[1], labels=labels)
    assert model.config.problem_type == "single_label_classification"
    log_probabilities = output.logits.log_softmax(dim=-1)
    expected = -(log_probabilities[0, 2] + log_probabilities[1, 0] + log_probabilities[3, 1]) / 3
    assert torch.allclose(output.loss, expected)


def test_multi_label_classification() -> None:
    model = make_classifier("mamba")
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    output = model(padded_rows("right")[1], labels=labels)
    assert model.config.problem_type == "multi_label_classification"
    p = output.logits.sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert torch.allclose(output.loss, expected, rtol=1e-5)
    # indicator matrices are often integers; with the problem type said, they are taken
    explicit = model(padded_rows("right")[1], labels=labels.long())
    assert torch.equal(explicit.loss, output.loss)


def test_token_classification() -> None:
    model = make_head("mamba2", "ForTokenClassification", num_labels=4)
    _, ids, mask = padded_rows("left")
    labels = (ids % 4).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    log_probabilities = output.logits.log_softmax(dim=-1)
    terms = [-log_probabilities[i, j, labels[i, j]] for i in range(4) for j in range(8) if mask[i, j]]
    assert len(terms) == sum(LENGTHS)
    assert torch.allclose(output.loss, torch.stack(terms).mean())


def test_language_modelling() -> None:
    model = make_model("mamba2")
    ids = random_ids(2, 9)
    output = model(ids, labels=ids)
    log_probabilities = output.logits.log_softmax(dim=-1)
    terms = [-log_probabilities[i, j, ids[i, j + 1]] for i in range(2) for j in range(8)]
    assert torch.allclose(output.loss, torch.stack(terms).mean())
    # labels shifted outside are taken as they are
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, output.loss)
    assert torch.equal(model(ids, labels=ids, ignore_index=-1).loss, output.loss)
    assert not torch.equal(model(ids, labels=ids.masked_fill(ids > 30, -1), ignore_index=-1).loss, output.loss)


CASES = {
    "language-model": ("ForCausalLM", {}, lambda ids: ids),
    "regression": ("ForSequenceClassification", {"num_labels": 1}, lambda ids: ids[:, 0].float()),
    "single-label": ("ForSequenceClassification", {"num_labels": 3}, lambda ids: ids[:, 0] % 3),
    "multi-label": ("ForSequenceClassification", {"num_labels": 3}, lambda ids: (ids[:, :3] % 2).float()),
    "tokens": ("ForTokenClassification", {"num_labels": 3}, lambda ids: ids % 3),
}


@pytest.mark.parametrize(("head", "options", "make_labels"), CASES.values(), ids=CASES)
def test_num_items_in_batch_makes_micro_batches_one_batch(head: str, options: dict, make_labels) -> None:
    """Trainer accumulates gradients so; a loss that ignored the number would weigh small micro-batches too much."""
    model = make_model("mamba", head=head, **options).double()
    ids = random_ids(5, 7)
    labels = make_labels(ids)
    model(ids, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    # a row's first token is never a target of the language model
    items = labels[:, 1:].numel() if head == "ForCausalLM" else labels.numel()
    for part in (slice(0, 2), slice(2, 5)):
        model(ids[part], labels=labels[part], num_items_in_batch=torch.tensor(items)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


BAD_CLASSIFIER = {
    "labels-batch": (
        {"labels": torch.tensor([0, 1])},
        ValueError,
        r"`labels` must have shape \(4,\) or \(4, 1\).*\(2,\)",
    ),
    "labels-list": ({"labels": [0, 1, 2, 0]}, TypeError, "`labels` must be a tensor, got list"),
    "labels-one-hot": ({"labels": torch.zeros(4, 3, dtype=torch.long)}, ValueError, r"`labels`.*got \(4, 3\)"),
    "labels-several": ({"labels": torch.zeros(4)}, ValueError, r"\(4, 3\) for multi_label_classification.*got \(4,\)"),
    "packed": (
        {"seq_idx": torch.zeros(4, 8, dtype=torch.int32)},
        ValueError,
        "one answer for each row; drop `seq_idx`",
    ),
    "lengths": ({"cu_seq_lens_q": torch.tensor([0, 8])}, ValueError, "one answer for each row; drop `cu_seq_lens_q`"),
    "positions": (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])},
        ValueError,
        "one answer for each row, but `position_ids` start again",
    ),
    "use-cache": ({"use_cache": True}, ValueError, "drop `use_cache`"),
    "shifted": ({"shift_labels": torch.zeros(4, 8)}, TypeError, "does not know: shift_labels"),
}


@pytest.mark.parametrize(("inputs", "error", "message"), BAD_CLASSIFIER.values(), ids=BAD_CLASSIFIER)
def test_bad_input_of_the_sequence_classifier(inputs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_classifier("mamba")(padded_rows("right")[1], **inputs)


def test_single_labels_that_are_not_integers_are_refused() -> None:
    model = make_classifier("mamba", problem_type="single_label_classification")
    with pytest.raises(TypeError, match=r"`labels` must be an int64 or int32 tensor, got torch.float32"):
        model(padded_rows("right")[1], labels=torch.zeros(4))


def test_bad_input_of_the_token_classifier() -> None:
    model = make_head("mamba", "ForTokenClassification")
    ids = random_ids(2, 6)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \(2, 6\).*got \(6, 2\)"):
        model(ids, labels=ids.T % 2)
    with pytest.raises(ValueError, match="neither takes nor returns a cache; drop `cache`"):
        model(ids, cache=make_model("mamba")(ids, use_cache=True).past_key_values)


# training


def train(model, rows: list[dict], folder, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    return trainer


def toy_rows(make_labels) -> list[dict]:
    ids = random_ids(16, 6)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, make_labels(ids), strict=True)]


@ALL_MODELS
def test_trainer_on_the_language_model(kind: str, tmp_path) -> None:
    trainer = train(make_model(kind), toy_rows(lambda ids: ids), tmp_path)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    # nothing but logits: no caches, no router losses
    assert predictions.shape == (16, 6, 61)


@pytest.mark.parametrize("case", [name for name in CASES if name != "language-model"])
def test_trainer_on_classifiers(case: str, tmp_path) -> None:
    head, options, make_labels = CASES[case]
    trainer = train(make_model("mamba2", head=head, **options), toy_rows(make_labels), tmp_path)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    labels = options["num_labels"]
    assert predictions.shape == ((16, 6, labels) if head == "ForTokenClassification" else (16, labels))


@ALL_MODELS
def test_classifiers_save_and_load(kind: str, tmp_path) -> None:
    prefix = CLASSES[CONFIGS[kind]().model_type]
    ids = random_ids(2, 5)
    for head, auto_class in (
        ("ForSequenceClassification", AutoModelForSequenceClassification),
        ("ForTokenClassification", AutoModelForTokenClassification),
    ):
        model = make_model(kind, head=head, num_labels=5)
        model.save_pretrained(tmp_path / head)
        loaded, info = auto_class.from_pretrained(tmp_path / head, output_loading_info=True)
        assert type(loaded).__name__ == prefix + head
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            assert (loaded(ids).logits - model(ids).logits).abs().max() <= 1e-6
