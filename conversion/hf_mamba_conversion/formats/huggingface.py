"""Folders in transformers' own format: Mamba, Mamba-2, Falcon-Mamba."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConversionError
from .base import ConversionPlan, Format, config_count, make_config
from .plain_mamba import Getter, mamba1_mixer, mamba2_mixer, rms_norm
from .plain_model import plain_logits
from .rules import copy_rule, mixer_rules, norm_rules

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["HuggingFaceFormat"]

EMBEDDING = "backbone.embeddings.weight"
# the first *-hf folders kept the original name
OLD_EMBEDDING = "backbone.embedding.weight"
HEAD = "lm_head.weight"
MODEL_TYPES = ("mamba", "mamba2", "falcon_mamba")
# what an absent field means in config.json, where it matters to the output; Mamba-2's are Codestral's
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": 32, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "falcon_mamba": {
        "num_hidden_layers": 32,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "mixer_rms_eps": 1e-6,
    },
    "mamba2": {
        "num_hidden_layers": 64,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "head_dim": 64,
        "n_groups": 8,
        "time_step_limit": (0.0, float("inf")),
    },
}


class HuggingFaceFormat(Format):
    """transformers' folders, read to write them in another dtype or sharding, or in mamba_ssm's format."""

    name = "hf"
    title = "Hugging Face transformers"

    def recognises(self, source: "CheckpointSource") -> bool:
        return (source.config or {}).get("model_type") in MODEL_TYPES and (
            EMBEDDING in source or OLD_EMBEDDING in source
        )

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        import hf_mamba

        assert source.config is not None
        model_type = source.config["model_type"]
        classes: dict[str, Any] = {
            "mamba": hf_mamba.MambaConfig,
            "mamba2": hf_mamba.Mamba2Config,
            "falcon_mamba": hf_mamba.FalconMambaConfig,
        }
        if source.config.get("quantization_config"):
            raise ConversionError(
                f"{source.location} is quantized (`quantization_config` in config.json); convert the original, and quantize the "
                "result when it is loaded."
            )
        notes = []
        # its code does not come along, and transformers' users would be asked whether to run it
        given = {key: value for key, value in source.config.items() if key != "auto_map"}
        if len(given) < len(source.config):
            notes.append("`auto_map` of config.json was left out: the result needs no code of its own.")
        config_count(given, "num_hidden_layers", default=DEFAULTS[model_type]["num_hidden_layers"])
        config: Any = make_config(classes[model_type].from_dict, given)
        # an instruction for initialising: transformers' classes would redraw weights that they load
        config.rescale_prenorm_residual = False
        V, d = config.vocab_size, config.hidden_size
        embedding = EMBEDDING if EMBEDDING in source else OLD_EMBEDDING
        rules = [copy_rule(EMBEDDING, embedding, (V, d))]
        mixer_type = "mamba2" if model_type == "mamba2" else "mamba"
        for index in range(config.num_hidden_layers):
            prefix = f"backbone.layers.{index}."
            rules += norm_rules("rmsnorm", d, f"{prefix}norm.", f"{prefix}norm.")
            rules += mixer_rules(config, mixer_type, f"{prefix}mixer.", f"{prefix}mixer.")
        rules += norm_rules("rmsnorm", d, "backbone.norm_f.", "backbone.norm_f.")
        derivable = {}
        if not config.tie_word_embeddings:
            rules.append(copy_rule(HEAD, HEAD, (V, d)))
        elif HEAD in source:
            derivable[HEAD] = embedding
        return ConversionPlan(config=config, rules=rules, derivable=derivable, notes=notes)

    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        assert source.config is not None
        kind = source.config["model_type"]
        config = DEFAULTS[kind] | source.config
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ConversionError(f"--verify knows the activation silu only, the config has {config['hidden_act']!r}.")
        eps = config["layer_norm_epsilon"]

        def norm(name: str, get: Getter, x: Tensor) -> Tensor:
            return rms_norm(x, get(f"{name}.weight"), eps=eps)

        def mixer(get: Getter, x: Tensor) -> Tensor:
            def below(name: str) -> Tensor | None:
                return get(f"mixer.{name}")

            if kind == "mamba2":
                low, high = config["time_step_limit"]
                return mamba2_mixer(
                    below,
                    x,
                    head_dim=config["head_dim"],
                    n_groups=config["n_groups"],
                    dt_limit=(float(low), float(high)),
                    eps=eps,
                )
            return mamba1_mixer(below, x, parameter_norm_eps=config.get("mixer_rms_eps") if "falcon" in kind else None)

        embedding = EMBEDDING if EMBEDDING in source else OLD_EMBEDDING
        return plain_logits(
            source,
            input_ids,
            embedding=embedding,
            layers="backbone.layers.",
            order=range(config["num_hidden_layers"]),
            sublayers=[(partial(norm, "norm"), mixer)],
            final_norm=partial(norm, "backbone.norm_f"),
            head=embedding if config["tie_word_embeddings"] else HEAD,
        )
