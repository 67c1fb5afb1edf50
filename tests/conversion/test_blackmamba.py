"""BlackMamba: the golden checkpoint, every layer code, both spellings of the keys, biases, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_mamba import MoeMambaForCausalLM
from hf_mamba_conversion.errors import ConversionError
from hf_mamba_conversion.formats.blackmamba import BlackMambaFormat
from hf_mamba_conversion.source import CheckpointSource

from .moe_checkpoints import Tensors, assert_equal_logits, make_plan

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORM = BlackMambaFormat()
H, F, V, N, W = 24, 40, 50, 8, 4

PUBLISHED = {
    "state_size": 16,
    "conv_dimension": 4,
    "vocab_size": 50304,
    "expansion_factor": 2,
    "bias": False,
    "add_bias_linear": False,
    "swiglu": True,
    "max_sequence_length": 2048,
}


def make_config(codes: list[str], layers: int | None = None, bias: bool = False, swiglu: bool = True) -> dict:
    """The keys of the published configurations."""
    return {
        "num_layers": len(codes) if layers is None else layers,
        "hidden_size": H,
        "state_size": N,
        "conv_dimension": W,
        "vocab_size": V,
        "expansion_factor": 2,
        "mamba_moe_layers": codes,
        "ffn_hidden_size": F,
        "bias": False,
        "add_bias_linear": bias,
        "swiglu": swiglu,
        "max_sequence_length": 64,
    }


def make_tensors(config: dict) -> Tensors:
    """Names and shapes as the release has them (checkpoint_formats.md §6)."""
    tensors = Tensors()
    bias, rows = config["add_bias_linear"], 2 * F if config["swiglu"] else F

    def mlp(prefix: str) -> None:
        tensors.add(prefix + "linear_fc1.weight", rows, H)
        tensors.add(prefix + "linear_fc2.weight", H, F)
        if bias:
            tensors.add(prefix + "linear_fc1.bias", rows)
            tensors.add(prefix + "linear_fc2.bias", H)

    def feed_forward(prefix: str, count: int) -> None:
        if count == 1:
            mlp(prefix)
            return
        tensors.add(prefix + "router.weight", count, H, std=1.0)
        tensors.add(prefix + "router.bias", count, std=1.0)
        for expert in range(count):
            mlp(f"{prefix}local_experts.{expert}.")

    tensors.add("embedding.word_embeddings.weight", V, H, std=0.1)
    for index in range(config["num_layers"]):
        code = config["mamba_moe_layers"][index] if config["mamba_moe_layers"] else "r"
        prefix = f"decoder.layers.{index}."
        tensors.norm(prefix + "norm.", H, ("weight",))
        if code[0] == "r":
            tensors.mamba1(prefix + "mixer.", H, 2 * H, N, 2, W, bias=bias)
        else:
            feed_forward(prefix + "mixer.", int(code))
        if len(code) == 2:
            tensors.norm(prefix + "norm_moe.", H, ("weight",))
            feed_forward(prefix + "moe.", int(code[1]))
    tensors.norm("decoder.final_layernorm.", H)
    if bias:
        tensors.add("output_layer.bias", V)
    return tensors


def write(folder: Path, config: dict, tensors: dict | None = None, wrapped: bool = True) -> Path:
    tensors = dict(make_tensors(config) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": tensors} if wrapped else tensors, folder / "pytorch_model.bin")
    return folder


def flat(tensors: Tensors) -> dict:
    """The keys that the repository's own save_pretrained writes."""
    state = tensors.plain()
    embedding = state.pop("embedding.word_embeddings.weight")
    return {"embedding.weight": embedding, **state, "output_layer.weight": embedding.clone()}


def test_golden_checkpoint(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "blackmamba_published_style.config.json", tmp_path / "config.json")
    shutil.copy(FIXTURES / "blackmamba_published_style.pytorch_model.bin", tmp_path / "pytorch_model.bin")
    golden = torch.load(FIXTURES / "blackmamba_published_style.golden.pt", weights_only=True)
    plan, _ = assert_equal_logits(FORM, tmp_path, golden=(golden["input_ids"], golden["logits"]))
    assert plan.config.layers_block_type == ["mamba", "moe"] * 2
    assert plan.config.moe_hidden_act == "gelu" and plan.config.num_experts == 8
    assert any("GELU" in note and "activation=silu" in note for note in plan.notes)


LAYERS = {
    "published": ["r", "8", "r", "8"],
    "counts-differ": ["r", "2", "r", "5", "9"],
    "dense": ["r", "1", "r", "1"],
    "parallel": ["r3", "r1", "r", "4", "1"],
}


@pytest.mark.parametrize("swiglu", [True, False], ids=["swiglu", "plain"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "add_bias_linear"])
@pytest.mark.parametrize("codes", LAYERS.values(), ids=LAYERS)
def test_layer_codes(tmp_path: Path, codes: list[str], bias: bool, swiglu: bool) -> None:
    plan, _ = assert_equal_logits(FORM, write(tmp_path, make_config(codes, bias=bias, swiglu=swiglu)))
    kinds = {"r": "mamba", "1": "mlp", "r1": "parallel_mlp"}
    wanted = [kinds.get(code, "parallel_moe" if code[0] == "r" else "moe") for code in codes]
    assert plan.config.layers_block_type == wanted


