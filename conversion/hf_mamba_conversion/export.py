"""From transformers' Mamba and Mamba-2 to mamba_ssm's format: the inverse of reading it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import ConversionError, UnsupportedFormatError
from .formats.base import TensorRule
from .formats.mamba_ssm import MIXER_DEFAULTS, NORM_EPS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["export_config", "export_rules"]

EMBEDDING = ("backbone.embeddings.weight", "backbone.embedding.weight")
# transformers' field → argument of mamba_ssm's mixer
COMMON_FIELDS = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
MIXER_FIELDS = {
    "mamba": COMMON_FIELDS
    | {"time_step_rank": "dt_rank", "time_step_scale": "dt_scale", "time_step_init_scheme": "dt_init"},
    "mamba2": COMMON_FIELDS
    | {"head_dim": "headdim", "n_groups": "ngroups", "chunk_size": "chunk_size", "time_step_limit": "dt_limit"},
}
PAD_MULTIPLES = (16, 8)


def export_config(config: "PreTrainedConfig") -> dict[str, Any]:
    """mamba_ssm's `config.json` for a configuration of Mamba or Mamba-2. In `ssm_cfg` stands what differs from defaults.

    Raises:
        UnsupportedFormatError: another model type.
        ConversionError: a value that mamba_ssm has no field for.
    """
    kind = config.model_type
    if kind not in MIXER_FIELDS:
        raise UnsupportedFormatError(
            f"mamba_ssm has no model like {type(config).__name__}; only Mamba and Mamba-2 can be written in its format. "
            "Leave out --to mamba_ssm."
        )
    for name, only in (("layer_norm_epsilon", NORM_EPS), ("hidden_act", "silu")):
        if getattr(config, name) != only:
            raise ConversionError(
                f"mamba_ssm's models always have {name} = {only}, but config.json has {getattr(config, name)!r}: the exported "
                "model would compute something else."
            )
    layer = "Mamba2" if kind == "mamba2" else "Mamba1"
    ssm_cfg: dict[str, Any] = {"layer": layer} if kind == "mamba2" else {}
    defaults = MIXER_DEFAULTS[layer]
    for field, argument in MIXER_FIELDS[kind].items():
        value = getattr(config, field)
        value = list(value) if isinstance(value, tuple) else value
        default = defaults[argument]
        if argument == "dt_rank":
            default = -(-config.hidden_size // 16)
        if value != (list(default) if isinstance(default, tuple) else default):
            ssm_cfg[argument] = value
    vocab_size, multiple = _vocabulary(config)
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": vocab_size,
        "ssm_cfg": ssm_cfg,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": config.tie_word_embeddings,
    }


def export_rules(rules: Sequence[TensorRule], tied: bool) -> tuple[list[TensorRule], dict[str, str]]:
    """The rules with mamba_ssm's names, and the tensors that share another one's storage: a tied head is stored, too."""
    renamed = [replace(rule, target=EMBEDDING[1]) if rule.target == EMBEDDING[0] else rule for rule in rules]
    return renamed, ({"lm_head.weight": EMBEDDING[1]} if tied else {})


def _vocabulary(config: "PreTrainedConfig") -> tuple[int, int]:
    """`vocab_size` and `pad_vocab_size_multiple`; those of the original checkpoint if the configuration remembers them."""
    size = getattr(config, "unpadded_vocab_size", None)
    multiple = getattr(config, "pad_vocab_size_multiple", None)
    if isinstance(size, int) and isinstance(multiple, int) and multiple > 0:
        if multiple * -(-size // multiple) == config.vocab_size:
            return size, multiple
    return config.vocab_size, next((m for m in PAD_MULTIPLES if config.vocab_size % m == 0), 1)
