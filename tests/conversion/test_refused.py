"""Known formats that nothing here can hold are refused by name, with the reason and what loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_mamba_conversion import ConversionError, UnsupportedFormatError, convert, detect
from hf_mamba_conversion.formats.refused import REFUSED

from .checkpoints import write_safetensors

ANY = {"model.layers.0.mamba.in_proj.weight": (4, 4)}
CASES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any] | None]] = {
    "moe_mamba": ({"backbone.embeddings.weight": (4, 4)}, {"model_type": "moe_mamba"}),
    "kyegomez_moe_mamba": (
        {
            "emb.weight": (4, 4),
            "mamba_block.layers.0.A_log": (4, 4),
            "mamba_block.ffn_layers.0.gate.w_gate.weight": (4, 4),
            "to_logits.0.gamma": (1, 4, 1),
        },
        None,
    ),
    "jamba": ({"model.layers.0.mamba.dt_layernorm.weight": (4,)}, None),
    "zamba": (ANY, {"model_type": "zamba"}),
    "zamba2": (ANY, {"model_type": "zamba2"}),
    "nemotron_h": (ANY, {"model_type": "nemotron_h"}),
    "bamba": (ANY, {"model_type": "bamba"}),
    "granitemoehybrid": (ANY, {"model_type": "granitemoehybrid"}),
    "falcon_h1": (ANY, {"model_type": "falcon_h1"}),
    "caduceus": ({"caduceus.backbone.norm_f.weight": (4,)}, {"model_type": "caduceus"}),
    "mamba2attn_remote_code": (ANY, {"model_type": "mamba2_attn", "mamba2_num_heads": 32}),
    "megatron_mamba2": (
        {"embedding.word_embeddings.weight": (4, 4), "decoder.layers.0.mixer.dt_bias": (4,)},
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    shapes, config = CASES[name]
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    source = write_safetensors(tmp_path / "source", tensors, config)
    assert detect(source).name == name
    with pytest.raises(UnsupportedFormatError, match="cannot be converted") as caught:
        convert(source, tmp_path / "result")
    form = next(form for form in REFUSED if form.name == name)
    assert form.title in str(caught.value) and form.reason in str(caught.value) and form.way_out in str(caught.value)
    assert not (tmp_path / "result").exists()


def test_every_refused_format_has_a_case() -> None:
    assert {form.name for form in REFUSED} == set(CASES)


@pytest.mark.parametrize("form", REFUSED, ids=lambda form: form.name)
def test_classes_named_as_the_way_out_exist(form: Any) -> None:
    if form.way_out.startswith("transformers' "):
        assert hasattr(transformers, form.way_out.split()[1])


def test_an_unknown_format_names_what_was_seen(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "source", {"strange.weight": torch.zeros(2)}, {"model_type": "gpt2"})
    with pytest.raises(ConversionError, match=r"gpt2.*strange\.weight"):
        detect(source)


def test_a_missing_config_is_an_error_that_says_so(tmp_path: Path) -> None:
    tensors = {"backbone.embedding.weight": torch.zeros(8, 4), "backbone.norm_f.weight": torch.ones(4)}
    source = write_safetensors(tmp_path / "source", tensors, None)
    with pytest.raises(ConversionError, match=r"no config\.json"):
        convert(source, tmp_path / "result")
    (source / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConversionError, match="expected an object"):
        convert(source, tmp_path / "result")
