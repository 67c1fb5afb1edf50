"""mamba_ssm, Codestral and transformers' own folders: converted logits equal an independent forward, and the way back is exact."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_mamba
from hf_mamba_conversion import CheckpointSource, ConversionError, convert, detect
from hf_mamba_conversion.formats import detect_format

from .checkpoints import mamba_ssm_config, mamba_ssm_tensors, write_bin, write_safetensors, write_shards

TOLERANCE = 1e-5
IDS = torch.randint(0, 90, (2, 13), generator=torch.Generator().manual_seed(3))

VARIANTS: dict[str, dict[str, Any]] = {
    "mamba": mamba_ssm_config(),
    "mamba_untied": mamba_ssm_config(tie_embeddings=False),
    "mamba_every_argument": mamba_ssm_config(
        ssm_cfg={
            "layer": "Mamba1",
            "d_state": 5,
            "d_conv": 3,
            "expand": 3,
            "dt_rank": 7,
            "dt_min": 0.01,
            "dt_max": 0.2,
            "dt_init": "constant",
            "dt_scale": 2.0,
            "dt_init_floor": 1e-3,
            "conv_bias": False,
            "bias": True,
            "use_fast_path": False,
        }
    ),
    "mamba_layer_norm": mamba_ssm_config(rms_norm=False),
    "mamba_gated_mlp": mamba_ssm_config(d_intermediate=100, tie_embeddings=False),
    "mamba2": mamba_ssm_config("Mamba2"),
    "mamba2_every_argument": mamba_ssm_config(
        "Mamba2",
        tie_embeddings=False,
        residual_in_fp32=False,
        ssm_cfg={
            "layer": "Mamba2",
            "d_state": 6,
            "d_conv": 3,
            "conv_init": None,
            "expand": 3,
            "headdim": 8,
            "d_ssm": 96,
            "ngroups": 4,
            "A_init_range": [1, 16],
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
            "dt_min": 0.01,
            "dt_max": 0.2,
            "dt_init_floor": 1e-3,
            "dt_limit": [0.05, 0.4],
            "bias": True,
            "conv_bias": False,
            "chunk_size": 4,
            "use_mem_eff_path": False,
        },
    ),
    "mamba2_layer_norm_and_mlp": mamba_ssm_config("Mamba2", rms_norm=False, d_intermediate=128),
}


def reference(folder: Path) -> torch.Tensor:
    with CheckpointSource(folder) as source:
        form = detect_format(source)
        plan = form.plan(source, form.resolve_options({}))
        return form.reference_logits(source, plan, IDS)


def assert_same_logits(source: Path, result: Path) -> None:
    expected = reference(source)
    model = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("hf_mamba.")
    with torch.no_grad():
        logits = model(IDS).logits
    assert expected.std() > 1e-2
    assert (logits - expected).abs().max().item() <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_converted_logits_equal_an_independent_forward(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    source = write_bin(tmp_path / "source", mamba_ssm_tensors(config), config)
    report = convert(source, tmp_path / "result", verify=True)
    assert report.format == "mamba_ssm"
    assert report.verified is not None and report.verified.max_difference <= TOLERANCE
    assert_same_logits(source, tmp_path / "result")


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("write", [write_bin, write_safetensors, write_shards], ids=lambda f: f.__name__)
def test_every_kind_of_file_gives_the_same_tensors(write, layer: str, tmp_path: Path) -> None:
    config = mamba_ssm_config(layer)
    tensors = mamba_ssm_tensors(config)
    source = write(tmp_path / "source", tensors, config)
    convert(source, tmp_path / "result")
    result = load_file(tmp_path / "result" / "model.safetensors")
    expected = {key.replace("embedding.", "embeddings."): value for key, value in tensors.items()}
    del expected["lm_head.weight"]
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_pickled_shards_are_read(tmp_path: Path) -> None:
    config = mamba_ssm_config()
    source = write_shards(tmp_path / "source", mamba_ssm_tensors(config), config, suffix="bin")
    assert convert(source, tmp_path / "result", verify=True).inputs.keys() >= {"pytorch_model.bin.index.json"}


def test_a_file_and_a_wrapped_state_dict_are_read(tmp_path: Path) -> None:
    config = mamba_ssm_config("Mamba2")
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "step_10.pt"
    torch.save({"model_state": dict(mamba_ssm_tensors(config)), "step": 10}, file)
    assert convert(file, tmp_path / "result", verify=True).parameters > 0
    assert file.exists()


@pytest.mark.parametrize("name", ["mamba", "mamba_untied", "mamba_every_argument", "mamba2", "mamba2_every_argument"])
@pytest.mark.parametrize("write", [write_bin, write_shards], ids=lambda f: f.__name__)
def test_there_and_back_is_exact(name: str, write, tmp_path: Path) -> None:
    config = VARIANTS[name]
    tensors = mamba_ssm_tensors(config)
    first, second, third, fourth = (tmp_path / str(i) for i in range(4))
    write(first, tensors, config)
    convert(first, second)
    report = convert(second, third, to="mamba_ssm", verify=True)
    assert report.verified is not None and report.verified.max_difference <= TOLERANCE
    back = torch.load(third / "pytorch_model.bin", weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) and back[key].dtype == tensors[key].dtype for key in tensors)
    if config.get("tie_embeddings", True):
        assert back["lm_head.weight"].data_ptr() == back["backbone.embedding.weight"].data_ptr()
    written = json.loads((third / "config.json").read_text())
    assert explicit(written) == explicit(config)

    convert(third, fourth)
    one, two = (load_file(folder / "model.safetensors") for folder in (second, fourth))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (second / "config.json").read_text() == (fourth / "config.json").read_text()


def explicit(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with mamba_ssm's own defaults filled in (ops.md §6), without what never reaches a checkpoint."""
    model = {
        "d_intermediate": 0,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "tie_embeddings": True,
    } | config
    mixer = {"layer": "Mamba1", "d_conv": 4, "expand": 2, "dt_min": 0.001, "dt_max": 0.1, "dt_init_floor": 1e-4}
    mixer |= {"conv_bias": True, "bias": False}
    if config["ssm_cfg"].get("layer") == "Mamba2":
        mixer |= {"d_state": 128, "headdim": 64, "ngroups": 1, "chunk_size": 256, "dt_limit": [0.0, float("inf")]}
    else:
        rank = -(-config["d_model"] // 16)
        mixer |= {"d_state": 16, "dt_rank": rank, "dt_init": "random", "dt_scale": 1.0}
    mixer |= config["ssm_cfg"]
    for name in ("use_fast_path", "use_mem_eff_path", "conv_init", "A_init_range", "d_ssm", "D_has_hdim", "rmsnorm"):
        mixer.pop(name, None)
    mixer.pop("norm_before_gate", None)
    return model | {"ssm_cfg": mixer}


MAKERS = {
    "mamba": lambda: hf_mamba.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=90),
    "mamba_untied": lambda: hf_mamba.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=90, tie_word_embeddings=False, use_bias=True
    ),
    "mamba2": lambda: hf_mamba.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, n_groups=2, state_size=8, num_hidden_layers=2, vocab_size=90
    ),
    "mamba2_tied": lambda: hf_mamba.Mamba2Config(
        hidden_size=32,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        state_size=8,
        num_hidden_layers=2,
        vocab_size=90,
        tie_word_embeddings=True,
        time_step_limit=(0.05, 0.2),
    ),
    "falcon_mamba": lambda: hf_mamba.FalconMambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=90, tie_word_embeddings=False
    ),
}


