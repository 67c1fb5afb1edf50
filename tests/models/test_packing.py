"""Several sequences in one row: nothing of one reaches another, in outputs, gradients, losses and states.

Native Mamba, Falcon-Mamba and Mamba-2 language models drop the packing metadata without a word (native defect 7).
"""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, make_model, random_ids

LENGTHS = (7, 1, 23, 2, 12)
TOLERANCE = 1e-5
FORMS = ["position_ids", "seq_idx", "cu_seq_lens_q", "collator"]


def make_packing_model(kind: str, **overrides):
    """A model whose loss is a plain sum over targets: the routers' losses are means over the batch."""
    if kind == "moe_mamba":
        overrides |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    return make_model(kind, **overrides)


def sequences() -> list[torch.Tensor]:
    return [random_ids(1, length, seed=length) for length in LENGTHS]


def packed_inputs(form: str) -> dict:
    """The sequences in one row; every form alone says where they begin, the collator says it three times over."""
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": ids[0]} for ids in sequences()])
    batch.pop("labels")
    if form == "collator":
        assert {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"} < set(batch)
        return batch
    return {"input_ids": batch["input_ids"], form: batch[form]}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert (actual[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@ALL_MODELS
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_defect_07_packed_logits_equal_the_sequences_alone(kind: str, form: str, mode: str) -> None:
    model = make_packing_model(kind, use_bias=True).train(mode == "train")
    with torch.no_grad():
        expected = torch.cat([model(ids).logits for ids in sequences()], dim=1)
        actual = model(**packed_inputs(form)).logits
        contaminated = model(packed_inputs(form)["input_ids"]).logits
    assert (actual - expected).abs().max() <= TOLERANCE
    # the sequences do depend on what stands before them
    assert (contaminated - expected).abs().max() > 0.1


@ALL_MODELS
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_defect_07_packed_loss_and_gradients_equal_the_sequences_alone(kind: str, form: str, mode: str) -> None:
    """`labels=input_ids`, as users give it: no sequence's first token is a target."""
    # in fp32, sums over a row of another length differ in the last digits
    model = make_packing_model(kind, use_bias=True).double().train(mode == "train")
    if kind == "moe_mamba":
        # torch's grouped matmul has no fp64
        model.set_experts_implementation("eager")
    targets = sum(LENGTHS) - len(LENGTHS)
    expected_loss = torch.zeros(())
    for ids in sequences():
        if ids.shape[1] > 1:
            loss = model(ids, labels=ids, num_items_in_batch=targets).loss
            expected_loss += loss.detach()
            loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    batch = packed_inputs(form)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert abs(loss.item() - expected_loss.item()) <= 1e-6 * expected_loss.item()
    assert_same_gradients(gradients(model), expected)


@ALL_MODELS
def test_defect_07_collator_output_with_labels_is_fed_as_is(kind: str) -> None:
    model = make_packing_model(kind).train()
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    masked = [{"input_ids": ids[0], "labels": ids[0].where(ids[0] % 3 > 0, -100)} for ids in sequences()]
    count = sum(int((row["labels"][1:] != -100).sum()) for row in masked)
    loss = model(**collator(masked)).loss
    expected = sum(
        model(row["input_ids"][None], labels=row["labels"][None], num_items_in_batch=count).loss
        for row in masked
        if len(row["labels"]) > 1
    )
    assert torch.allclose(loss, expected, atol=1e-6)


@ALL_MODELS
def test_defect_07_no_gradient_crosses_a_border(kind: str) -> None:
    """The input of one sequence gets no gradient at all from the outputs of the others."""
    model = make_packing_model(kind)
    batch = packed_inputs("seq_idx")
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **batch).logits
    start, stop = LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3])
    logits[:, start:stop].square().sum().backward()
    assert embeds.grad[:, start:stop].abs().amax(dim=-1).min() > 0
    assert embeds.grad[:, :start].abs().max() == 0 and embeds.grad[:, stop:].abs().max() == 0


