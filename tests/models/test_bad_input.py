"""Bad input is refused with an error that names the argument, what was given and what to do; nothing is dropped in silence."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_mamba
from hf_mamba import RecurrentCache

from .builders import ALL_MODELS, CLASSES, CONFIGS, VOCAB, make_model, random_ids

IDS = random_ids(2, 9)
ONE = IDS[:1]


def lengths(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


FORWARD = {
    # tokens
    "ids-floating": ({"input_ids": IDS.float()}, TypeError, "`input_ids` must be an int64 or int32.*float32"),
    "ids-bool": ({"input_ids": IDS > 3}, TypeError, "`input_ids` must be .*bool"),
    "ids-list": ({"input_ids": IDS.tolist()}, TypeError, "`input_ids` must be .*list"),
    "ids-rank-1": ({"input_ids": IDS[0]}, ValueError, r"`input_ids` must have shape \(B, L\), got \(9,\)"),
    "ids-rank-3": ({"input_ids": IDS[None]}, ValueError, r"`input_ids` must have shape \(B, L\), got \(1, 2, 9\)"),
    "ids-too-large": ({"input_ids": IDS + VOCAB}, ValueError, "`input_ids` must lie between 0 and 61 - 1.*tokenizer"),
    "ids-negative": ({"input_ids": -IDS}, ValueError, "`input_ids` must lie between 0 and 61 - 1"),
    "ids-device": (
        {"input_ids": IDS.to("meta")},
        ValueError,
        r"`input_ids` is on meta .*input_ids.to\(model.device\)",
    ),
    "neither": ({}, ValueError, "exactly one of `input_ids` and `inputs_embeds`"),
    "both": (
        {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 32)},
        ValueError,
        "exactly one of `input_ids` and `inputs_embeds`",
    ),
    "embeds-integer": ({"inputs_embeds": torch.ones(2, 9, 32, dtype=torch.long)}, TypeError, "`inputs_embeds`.*int64"),
    "embeds-list": ({"inputs_embeds": [1.0]}, TypeError, "`inputs_embeds` must be .*list"),
    "embeds-width": (
        {"inputs_embeds": torch.zeros(2, 9, 31)},
        ValueError,
        r"`inputs_embeds` must have shape \(B, L, 32\), got \(2, 9, 31\)",
    ),
    "embeds-rank": ({"inputs_embeds": torch.zeros(9, 32)}, ValueError, r"`inputs_embeds` .*got \(9, 32\)"),
    # masks
    "mask-short": ({"input_ids": IDS, "attention_mask": torch.ones(2, 8)}, ValueError, r"\(2, 9\), got \(2, 8\)"),
    "mask-long": ({"input_ids": IDS, "attention_mask": torch.ones(2, 10)}, ValueError, r"\(2, 9\), got \(2, 10\)"),
    "mask-batch": ({"input_ids": IDS, "attention_mask": torch.ones(1, 9)}, ValueError, r"`attention_mask`.*\(1, 9\)"),
    "mask-rank-1": ({"input_ids": IDS, "attention_mask": torch.ones(9)}, ValueError, r"`attention_mask`.*\(9,\)"),
    "mask-rank-4": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)},
        ValueError,
        r"`attention_mask`.*\(2, 1, 9, 9\).*2-D padding mask",
    ),
    "mask-list": ({"input_ids": IDS, "attention_mask": [[1] * 9] * 2}, TypeError, "`attention_mask` must be .*list"),
    "mask-device": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 9, device="meta")},
        ValueError,
        r"`attention_mask` is on meta but the inputs are on cpu; move it with attention_mask.to\('cpu'\)",
    ),
    # packing
    "lengths-negative": (
        {"input_ids": ONE, "cu_seq_lens_q": lengths(0, -1, 9)},
        ValueError,
        r"cu_seq_lens_q.*\[0, -1, 9\]",
    ),
    "lengths-decreasing": (
        {"input_ids": ONE, "cu_seq_lens_q": lengths(0, 5, 3, 9)},
        ValueError,
        r"cu_seq_lens_q.*without decreasing, got \[0, 5, 3, 9\]",
    ),
    "lengths-short": (
        {"input_ids": ONE, "cu_seq_lens_q": lengths(0, 5)},
        ValueError,
        "cu_seq_lens_q.*to the length 9",
    ),
    "lengths-begin": ({"input_ids": ONE, "cu_seq_lens_q": lengths(1, 9)}, ValueError, "cu_seq_lens_q.*from 0"),
    "lengths-floating": (
        {"input_ids": ONE, "cu_seq_lens_q": lengths(0, 9, dtype=torch.float32)},
        TypeError,
        "cu_seq_lens_q.*int32, int64, got float32",
    ),
    "lengths-list": ({"input_ids": ONE, "cu_seq_lens_q": [0, 9]}, TypeError, r"`cu_seq_lens_q`.*list.*torch.tensor"),
    "lengths-rank": ({"input_ids": ONE, "cu_seq_lens_q": lengths(0, 9)[None]}, ValueError, r"cu_seq_lens_q.*\(1, 2\)"),
    "lengths-batch": ({"input_ids": IDS, "cu_seq_lens_q": lengths(0, 9)}, ValueError, "cu_seq_lens_q.*batch of 2"),
    "lengths-differ": (
        {"input_ids": ONE, "cu_seq_lens_q": lengths(0, 4, 9), "cu_seq_lens_k": lengths(0, 5, 9)},
        ValueError,
        "`cu_seq_lens_q` and `cu_seq_lens_k` must be equal",
    ),
    "lengths-of-keys-only": (
        {"input_ids": ONE, "cu_seq_lens_k": lengths(0, 4)},
        ValueError,
        "cu_seq_lens_q.*length 9",
    ),
    "borders-differ": (
        {"input_ids": ONE, "cu_seq_lens_q": lengths(0, 4, 9), "seq_idx": torch.tensor([[0] * 5 + [1] * 4])},
        ValueError,
        "`seq_idx` and `cu_seq_lens_q` put the borders.*different tokens; give only one",
    ),
    "seq-idx-length": ({"input_ids": IDS, "seq_idx": IDS[:, :8]}, ValueError, r"`seq_idx`.*\(2, 9\), got \(2, 8\)"),
    "seq-idx-batch": ({"input_ids": IDS, "seq_idx": IDS[:1]}, ValueError, r"`seq_idx`.*\(2, 9\), got \(1, 9\)"),
    "seq-idx-floating": ({"input_ids": IDS, "seq_idx": IDS.float()}, TypeError, "`seq_idx`.*float32"),
    "seq-idx-list": ({"input_ids": IDS, "seq_idx": [[0] * 9] * 2}, TypeError, "`seq_idx` must be a tensor, got list"),
    "positions-length": ({"input_ids": IDS, "position_ids": IDS[:, :8]}, ValueError, r"`position_ids`.*got \(2, 8\)"),
    "positions-batch": (
        {"input_ids": IDS, "position_ids": torch.zeros(3, 9, dtype=torch.long)},
        ValueError,
        r"`position_ids` must have shape \(2, 9\), \(1, 9\) or \(9,\), got \(3, 9\)",
    ),
    "positions-floating": ({"input_ids": IDS, "position_ids": IDS.float()}, TypeError, "`position_ids`.*float32"),
    "positions-list": ({"input_ids": IDS, "position_ids": [0] * 9}, TypeError, "`position_ids` must be a tensor"),
    # caches
    "cache-tuple": (
        {"input_ids": IDS, "cache": ((1, 2),)},
        TypeError,
        "`cache`.*Cache, got tuple",
    ),
    "cache-empty": (
        {"input_ids": IDS, "cache": DynamicCache()},
        ValueError,
        r"The cache holds 0 layers.*RecurrentCache\(model.config\)",
    ),
    # arguments nobody reads
    "unknown": ({"input_ids": IDS, "attn_mask": torch.ones(2, 9)}, TypeError, "does not know: attn_mask"),
    "unknown-too": ({"input_ids": IDS, "head_mask": 1, "token_type_ids": IDS}, TypeError, "head_mask, token_type_ids"),
}
LANGUAGE_MODEL = {
    "labels-length": (
        {"labels": IDS[:, :5]},
        ValueError,
        r"`labels` must have the shape \(2, 9\) of the logits, got \(2, 5\)",
    ),
    "labels-transposed": ({"labels": IDS.T}, ValueError, r"`labels`.*\(2, 9\) of the logits, got \(9, 2\)"),
    "labels-rank": ({"labels": IDS.flatten()}, ValueError, r"`labels`.*got \(18,\)"),
    "labels-floating": ({"labels": IDS.float()}, TypeError, "`labels` must be an int64 or int32.*float32"),
    "labels-list": ({"labels": IDS.tolist()}, TypeError, "`labels` must be .*list"),
    "labels-of-kept": ({"labels": IDS, "logits_to_keep": 4}, ValueError, r"\(2, 4\).*leave `logits_to_keep` at 0"),
    "shifted-length": ({"shift_labels": IDS[:, :5]}, ValueError, r"`shift_labels` must have the shape \(2, 9\)"),
    "keep-negative": ({"logits_to_keep": -1}, ValueError, "`logits_to_keep` must be an integer from 0.*got -1"),
    "keep-floating": ({"logits_to_keep": 1.5}, ValueError, r"`logits_to_keep` must be an integer.*got 1\.5"),
    "keep-rank": ({"logits_to_keep": IDS}, ValueError, r"`logits_to_keep` .* 1-D tensor.*\(2, 9\)"),
}


# the others share Mamba's `forward`
@pytest.fixture(scope="module", params=["mamba", "moe_mamba"])
def model(request):
    return make_model(request.param, num_hidden_layers=2)


@pytest.mark.parametrize(("inputs", "error", "message"), FORWARD.values(), ids=FORWARD)
def test_forward(model, inputs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        model(**inputs)
    with pytest.raises(error, match=message):
        model.backbone(**inputs)


@pytest.mark.parametrize(("inputs", "error", "message"), LANGUAGE_MODEL.values(), ids=LANGUAGE_MODEL)
def test_language_model(model, inputs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        model(IDS, **inputs)


@ALL_MODELS
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 6}, "6 layers, but the model has 2"),
        ({"num_hidden_layers": 2, "state_size": 7}, "states of shapes .* a row"),
        ({"num_hidden_layers": 2, "conv_kernel": 7}, "states of shapes .* a row"),
    ],
    ids=["layers", "state", "convolution"],
)
@torch.no_grad()
def test_cache_of_another_model(kind: str, other: dict, message: str) -> None:
    model, stranger = make_model(kind, num_hidden_layers=2), make_model(kind, **other)
    cache = RecurrentCache(stranger.config)
    stranger(IDS, cache=cache)
    with pytest.raises(ValueError, match=rf"The cache holds .*{message}.*RecurrentCache\(model.config\)"):
        model(IDS, cache=cache)


@torch.no_grad()
def test_cache_of_another_kind() -> None:
    cache = RecurrentCache(make_model("mamba2").config)
    make_model("mamba2")(IDS, cache=cache)
    with pytest.raises(ValueError, match="The cache holds states of shapes"):
        make_model("mamba")(IDS, cache=cache)


@ALL_MODELS
def test_cache_arguments_that_contradict_each_other(kind: str) -> None:
    model = make_model(kind)
    caches = [RecurrentCache(model.config) for _ in range(2)]
    with pytest.raises(ValueError, match="names for one cache, but several"):
        model(IDS, cache=caches[0], cache_params=caches[1])
    # one cache under both names is no contradiction
    model(IDS, cache=caches[0], cache_params=caches[0])
    with pytest.raises(ValueError, match="use_cache=False; drop one of the two"):
        model(IDS, cache=caches[0], use_cache=False)
    with pytest.raises(ValueError, match="batch of 2, but the inputs have a batch of 1"):
        model(ONE, cache=caches[0])
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*pass no cache, or call model.eval\(\)"):
        model(IDS, cache=caches[0])


@ALL_MODELS
def test_mask_over_a_cache_has_one_of_two_lengths(kind: str) -> None:
    model = make_model(kind)
    cache = RecurrentCache(model.config)
    model(IDS, cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 3\) or \(2, 12\) with the 9 cached tokens, got \(2, 9\)"):
        model(IDS[:, :3], attention_mask=torch.ones(2, 9), cache=cache)
    assert cache.get_seq_length() == 9


@ALL_MODELS
def test_none_and_false_ask_for_nothing(kind: str) -> None:
    model = make_model(kind)
    with torch.no_grad():
        plain = model(IDS).logits
        logits = model(IDS, attention_mask=None, output_attentions=False, labels=None, head_mask=None).logits
    assert torch.equal(logits, plain)


def test_generate_refuses_unknown_arguments() -> None:
    with pytest.raises(ValueError, match=r"not used by the model.*atention_mask"):
        make_model("mamba").generate(IDS, atention_mask=torch.ones_like(IDS), max_new_tokens=2)


# configurations


SIZES = ["vocab_size", "hidden_size", "state_size", "num_hidden_layers", "expand", "conv_kernel"]
NOT_SIZES = [0, -1, 2.5, "2", None, True, 10**18]
COMMON = [(name, value) for name in SIZES for value in NOT_SIZES] + [
    ("hidden_act", "bogus"),
    ("hidden_act", None),
    ("time_step_rank", 0),
    ("time_step_rank", "bogus"),
    ("time_step_min", 0.0),
    ("time_step_min", 0.5),
    ("time_step_min", float("nan")),
    ("time_step_max", float("inf")),
    ("time_step_max", "0.1"),
    ("time_step_floor", -1.0),
    ("time_step_floor", float("nan")),
    ("layer_norm_epsilon", 0.0),
    ("layer_norm_epsilon", float("nan")),
    ("layer_norm_epsilon", "small"),
    ("use_bias", "yes"),
    ("residual_in_fp32", "no"),
]
# MoE-Mamba fills these in by itself
DERIVED = {"moe_mamba": [("state_size", None), ("num_hidden_layers", None)]}
OWN = {
    "mamba": [
        ("time_step_init_scheme", "bogus"),
        ("time_step_scale", -1.0),
        ("time_step_scale", float("nan")),
        ("initializer_range", -0.1),
        ("initializer_range", float("nan")),
        ("intermediate_size", 0),
    ],
    "falcon_mamba": [
        ("time_step_init_scheme", "bogus"),
        ("mixer_rms_eps", 0.0),
        ("mixer_rms_eps", float("nan")),
        ("intermediate_size", -5),
    ],
    "mamba2": [
        ("num_heads", 0),
        ("num_heads", 3),
        ("head_dim", 5),
        ("head_dim", -8),
        ("n_groups", 0),
        ("n_groups", 3),
        ("chunk_size", 0),
        ("chunk_size", 1.5),
        ("time_step_limit", (1.0, 0.0)),
        ("time_step_limit", (-1.0, 1.0)),
        ("time_step_limit", (0.0,)),
        ("time_step_limit", (0.0, float("nan"))),
        ("time_step_limit", "all"),
    ],
    "moe_mamba": [("num_experts", 0), ("num_experts_per_tok", 5), ("router_scoring", "bogus"), ("norm_type", "bogus")],
}
KINDS = ["mamba", "mamba2", "falcon_mamba", "moe_mamba"]
CASES = [
    pytest.param(kind, name, value, id=f"{kind}-{name}-{value}")
    for kind in KINDS
    for name, value in COMMON + OWN[kind]
    if (name, value) not in DERIVED.get(kind, [])
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_configuration(kind: str, name: str, value: object) -> None:
    """Refused when it is built, with the field's name and what it was."""
    with pytest.raises((ValueError, TypeError)) as caught:
        CONFIGS[kind](**{name: value})
    message = str(caught.value)
    assert name in message and (str(value) in message or repr(value) in message or type(value).__name__ in message)
    assert type(CONFIGS[kind]()).__name__ in message