def make_native_folder(name: str, folder: Path) -> Path:
    """A folder that transformers' own class wrote."""
    config = MAKERS[name]()
    torch.manual_seed(0)
    native = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
        "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    }[config.model_type]
    model = native[1](native[0].from_dict(config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MAKERS)
def test_native_folders_are_read(name: str, tmp_path: Path) -> None:
    source = make_native_folder(name, tmp_path / "source")
    report = convert(source, tmp_path / "result", verify=True, max_shard_size="20KB")
    assert report.format == "hf" and report.verified is not None
    assert report.verified.max_difference <= TOLERANCE
    assert len(list((tmp_path / "result").glob("model-*.safetensors"))) > 1
    assert_same_logits(source, tmp_path / "result")


@pytest.mark.parametrize("name", ["mamba", "mamba_untied", "mamba2", "mamba2_tied"])
def test_native_there_and_back_is_exact(name: str, tmp_path: Path) -> None:
    source = make_native_folder(name, tmp_path / "source")
    convert(source, tmp_path / "ssm", to="mamba_ssm", verify=True)
    convert(tmp_path / "ssm", tmp_path / "back", verify=True)
    one, two = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    first, second = (hf_mamba_config(folder) for folder in (source, tmp_path / "back"))
    # what only transformers has: token ids, the generation cache, how weights are initialised
    for field in ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "rescale_prenorm_residual"):
        first.pop(field), second.pop(field)
    for field in ("unpadded_vocab_size", "pad_vocab_size_multiple", "transformers_version", "_name_or_path"):
        first.pop(field, None), second.pop(field, None)
    assert first == second


