"""The published checkpoints: their configurations give their parameter counts, on the meta device (checkpoint_formats.md §2–6)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_mamba_conversion.checks import check_plan
from hf_mamba_conversion.errors import UnsupportedFormatError
from hf_mamba_conversion.formats import detect_format
from hf_mamba_conversion.formats.codestral import CodestralFormat
from hf_mamba_conversion.formats.huggingface import HuggingFaceFormat
from hf_mamba_conversion.formats.mamba_ssm import MambaSsmFormat
from hf_mamba_conversion.source import TensorInfo

NEOX = {"vocab_size": 50277, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}


def mamba(n_layer: int, d_model: int) -> dict[str, Any]:
    return {"d_model": d_model, "n_layer": n_layer, "ssm_cfg": {}, **NEOX, "pad_vocab_size_multiple": 8}


def mamba2(n_layer: int, d_model: int) -> dict[str, Any]:
    config = mamba(n_layer, d_model) | {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}
    return config | {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True}


PUBLISHED = {
    "mamba-130m": (mamba(24, 768), 129_135_360),
    "mamba-370m": (mamba(48, 1024), 371_516_416),
    "mamba-790m": (mamba(48, 1536), 793_204_224),
    "mamba-1.4b": (mamba(48, 2048), 1_372_178_432),
    "mamba-2.8b": (mamba(64, 2560), 2_768_345_600),
    "mamba-2.8b-slimpj": (mamba(64, 2560), 2_768_345_600),
    "mamba2-130m": (mamba2(24, 768), 128_989_632),
    "mamba2-370m": (mamba2(48, 1024), 368_346_624),
    "mamba2-780m": (mamba2(48, 1536), 780_161_280),
    "mamba2-1.3b": (mamba2(48, 2048), 1_343_757_312),
    "mamba2-2.7b": (mamba2(64, 2560), 2_702_599_680),
}
CODESTRAL = {
    "dim": 4096,
    "n_layers": 64,
    "vocab_size": 32768,
    "n_groups": 8,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
    "model_type": "mamba",
}
FALCON = {
    "model_type": "falcon_mamba",
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "state_size": 16,
    "time_step_rank": 256,
    "intermediate_size": 8192,
    "vocab_size": 65024,
    "tie_word_embeddings": False,
}


def planned_parameters(form: Any, source: Any) -> tuple[Any, int]:
    """Plan for a source without files: the plan's own shapes are what it would find, and the model must agree."""
    plan = form.plan(source, {})
    for rule in plan.rules:
        for key, shape in zip(rule.sources, rule.source_shapes, strict=True):
            source.infos[key] = TensorInfo(shape, torch.float32, 4 * torch.Size(shape).numel())
    return plan, check_plan(source, plan)


class Empty(SimpleNamespace):
    """A source of which only the configuration is known."""

    location = "published"
    params = None
    config = None

    def __init__(self, **fields: Any) -> None:
        super().__init__(infos={}, **fields)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_spaces(name: str) -> None:
    config, parameters = PUBLISHED[name]
    plan, counted = planned_parameters(MambaSsmFormat(), Empty(config=config))
    assert counted == parameters
    assert sum(torch.Size(rule.shape).numel() for rule in plan.rules) == parameters
    assert plan.config.vocab_size == (50288 if name.startswith("mamba2") else 50280)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("mamba-")])
def test_transformers_twins(name: str) -> None:
    """`…-hf` on the Hub: transformers' fields, with the original's left beside them."""
    original, parameters = PUBLISHED[name]
    width, layers = original["d_model"], original["n_layer"]
    config = original | {
        "model_type": "mamba",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * width,
        "state_size": 16,
        "time_step_rank": width // 16,
        "vocab_size": 50280,
    }
    source = Empty(config=config)
    plan, counted = planned_parameters(HuggingFaceFormat(), source)
    assert counted == parameters and plan.config.tie_word_embeddings
    assert detect_format(source).name == "hf"


def test_mamba2_sizes_of_the_table() -> None:
    plan, _ = planned_parameters(MambaSsmFormat(), Empty(config=PUBLISHED["mamba2-2.7b"][0]))
    shapes = {rule.target: rule.shape for rule in plan.rules}
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == (10576, 2560)
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (5376, 1, 4)
    assert plan.config.num_heads == 80


def test_codestral() -> None:
    plan, counted = planned_parameters(CodestralFormat(), Empty(params=CODESTRAL))
    assert counted == 7_285_403_648
    assert (plan.config.num_heads, plan.config.head_dim, plan.config.state_size) == (128, 64, 128)


def test_falcon_mamba() -> None:
    source = Empty(config=FALCON)
    _, counted = planned_parameters(HuggingFaceFormat(), source)
    assert counted == 7_272_665_088


HYBRIDS = {
    "mamba2attn-2.7b": mamba2(64, 2560)
    | {
        "attn_layer_idx": [9, 18, 27, 36, 45, 56],
        "attn_cfg": {
            "causal": True,
            "d_conv": 4,
            "head_dim": 128,
            "num_heads": 30,
            "out_proj_bias": False,
            "qkv_proj_bias": False,
            "rotary_emb_dim": 64,
        },
    },
    "Bamba-9B": mamba2(32, 4096)
    | {
        "d_intermediate": 14336,
        "attn_layer_idx": [9, 18, 27],
        "attn_cfg": {"causal": True, "d_conv": 0, "head_dim": 128, "num_heads": 32, "num_heads_kv": 8},
        "vocab_size": 128256,
        "tie_embeddings": False,
    },
    "mamba3-siso-1.5b": mamba2(24, 2048)
    | {
        "d_intermediate": 4096,
        "vocab_size": 128256,
        "ssm_cfg": {
            "layer": "Mamba3",
            "d_state": 128,
            "expand": 2,
            "headdim": 64,
            "ngroups": 1,
            "rope_fraction": 0.5,
            "A_floor": 1e-4,
            "chunk_size": 64,
            "is_mimo": False,
            "is_outproj_norm": False,
        },
    },
}


@pytest.mark.parametrize(
    ("name", "words"),
    [("mamba2attn-2.7b", "mamba2attn"), ("Bamba-9B", "BambaForCausalLM"), ("mamba3-siso-1.5b", "Mamba-3")],
    ids=list(HYBRIDS),
)
def test_what_no_class_here_can_hold_is_refused_by_name(name: str, words: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=words) as caught:
        MambaSsmFormat().plan(Empty(config=HYBRIDS[name]), {})  # type: ignore[arg-type]
    assert "MambaLMHeadModel loads it" in str(caught.value)
