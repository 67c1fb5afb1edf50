"""Same weights, same results as transformers' own classes: logits, gradients, generation, files."""

import pytest
import torch
import transformers

from .builders import NATIVE, NATIVE_MODELS, make_model, make_native, random_ids

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# before 5.23 the gated norm of transformers' Mamba2 ignores the groups, so there is nothing to agree with
native_groups_are_right = VERSION >= (5, 23)


def with_oracle(kind: str) -> None:
    if kind == "mamba2-groups" and not native_groups_are_right:
        pytest.skip(f"transformers {transformers.__version__} normalises Mamba-2 with n_groups > 1 wrongly")


@NATIVE_MODELS
@pytest.mark.parametrize("length", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_logits_equal_native(kind: str, length: int, bias: bool) -> None:
    with_oracle(kind)
    model = make_model(kind, use_bias=bias)
    native = make_native(model)
    ids = random_ids(2, length)
    with torch.no_grad():
        difference = (model(ids).logits - native(ids).logits).abs().max().item()
    assert difference <= 1e-5


@NATIVE_MODELS
def test_loss_and_gradients_equal_native(kind: str) -> None:
    with_oracle(kind)
    model = make_model(kind, num_hidden_layers=3)
    native = make_native(model).train()
    model.train()
    ids = random_ids(2, 40)
    losses = [m(ids, labels=ids).loss for m in (model, native)]
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    for loss in losses:
        loss.backward()
    expected = dict(native.named_parameters())
    for name, parameter in model.named_parameters():
        scale = expected[name].grad.abs().max()
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-4 * scale, name


@NATIVE_MODELS
def test_greedy_generation_equals_native(kind: str) -> None:
    with_oracle(kind)
    # with a tied head these tiny models repeat one token for ever, which proves little
    model = make_model(kind, seed=2, num_hidden_layers=3, tie_word_embeddings=False)
    native = make_native(model)
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    generated = model.generate(ids, **options)
    assert torch.equal(generated, native.generate(ids, **options))
    assert all(row.unique().numel() > 5 for row in generated[:, 9:])


@NATIVE_MODELS
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_checkpoints_load_both_ways(kind: str, tied: bool, tmp_path) -> None:
    with_oracle(kind)
    model = make_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "ours")
    config_class, native_class = NATIVE[model.config.model_type]
    native, info = native_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    native.eval().save_pretrained(tmp_path / "native")
    again, info = type(model).from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    ids = random_ids(1, 12)
    with torch.no_grad():
        assert torch.allclose(native(ids).logits, again.eval()(ids).logits, atol=1e-5)
    # the configuration files differ in nothing that either side reads
    ours = config_class.from_pretrained(tmp_path / "ours").to_dict()
    theirs = config_class.from_pretrained(tmp_path / "native").to_dict()
    assert ours == theirs
