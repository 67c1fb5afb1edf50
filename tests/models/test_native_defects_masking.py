"""What transformers' native classes get wrong about padding, right here.

A padded batch gives each row what the row alone gives: logits, gradients and losses, with biases everywhere, on either side, in
training as in evaluation, in any kind of mask. The numbers are those of the list of native defects.
"""

import pytest
import torch

from .builders import ALL_MODELS, make_model, random_ids

TOLERANCE = 1e-5
LENGTHS = (13, 4, 1, 9)
SIDES = pytest.mark.parametrize("side", ["left", "right", "both"])
MODES = pytest.mark.parametrize("mode", ["train", "eval"])


def make_padding_model(kind: str, **overrides):
    """Biases in every projection; a loss without the routers' means over the batch."""
    if kind == "moe_mamba":
        overrides |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "lm_head_bias": True, "moe_bias": True}
    return make_model(kind, use_bias=True, **overrides)


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Token ids (4, 15), mask, and where the real tokens of each row are. The padding is of ordinary tokens."""
    width = 15
    ids, mask, spans = random_ids(len(LENGTHS), width, seed=50), torch.zeros(len(LENGTHS), width, dtype=torch.long), []
    for row, length in enumerate(LENGTHS):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        spans.append(slice(start, start + length))
        mask[row, spans[-1]] = 1
    return ids, mask, spans


@ALL_MODELS
@SIDES
@MODES
@torch.no_grad()
def test_defect_04_biases_with_padding(kind: str, side: str, mode: str) -> None:
    """With `use_bias=True` the native input projection's bias leaks through the convolution at padded positions."""
    model = make_padding_model(kind).train(mode == "train")
    ids, mask, spans = padded_batch(side)
    logits = model(ids, attention_mask=mask).logits
    for row, span in enumerate(spans):
        alone = model(ids[[row], span]).logits
        assert (logits[row, span] - alone[0]).abs().max() <= TOLERANCE
        # one padded row is a batch of its own
        single = model(ids[[row]], attention_mask=mask[[row]]).logits
        assert (single[0, span] - alone[0]).abs().max() <= TOLERANCE


@ALL_MODELS
@SIDES
@torch.no_grad()
def test_defect_04_what_stands_at_padding_does_not_matter(kind: str, side: str) -> None:
    model = make_padding_model(kind)
    ids, mask, spans = padded_batch(side)
    other = torch.where(mask.bool(), ids, random_ids(*ids.shape, seed=51))
    first, second = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
    for row, span in enumerate(spans):
        # not to the bit: grouped matmuls of experts see other groups
        assert (first[row, span] - second[row, span]).abs().max() <= TOLERANCE


@ALL_MODELS
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.bfloat16])
@torch.no_grad()
def test_masks_of_every_type(kind: str, dtype: torch.dtype) -> None:
    model = make_padding_model(kind)
    ids, mask, _ = padded_batch("left")
    expected = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, expected)


@ALL_MODELS
@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(kind: str) -> None:
    model = make_padding_model(kind)
    ids = random_ids(2, 9)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@ALL_MODELS
@torch.no_grad()
def test_padding_columns_everywhere(kind: str) -> None:
    """A row of nothing but padding disturbs neither the others nor the states."""
    model = make_padding_model(kind)
    ids = random_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[1] = 0
    output = model(ids, attention_mask=mask, use_cache=True)
    assert output.logits.isfinite().all()
    assert (output.logits[::2] - model(ids[::2]).logits).abs().max() <= TOLERANCE
    follow = random_ids(3, 3, seed=9)
    logits = model(follow, cache=output.past_key_values).logits
    assert (logits[1] - model(follow[[1]]).logits[0]).abs().max() <= TOLERANCE


@ALL_MODELS
@SIDES
@MODES
def test_defect_18_padded_training_equals_the_rows_alone(kind: str, side: str, mode: str) -> None:
    """Native fused training skips the mask after the convolution: its logits, and so its gradients, differ from evaluation.

    A row's first real token is never a target, whether it stands at position 0 or after padding.
    """
    model = make_padding_model(kind).double().train(mode == "train")
    if kind == "moe_mamba":
        # torch's grouped matmul has no fp64
        model.set_experts_implementation("eager")
    ids, mask, spans = padded_batch(side)
    targets = sum(LENGTHS) - len(LENGTHS)
    total = 0.0
    for row, span in enumerate(spans):
        alone = ids[[row], span]
        if alone.shape[1] > 1:
            loss = model(alone, labels=alone, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.item()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert abs(loss.item() - total) <= 1e-6 * total
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


@ALL_MODELS
def test_defect_18_training_equals_evaluation(kind: str) -> None:
    model = make_padding_model(kind)
    ids, mask, _ = padded_batch("left")
    in_training = model.train()(ids, attention_mask=mask).logits
    assert torch.equal(in_training, model.eval()(ids, attention_mask=mask).logits)


@ALL_MODELS
def test_no_gradient_at_padding(kind: str) -> None:
    """Real tokens' outputs send no gradient into padding."""
    model = make_padding_model(kind)
    ids, mask, _ = padded_batch("both")
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    logits[mask.bool()].square().sum().backward()
    at_tokens = embeds.grad.abs().amax(dim=-1)
    assert at_tokens[mask.bool()].min() > 0 and at_tokens[~mask.bool()].max() == 0


@ALL_MODELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_padding_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    model = make_padding_model(kind).to(dtype)
    ids, mask, spans = padded_batch("left")
    logits = model(ids, attention_mask=mask).logits
    for row, span in enumerate(spans):
        expected = model(ids[[row], span]).logits[0]
        # a few units in the last place of the largest logit
        assert (logits[row, span] - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