def test_no_layer_codes_means_mamba_throughout(tmp_path: Path) -> None:
    plan, _ = assert_equal_logits(FORM, write(tmp_path, make_config([], layers=3)))
    assert plan.config.layers_block_type == ["mamba"] * 3


@pytest.mark.parametrize("wrapped", [True, False], ids=["under-model", "top-level"])
def test_flat_keys(tmp_path: Path, wrapped: bool) -> None:
    config = make_config(["r", "4"], bias=True)
    plan, _ = assert_equal_logits(FORM, write(tmp_path, config, flat(make_tensors(config)), wrapped))
    assert plan.derivable == {"output_layer.weight": "embedding.weight"}


@pytest.mark.parametrize("options", [{"activation": "silu"}, {"routing": "softmax"}], ids=["silu", "softmax"])
def test_options_change_the_model(tmp_path: Path, options: dict[str, str]) -> None:
    folder = write(tmp_path, make_config(["r", "8"]))
    _, default = assert_equal_logits(FORM, folder)
    _, other = assert_equal_logits(FORM, folder, options)
    assert (default - other).abs().max() > 1e-2


def test_every_tensor_matters(tmp_path: Path) -> None:
    """In the reference forward: no tensor can be dropped or exchanged without a change of the logits."""
    config = make_config(["r3", "4", "1"], bias=True)
    tensors = make_tensors(config)
    _, expected = assert_equal_logits(FORM, write(tmp_path, config, tensors))
    for key in tensors:
        if "local_experts" in key:
            # an expert may have received no token
            continue
        changed = {**tensors, key: tensors[key] * 1.5 + 0.1}
        (tmp_path / "pytorch_model.bin").unlink()
        with CheckpointSource(write(tmp_path, config, changed)) as source:
            plan = make_plan(FORM, source)
            generator = torch.Generator().manual_seed(5)
            logits = FORM.reference_logits(source, plan, torch.randint(0, V, (2, 13), generator=generator))
        assert (logits - expected).abs().max() > 1e-5, key


@pytest.mark.parametrize(
    ("size", "total", "active"),
    [
        ({"num_layers": 30, "hidden_size": 1152, "ffn_hidden_size": 3072}, 1.458e9, 344e6),
        ({"num_layers": 36, "hidden_size": 1472, "ffn_hidden_size": 3872}, 2.783e9, 629e6),
    ],
    ids=["1.5B", "2.8B"],
)
def test_published_parameter_counts(size: dict, total: float, active: float) -> None:
    config = {**PUBLISHED, **size, "mamba_moe_layers": ["r", "8"] * (size["num_layers"] // 2)}
    source = SimpleNamespace(config=config, infos={"embedding.word_embeddings.weight": None}, location="published")
    plan = FORM.plan(source, FORM.resolve_options({}))
    with torch.device("meta"):
        model = MoeMambaForCausalLM(plan.config)
    assert abs(model.num_parameters() - total) < 0.5e6
    assert abs(model.num_active_parameters() - active) < 0.5e6
    shapes = {rule.target: rule.shape for rule in plan.rules}
    state = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert shapes == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba_moe_layers": ["r"]}, "has 1 entries, but `num_layers` is 2"),
        ({"mamba_moe_layers": ["r", "16"]}, "'16'.*single digits"),
        ({"mamba_moe_layers": ["r", 8]}, "must be 'r', a digit"),
        ({"mamba_moe_layers": ["r", "0"]}, "'0'"),
        ({"hidden_size": "24"}, "'hidden_size' must be int"),
        ({"swiglu": None}, "'swiglu'"),
    ],
    ids=lambda value: f"{next(iter(value))}={next(iter(value.values()))}" if isinstance(value, dict) else "",
)
def test_bad_configurations(tmp_path: Path, change: dict, message: str) -> None:
    config = make_config(["r", "4"])
    folder = write(tmp_path, {**config, **change}, make_tensors(config))
    with CheckpointSource(folder) as source, pytest.raises(ConversionError, match=message):
        make_plan(FORM, source)


def test_without_config_the_error_says_where_to_get_one(tmp_path: Path) -> None:
    folder = write(tmp_path, make_config(["r", "4"]))
    (folder / "config.json").unlink()
    with CheckpointSource(folder) as source, pytest.raises(ConversionError, match="Zyphra/BlackMamba"):
        make_plan(FORM, source)


def test_notes_name_what_is_not_read(tmp_path: Path) -> None:
    config = make_config(["r", "4"]) | {"bias": True, "rms_norm": False}
    plan, _ = assert_equal_logits(FORM, write(tmp_path, config, make_tensors(make_config(["r", "4"]))))
    text = " ".join(plan.notes)
    assert "rms_norm" in text and "`bias`" in text