def test_head_dim_that_does_not_divide_says_what_would() -> None:
    with pytest.raises(ValueError, match=r"hidden_size \* expand must equal num_heads \* head_dim.*`num_heads` to 8"):
        CONFIGS["mamba2"](num_heads=7)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_config_file(kind: str, tmp_path) -> None:
    """What arrives in a config.json is checked as well."""
    config = CONFIGS[kind]()
    config.state_size = -4
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    with pytest.raises(ValueError, match=r"`state_size`.*-4"):
        AutoConfig.from_pretrained(tmp_path)


# checkpoints


def save_without(model, folder, *names: str) -> None:
    state = {name: value for name, value in model.state_dict().items() if name not in names}
    model.save_pretrained(folder, state_dict=state)


@ALL_MODELS
def test_checkpoint_with_missing_tensors(kind: str, tmp_path) -> None:
    """transformers draws them at random and warns."""
    model = make_model(kind, tie_word_embeddings=False)
    names = ["backbone.layers.0.mixer.D", "backbone.layers.0.norm.weight", "lm_head.weight"]
    save_without(model, tmp_path, *names)
    for load in (AutoModelForCausalLM.from_pretrained, type(model).from_pretrained):
        with pytest.raises(ValueError) as caught:
            load(tmp_path)
        for part in (*names, "lacks 3 tensors", type(model).__name__, "allow_missing=True", str(tmp_path)):
            assert part in str(caught.value)
    # whoever wants it can have it
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, allow_missing=True, output_loading_info=True)
    assert set(info["missing_keys"]) == set(names)
    assert torch.equal(loaded.backbone.layers[0].mixer.D, torch.ones_like(model.backbone.layers[0].mixer.D))
    assert torch.equal(loaded.backbone.embeddings.weight, model.backbone.embeddings.weight)
    # a classifier has a new head, but no new backbone
    prefix = CLASSES[model.config.model_type]
    with pytest.raises(ValueError, match=r"lacks 2 tensors of \w+: backbone.layers.0.mixer.D, backbone.layers.0.norm"):
        getattr(hf_mamba, prefix + "ForSequenceClassification").from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 2 tensors of \w+: layers.0.mixer.D, layers.0.norm"):
        getattr(hf_mamba, prefix + "Model").from_pretrained(tmp_path)


