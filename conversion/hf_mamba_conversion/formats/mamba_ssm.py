"""Checkpoints of the repository state-spaces/mamba: Mamba and Mamba-2, with everything that `ssm_cfg` can say."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConversionError, UnsupportedFormatError
from .base import ConversionPlan, Format, TensorRule, config_count, config_value, make_config
from .plain_mamba import Getter, layer_norm, linear, mamba1_mixer, mamba2_mixer, rms_norm
from .plain_model import Part, plain_logits
from .rules import copy_rule, mixer_rules, norm_rules, swapped_rule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..source import CheckpointSource

__all__ = ["MIXER_DEFAULTS", "NORM_EPS", "MambaSsmFormat", "plan_mamba_ssm", "reference_mamba_ssm"]

NORM_EPS = 1e-5
# the gated layer rounds its width up to a multiple of this
MLP_MULTIPLE = 128

# the fields of mamba_ssm's MambaConfig and their defaults
MODEL_DEFAULTS: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
# the arguments of the two mixers and their defaults
MIXER_DEFAULTS: dict[str, dict[str, Any]] = {
    "Mamba1": {
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dt_rank": "auto",
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init": "random",
        "dt_scale": 1.0,
        "dt_init_floor": 1e-4,
        "conv_bias": True,
        "bias": False,
    },
    "Mamba2": {
        "d_state": 128,
        "d_conv": 4,
        "expand": 2,
        "headdim": 64,
        "d_ssm": None,
        "ngroups": 1,
        "D_has_hdim": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "dt_min": 0.001,
        "dt_max": 0.1,
        "dt_init_floor": 1e-4,
        "dt_limit": (0.0, float("inf")),
        "bias": False,
        "conv_bias": True,
        "chunk_size": 256,
    },
}
# arguments that change neither shapes nor outputs: how weights were first drawn, and how upstream computes
WITHOUT_EFFECT = {
    "Mamba1": {"use_fast_path"},
    "Mamba2": {"conv_init", "A_init_range", "use_mem_eff_path", "process_group", "sequence_parallel"},
}
# upstream's own tokenizer, GPT-NeoX, whose <|endoftext|> is token 0
GPT_NEOX_VOCABULARY = 50277


class MambaSsmFormat(Format):
    """`config.json` with `d_model`, `n_layer`, `ssm_cfg`; keys `backbone.embedding.weight`, `backbone.layers.0.mixer.…`."""

    name = "mamba_ssm"
    title = "mamba_ssm (state-spaces/mamba)"

    def recognises(self, source: "CheckpointSource") -> bool:
        config = source.config or {}
        if "model_type" in config and "d_model" not in config:
            return False
        return "backbone.embedding.weight" in source and "backbone.norm_f.weight" in source

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        if source.config is None:
            raise ConversionError(
                f"{source.location} has the tensors of a mamba_ssm checkpoint but no config.json beside them, and head "
                "dimension and groups cannot be told from shapes; put the model's config.json into the folder."
            )
        return plan_mamba_ssm(source, source.config, prefix="")

    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        assert source.config is not None
        return reference_mamba_ssm(source, source.config, input_ids, prefix="")


def plan_mamba_ssm(source: "CheckpointSource", given: Mapping[str, Any], prefix: str) -> ConversionPlan:
    """The plan for a checkpoint with mamba_ssm's names below `prefix` and its configuration `given`.

    Raises:
        ConversionError: fields that are missing, unknown or of the wrong type.
        UnsupportedFormatError: fields that no class of ours has: attention layers, Mamba-3, `d_ssm`, `D_has_hdim`, …
    """
    notes: list[str] = []
    for key in ("d_model", "vocab_size"):
        config_value(given, key, int)
    config_count(given, "n_layer")
    unknown = sorted(set(given) - set(MODEL_DEFAULTS))
    if unknown:
        notes.append(f"config.json has fields that mamba_ssm does not know, left aside: {', '.join(unknown)}.")
    model = {key: config_value(given, key, type(default), default) for key, default in MODEL_DEFAULTS.items()}
    layer, mixer = _mixer_settings(model, notes)
    config = _build_config(source, model, layer, mixer, prefix)
    rules, derivable = _rules(source, model, config, "mamba2" if layer == "Mamba2" else "mamba", prefix)
    return ConversionPlan(config=config, rules=rules, derivable=derivable, notes=notes)


def _mixer_settings(model: dict[str, Any], notes: list[str]) -> tuple[str, dict[str, Any]]:
    """The mixer's name and all its arguments."""
    if model["attn_layer_idx"]:
        raise UnsupportedFormatError(
            f"the layers {model['attn_layer_idx']} (`attn_layer_idx`) are attention layers with mamba_ssm's own layout "
            "(mamba2attn, transformerpp, Bamba's original files): no class here has attention. mamba_ssm's "
            "MambaLMHeadModel loads it; for Bamba, transformers' BambaForCausalLM loads ibm-ai-platform/Bamba-9B."
        )
    given = dict(model["ssm_cfg"])
    layer = config_value(given, "layer", str, "Mamba1")
    given.pop("layer", None)
    if layer == "Mamba3":
        raise UnsupportedFormatError(
            "the layers are Mamba-3 (`ssm_cfg.layer`), another recurrence with rotary angles and no convolution: no class "
            "here has it. mamba_ssm's MambaLMHeadModel loads it."
        )
    if layer not in MIXER_DEFAULTS:
        raise ConversionError(f"`ssm_cfg.layer` must be one of {', '.join(MIXER_DEFAULTS)}, got {layer!r}.")
    defaults = MIXER_DEFAULTS[layer]
    idle = sorted(set(given) & WITHOUT_EFFECT[layer])
    if idle:
        notes.append(f"fields of ssm_cfg that have no effect on outputs, left aside: {', '.join(idle)}.")
    unknown = sorted(set(given) - set(defaults) - WITHOUT_EFFECT[layer])
    if unknown:
        raise ConversionError(
            f"`ssm_cfg` has {', '.join(map(repr, unknown))}, which mamba_ssm's {layer} does not take; known are "
            f"{', '.join(defaults)}."
        )
    mixer = defaults | given
    _check_types(mixer, defaults)
    if layer == "Mamba2":
        _refuse_variants(model, mixer)
    return layer, mixer