def hf_mamba_config(folder: Path) -> dict[str, Any]:
    return transformers.AutoConfig.from_pretrained(folder).to_dict()


def test_the_old_embedding_key_of_native_folders_is_read(tmp_path: Path) -> None:
    source = make_native_folder("mamba", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    config = json.loads((source / "config.json").read_text())
    convert(write_safetensors(tmp_path / "old", tensors, config), tmp_path / "result", verify=True)
    assert "backbone.embeddings.weight" in load_file(tmp_path / "result" / "model.safetensors")


def test_code_that_a_native_folder_names_is_left_behind(tmp_path: Path) -> None:
    source = make_native_folder("mamba", tmp_path / "source")
    file = source / "config.json"
    changes = {"auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    report = convert(source, tmp_path / "result")
    assert "auto_map" not in json.loads((tmp_path / "result" / "config.json").read_text())
    assert any("auto_map" in note for note in report.notes)


def test_a_quantized_folder_is_refused(tmp_path: Path) -> None:
    source = make_native_folder("mamba", tmp_path / "source")
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"load_in_8bit": True}}))
    with pytest.raises(ConversionError, match="is quantized"):
        convert(source, tmp_path / "result")


def make_codestral(folder: Path) -> Path:
    config = mamba_ssm_config(
        "Mamba2",
        vocab_size=96,
        d_model=64,
        tie_embeddings=False,
        # only headdim is fixed by the format: the published model has 64, and 8 groups
        ssm_cfg={"layer": "Mamba2", "headdim": 64, "ngroups": 2},
    )
    tensors = mamba_ssm_tensors(config, prefix="model.")
    params = {
        "dim": 64,
        "n_layers": 2,
        "vocab_size": 96,
        "n_groups": 2,
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": False,
        "model_type": "mamba",
    }
    write_safetensors(folder, tensors, None)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def test_codestral(tmp_path: Path) -> None:
    source = make_codestral(tmp_path / "source")
    report = convert(source, tmp_path / "result", verify=True)
    assert report.format == "codestral" and report.config.n_groups == 2 and report.config.num_heads == 2
    assert not report.config.tie_word_embeddings
    assert_same_logits(source, tmp_path / "result")
    convert(source, tmp_path / "ssm", to="mamba_ssm", verify=True)
    assert detect(tmp_path / "ssm").name == "mamba_ssm"
    # the published repository holds both formats: the folder is read as transformers', the other file by its name
    for file in (tmp_path / "result").iterdir():
        shutil.copy(file, source / file.name)
    assert detect(source).name == "hf" and detect(source / "consolidated.safetensors").name == "codestral"