@ALL_MODELS
def test_new_heads_and_tied_heads_may_be_missing(kind: str, tmp_path) -> None:
    model = make_model(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    prefix = CLASSES[model.config.model_type]
    for suffix in ("ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification"):
        loaded, info = getattr(hf_mamba, prefix + suffix).from_pretrained(tmp_path, output_loading_info=True)
        assert all(key.startswith("score.") for key in info["missing_keys"])
        assert torch.equal(loaded.get_input_embeddings().weight, model.backbone.embeddings.weight)
        assert not loaded.training
    # the other way round there is nothing to make a language model's head from, unless it is tied
    make_model(kind, head="Model", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    getattr(hf_mamba, prefix + "ForCausalLM").from_pretrained(tmp_path / "tied")
    make_model(kind, head="Model", tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*lm_head.weight"):
        getattr(hf_mamba, prefix + "ForCausalLM").from_pretrained(tmp_path / "untied")


def test_checkpoint_of_other_sizes(tmp_path) -> None:
    """transformers refuses these itself, unless told not to."""
    make_model("mamba").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=VOCAB + 2)


def test_checkpoint_of_another_architecture(tmp_path) -> None:
    model = make_model("mamba")
    model.save_pretrained(tmp_path)
    config = CONFIGS["mamba2"]()
    # not even with this do the tensors pass that it does not have at all
    with pytest.raises(
        ValueError, match=r"lacks 5 tensors of Mamba2ForCausalLM.*0.mixer.dt_bias.*0.mixer.norm.weight"
    ):
        hf_mamba.Mamba2ForCausalLM.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