def _check_types(mixer: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Hold each argument against the type of its default, where that says it all."""
    for key, default in defaults.items():
        value = mixer[key]
        if key == "dt_limit":
            if not isinstance(value, list | tuple) or [type(bound) in (int, float) for bound in value] != [True, True]:
                raise ConversionError(f"config.json: 'dt_limit' must be a pair of numbers, got {value!r}.")
        # "auto" and None stand for a number that follows from the others
        elif value != default or key not in ("dt_rank", "d_ssm"):
            config_value(mixer, key, int if key in ("dt_rank", "d_ssm") else type(default))


def _refuse_variants(model: dict[str, Any], mixer: dict[str, Any]) -> None:
    inner = mixer["expand"] * model["d_model"]
    if mixer["d_ssm"] not in (None, inner):
        raise UnsupportedFormatError(
            f"`ssm_cfg.d_ssm` {mixer['d_ssm']} differs from the inner width {inner}: part of the mixer is a gated MLP, which "
            "no Mamba-2 class of transformers or hf_mamba has. mamba_ssm's MambaLMHeadModel loads it."
        )
    for key, right in (("D_has_hdim", False), ("rmsnorm", True), ("norm_before_gate", False)):
        if mixer[key] != right:
            raise UnsupportedFormatError(
                f"`ssm_cfg.{key}` is {mixer[key]}: no Mamba-2 class of transformers or hf_mamba can express this, only "
                f"{right}. mamba_ssm's MambaLMHeadModel loads it."
            )


def _build_config(
    source: "CheckpointSource", model: dict[str, Any], layer: str, mixer: dict[str, Any], prefix: str
) -> "PreTrainedConfig":
    from hf_mamba import Mamba2Config, MambaConfig, MoeMambaConfig

    multiple = model["pad_vocab_size_multiple"]
    if multiple < 1:
        raise ConversionError(f"config.json: `pad_vocab_size_multiple` must be at least 1, got {multiple}.")
    # upstream's own models speak GPT-NeoX; for others the tokenizer decides
    token = 0 if model["vocab_size"] in (GPT_NEOX_VOCABULARY, 50280, 50288) else None
    fields: dict[str, Any] = {
        "vocab_size": multiple * math.ceil(model["vocab_size"] / multiple),
        # transformers has no fields for these two; they are kept so that the way back is exact
        "unpadded_vocab_size": model["vocab_size"],
        "pad_vocab_size_multiple": multiple,
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["n_layer"],
        "state_size": mixer["d_state"],
        "conv_kernel": mixer["d_conv"],
        "expand": mixer["expand"],
        "use_bias": mixer["bias"],
        "use_conv_bias": mixer["conv_bias"],
        "time_step_min": mixer["dt_min"],
        "time_step_max": mixer["dt_max"],
        "time_step_floor": mixer["dt_init_floor"],
        "residual_in_fp32": model["residual_in_fp32"],
        "layer_norm_epsilon": NORM_EPS,
        "tie_word_embeddings": model["tie_embeddings"],
        "bos_token_id": token,
        "eos_token_id": token,
        "pad_token_id": token,
        # this instruction for initialising would redraw the weights when transformers' own classes load them
        "rescale_prenorm_residual": False,
    }
    if layer == "Mamba2":
        head_dim = mixer["headdim"]
        inner = mixer["expand"] * model["d_model"]
        if head_dim < 1 or inner % head_dim:
            raise ConversionError(f"`ssm_cfg.headdim` must divide the inner width {inner}, got {head_dim}.")
        fields |= {
            "head_dim": head_dim,
            "num_heads": inner // head_dim,
            "n_groups": mixer["ngroups"],
            "chunk_size": mixer["chunk_size"],
            "time_step_limit": tuple(float(bound) for bound in mixer["dt_limit"]),
        }
    else:
        rank = mixer["dt_rank"]
        fields |= {
            "time_step_rank": math.ceil(model["d_model"] / 16) if rank == "auto" else rank,
            "time_step_scale": mixer["dt_scale"],
            "time_step_init_scheme": mixer["dt_init"],
        }
    if model["rms_norm"] and not model["d_intermediate"]:
        return make_config(Mamba2Config if layer == "Mamba2" else MambaConfig, **fields)
    return make_config(MoeMambaConfig, **(fields | _frame(source, model, layer, prefix)))


def _frame(source: "CheckpointSource", model: dict[str, Any], layer: str, prefix: str) -> dict[str, Any]:
    """The fields of `MoeMambaConfig` for what the plain classes lack: LayerNorm, and gated dense layers."""
    frame: dict[str, Any] = {
        "mixer_type": "mamba2" if layer == "Mamba2" else "mamba",
        "norm_type": "rmsnorm" if model["rms_norm"] else "layernorm",
        "final_norm": True,
        "layers_block_type": ["mamba"] * model["n_layer"],
    }
    width = model["d_intermediate"]
    if width:
        frame["num_hidden_layers"] = None
        frame["layers_block_type"] = ["mamba", "mlp"] * model["n_layer"]
        frame["mlp_intermediate_size"] = _dense_width(source, model, prefix)
        frame |= {"mlp_hidden_act": "silu", "mlp_gated": True, "mlp_bias": False}
    return frame


def _dense_width(source: "CheckpointSource", model: dict[str, Any], prefix: str) -> int:
    """Width of the gated layers: `d_intermediate`, which upstream rounds up."""
    given = model["d_intermediate"]
    rounded = MLP_MULTIPLE * math.ceil(given / MLP_MULTIPLE)
    keys = (f"{prefix}backbone.layers.{index}.mlp.fc2.weight" for index in range(model["n_layer"]))
    width = next((source.shape(key)[-1] for key in keys if key in source), rounded)
    if width not in (given, rounded):
        raise ConversionError(
            f"config.json: `d_intermediate` is {given}, which mamba_ssm rounds to {rounded}, but mlp.fc2.weight has the "
            f"width {width}; is it the right config.json?"
        )
    return width


def _rules(
    source: "CheckpointSource", model: dict[str, Any], config: Any, mixer_type: str, prefix: str
) -> tuple[list[TensorRule], dict[str, str]]:
    V, d = config.vocab_size, config.hidden_size
    dense = bool(model["d_intermediate"])
    norm_type = "rmsnorm" if model["rms_norm"] else "layernorm"
    embedding = f"{prefix}backbone.embedding.weight"
    rules = [copy_rule("backbone.embeddings.weight", embedding, (V, d))]
    for index in range(model["n_layer"]):
        key = f"{prefix}backbone.layers.{index}."
        target = f"backbone.layers.{2 * index if dense else index}."
        rules += norm_rules(norm_type, d, f"{target}norm.", f"{key}norm.")
        rules += mixer_rules(config, mixer_type, f"{target}mixer.", f"{key}mixer.")
        if dense:
            target = f"backbone.layers.{2 * index + 1}."
            F = config.mlp_intermediate_size
            rules += norm_rules(norm_type, d, f"{target}norm.", f"{key}norm2.")
            rules.append(swapped_rule(f"{target}mlp.gate_up_proj.weight", f"{key}mlp.fc1.weight", (2 * F, d)))
            rules.append(copy_rule(f"{target}mlp.down_proj.weight", f"{key}mlp.fc2.weight", (d, F)))
    rules += norm_rules(norm_type, d, "backbone.norm_f.", f"{prefix}backbone.norm_f.")
    head = f"{prefix}lm_head.weight"
    if not model["tie_embeddings"]:
        rules.append(copy_rule("lm_head.weight", head, (V, d)))
        return rules, {}
    return rules, ({head: embedding} if head in source else {})


def reference_mamba_ssm(
    source: "CheckpointSource",
    given: Mapping[str, Any],
    input_ids: Tensor,
    prefix: str,
    order: Iterable[int] | None = None,
    feed_forward: Part | None = None,
) -> Tensor:
    """Logits of a checkpoint with mamba_ssm's names below `prefix`, computed as mamba_ssm computes, in fp32.

    Args:
        order: of the layers, by default that of their numbers.
        feed_forward: takes the place of the gated MLP.
    """
    ssm_cfg = given.get("ssm_cfg", {})

    def norm(name: str, get: Getter, x: Tensor) -> Tensor:
        weight, bias = get(f"{name}.weight"), get(f"{name}.bias")
        assert weight is not None
        return rms_norm(x, weight) if given.get("rms_norm", True) else layer_norm(x, weight, bias)

    def mixer(get: Getter, x: Tensor) -> Tensor:
        def below(name: str) -> Tensor | None:
            return get(f"mixer.{name}")

        if ssm_cfg.get("layer", "Mamba1") == "Mamba1":
            return mamba1_mixer(below, x)
        low, high = ssm_cfg.get("dt_limit", (0.0, float("inf")))
        return mamba2_mixer(
            below,
            x,
            head_dim=ssm_cfg.get("headdim", 64),
            n_groups=ssm_cfg.get("ngroups", 1),
            dt_limit=(float(low), float(high)),
        )

    sublayers: list[tuple[Part, Part]] = [(partial(norm, "norm"), mixer)]
    if given.get("d_intermediate", 0):
        sublayers.append((partial(norm, "norm2"), feed_forward or _gated_mlp))
    embedding = f"{prefix}backbone.embedding.weight"
    return plain_logits(
        source,
        input_ids,
        embedding=embedding,
        layers=f"{prefix}backbone.layers.",
        order=range(given["n_layer"]) if order is None else order,
        sublayers=sublayers,
        final_norm=partial(norm, f"{prefix}backbone.norm_f"),
        head=embedding if given.get("tie_embeddings", True) else f"{prefix}lm_head.weight",
    )


def _gated_mlp(get: Getter, x: Tensor) -> Tensor:
    value, gate = linear(get, "mlp.fc1", x).chunk(2, dim=-1)
    return linear(get, "mlp.fc2", value * gate * torch.sigmoid(gate))