@ALL_MODELS
@pytest.mark.parametrize("form", ["seq_idx", "position_ids"])
def test_rows_packed_differently(kind: str, form: str) -> None:
    """A batch whose rows have different borders and different padding; padding is -1 or masked."""
    model = make_packing_model(kind, use_bias=True)
    layout = [[5, 9, 2], [1, 4], [16]]
    ids = random_ids(3, 16)
    mask = torch.zeros(3, 16, dtype=torch.long)
    numbers = torch.full((3, 16), -1)
    positions = torch.zeros(3, 16, dtype=torch.long)
    # padding: none; on both sides and between the sequences; none
    starts = [[0, 5, 14], [2, 8], [0]]
    spans = []
    for row, (lengths, begins) in enumerate(zip(layout, starts, strict=True)):
        for number, (length, start) in enumerate(zip(lengths, begins, strict=True)):
            spans.append((row, start, start + length))
            mask[row, start : start + length] = 1
            numbers[row, start : start + length] = number
            positions[row, start : start + length] = torch.arange(length)
    packing = {"seq_idx": numbers} if form == "seq_idx" else {"position_ids": positions, "attention_mask": mask}
    with torch.no_grad():
        logits = model(ids, **packing).logits
        for row, start, stop in spans:
            expected = model(ids[row : row + 1, start:stop]).logits[0]
            assert (logits[row, start:stop] - expected).abs().max() <= TOLERANCE
    labels = ids.masked_fill(mask == 0, -100)
    targets = sum(stop - start - 1 for _, start, stop in spans)
    loss = model(ids, labels=labels, **packing).loss
    expected = sum(
        model(ids[row : row + 1, start:stop], labels=ids[row : row + 1, start:stop], num_items_in_batch=targets).loss
        for row, start, stop in spans
        if stop - start > 1
    )
    assert torch.allclose(loss, expected, atol=1e-6)


@ALL_MODELS
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_states_after_packing_are_those_of_the_last_sequence(kind: str, form: str) -> None:
    model = make_packing_model(kind)
    cache = RecurrentCache(model.config)
    model(**packed_inputs(form), cache=cache)
    last, tail = sequences()[-1], random_ids(1, 4, seed=3)
    expected = model(torch.cat([last, tail], dim=1)).logits[:, -4:]
    assert (model(tail, cache=cache).logits - expected).abs().max() <= TOLERANCE


@ALL_MODELS
@torch.no_grad()
def test_packing_over_a_cache_continues_the_first_sequence(kind: str) -> None:
    """The first numbered sequence of a piece continues what the states hold; the next ones begin anew."""
    model = make_packing_model(kind)
    first, second = random_ids(1, 9), random_ids(1, 5, seed=2)
    cache = RecurrentCache(model.config)
    model(first[:, :6], cache=cache)
    piece = torch.cat([first[:, 6:], second], dim=1)
    logits = model(piece, seq_idx=torch.tensor([[0] * 3 + [1] * 5]), cache=cache).logits
    expected = torch.cat([model(first).logits[:, 6:], model(second).logits], dim=1)
    assert (logits - expected).abs().max() <= TOLERANCE


@ALL_MODELS
@torch.no_grad()
def test_hidden_states_and_the_bare_model_are_packed_too(kind: str) -> None:
    model = make_packing_model(kind).backbone
    batch = packed_inputs("collator")
    packed = model(**batch, output_hidden_states=True)
    alone = [model(ids, output_hidden_states=True) for ids in sequences()]
    for index, hidden_states in enumerate(packed.hidden_states):
        expected = torch.cat([output.hidden_states[index] for output in alone], dim=1)
        assert (hidden_states - expected).abs().max() <= TOLERANCE


@ALL_MODELS
@torch.no_grad()
def test_token_classifier_is_packed_too(kind: str) -> None:
    model = make_model(kind, head="ForTokenClassification", num_labels=3)
    expected = torch.cat([model(ids).logits for ids in sequences()], dim=1)
    assert (model(**packed_inputs("collator")).logits - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_trivial_packing_changes_nothing() -> None:
    """One sequence a row, in any form, is the plain forward."""
    model = make_model("mamba")
    ids = random_ids(2, 11)
    expected = model(ids).logits
    for packing in (
        {"position_ids": torch.arange(11)[None]},
        {"position_ids": torch.arange(11)},
        {"position_ids": torch.arange(5, 16).expand(2, -1)},
        {"seq_idx": torch.full((2, 11), 3)},
    ):
        assert torch.equal(model(ids, **packing).logits, expected)
    # sequences of length 0 take no room
    cu_seqlens = torch.tensor([0, 0, 11, 11], dtype=torch.int32)
    assert torch.equal(model(ids[:1], cu_seq_lens_q=cu_seqlens).logits, model(ids[:1]).logits)


@torch.no_grad()
def test_positions_need_not_begin_at_zero() -> None:
    """`DataCollatorWithFlattening(position_ids_start=…)` and the like: only the breaks matter."""
    model = make_model("mamba2")
    batch = packed_inputs("position_ids")
    expected = model(**batch).logits
    assert torch.equal(model(batch["input_ids"], position_ids=batch["position_ids"] + 2).logits, expected)