def test_results_load_with_transformers_own_classes(tmp_path: Path) -> None:
    """In a process without our registration, the same folders give the same logits."""
    folders = {}
    # with more than one group transformers 5.17 still has the norm over all channels, which is another model
    for name in ("mamba_every_argument", "mamba2"):
        config = VARIANTS[name]
        source = write_bin(tmp_path / f"{name}_source", mamba_ssm_tensors(config), config)
        convert(source, tmp_path / name)
        folders[name] = source
    convert(make_native_folder("falcon_mamba", tmp_path / "falcon_source"), tmp_path / "falcon")
    folders["falcon"] = tmp_path / "falcon_source"
    for name, source in folders.items():
        torch.save(reference(source), tmp_path / f"{name}.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
import hf_mamba
ids = torch.tensor({IDS.tolist()})
for name in {list(folders)!r}:
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name).eval()
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        difference = (model(ids).logits - torch.load({str(tmp_path)!r} + f"/{{name}}.pt")).abs().max().item()
    assert difference <= {TOLERANCE}, (name, difference)
"""
    environment = os.environ | {"HF_MAMBA_REGISTER": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba-3"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}, "attention"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_ssm": 32}}, "d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "rmsnorm": False}}, "rmsnorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "norm_before_gate": True}}, "norm_before_gate"),
    ],
    ids=["mamba3", "mamba2attn", "d_ssm", "D_has_hdim", "rmsnorm", "norm_before_gate"],
)
def test_what_cannot_be_represented_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = mamba_ssm_config("Mamba2")
    source = write_bin(tmp_path / "source", mamba_ssm_tensors(config), config | change)
    with pytest.raises(ConversionError, match=words) as caught:
        convert(source, tmp_path / "result")
    assert type(caught.value).__name__ == "UnsupportedFormatError" and "MambaLMHeadModel" in str(caught.value)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ssm_cfg": {"layer": "Mamba4"}}, "Mamba4"),
        ({"ssm_cfg": {"d_stat": 16}}, "d_stat"),
        ({"d_model": None}, "d_model"),
        ({"n_layer": "two"}, "n_layer"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        ({"vocab_size": 60}, "backbone.embedding.weight"),
        ({"n_layer": 3}, "backbone.layers.2"),
        ({"n_layer": 1}, "backbone.layers.1"),
        ({"ssm_cfg": {"d_state": 8}}, "A_log"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_config_is_an_error_that_names_it(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = mamba_ssm_config()
    source = write_bin(tmp_path / "source", mamba_ssm_tensors(config), config | change)
    with pytest.raises(ConversionError, match=words):
        convert(source, tmp_path / "result")


def test_a_head_that_is_tied_in_name_only_is_an_error(tmp_path: Path) -> None:
    config = mamba_ssm_config()
    tensors = mamba_ssm_tensors(config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    source = write_bin(tmp_path / "source", tensors, config)
    with pytest.raises(ConversionError, match=r"lm_head\.weight"):
        convert(source, tmp_path / "result")
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("name", ["falcon_mamba"])
def test_what_mamba_ssm_cannot_hold_is_not_exported(name: str, tmp_path: Path) -> None:
    source = make_native_folder(name, tmp_path / "source")
    with pytest.raises(ConversionError, match="mamba_ssm has no model like"):
        convert(source, tmp_path / "result", to="mamba_ssm")


def test_an_epsilon_of_its_own_is_not_exported(tmp_path: Path) -> None:
    source = make_native_folder("mamba", tmp_path / "source")
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 1e-6}))
    with pytest.raises(ConversionError, match="layer_norm_epsilon"):
        convert(source, tmp_path / "result", to="mamba_ssm")
