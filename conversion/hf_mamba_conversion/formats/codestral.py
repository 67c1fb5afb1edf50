"""Mamba-Codestral's original files: `params.json` and `consolidated.safetensors`, mamba_ssm's names below `model.`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConversionError
from .base import ConversionPlan, Format, config_value
from .mamba_ssm import plan_mamba_ssm, reference_mamba_ssm

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["CodestralFormat"]

PREFIX = "model."
# tokens of Mistral's vocabularies
BOS_TOKEN, EOS_TOKEN = 1, 2
# fields of params.json, all of them needed
FIELDS: dict[str, type] = {
    "dim": int,
    "n_layers": int,
    "vocab_size": int,
    "n_groups": int,
    "pad_vocab_size_multiple": int,
    "rms_norm": bool,
    "residual_in_fp32": bool,
    "fused_add_norm": bool,
    "tie_embeddings": bool,
}
# the names of two of them in mamba_ssm's configuration
RENAMED = {"dim": "d_model", "n_layers": "n_layer"}


class CodestralFormat(Format):
    """Mistral's Mamba-2 files → `Mamba2ForCausalLM`."""

    name = "codestral"
    title = "Mamba-Codestral (Mistral's params.json and consolidated.safetensors)"

    def recognises(self, source: "CheckpointSource") -> bool:
        return f"{PREFIX}backbone.embedding.weight" in source

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        params = _params(source)
        plan = plan_mamba_ssm(source, _mamba_ssm_config(params), prefix=PREFIX)
        plan.config.bos_token_id = BOS_TOKEN
        plan.config.eos_token_id = EOS_TOKEN
        unknown = sorted(set(params) - {*FIELDS, "model_type"})
        if unknown:
            plan.notes.append(f"params.json has fields that are not known here, left aside: {', '.join(unknown)}.")
        return plan

    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        return reference_mamba_ssm(source, _mamba_ssm_config(_params(source)), input_ids, prefix=PREFIX)


def _params(source: "CheckpointSource") -> dict[str, Any]:
    if source.params is None:
        raise ConversionError(
            f"{source.location} has the tensors of Mistral's Mamba-2 format but no params.json beside them; put the "
            "model's params.json into the folder."
        )
    return source.params


def _mamba_ssm_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """What mistral-inference builds of `params.json`."""
    kind = params.get("model_type", "mamba")
    if kind != "mamba":
        raise ConversionError(f"params.json: `model_type` must be 'mamba', got {kind!r}.")
    # mistral-inference wants every one of them, so there are no defaults
    values = {name: config_value(params, name, kind, file="params.json") for name, kind in FIELDS.items()}
    config = {RENAMED.get(name, name): value for name, value in values.items() if name != "n_groups"}
    return config | {"ssm_cfg": {"layer": "Mamba2", "ngroups": values["n_groups"]}}
