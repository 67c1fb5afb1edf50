"""Checkpoints that are recognised in order to be refused: by name, with the reason, and with what does load them."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import UnsupportedFormatError
from .base import ConversionPlan, Format

if TYPE_CHECKING:
    from ..source import CheckpointSource

__all__ = ["REFUSED", "RefusedFormat"]

Test = Callable[["CheckpointSource"], bool]


class RefusedFormat(Format):
    """A format that no class of hf_mamba can hold."""

    def __init__(self, name: str, title: str, reason: str, way_out: str, test: Test) -> None:
        # class attributes of ordinary formats; here one class serves several
        self.name, self.title = name, title  # type: ignore[misc]
        self.reason, self.way_out, self.test = reason, way_out, test

    def recognises(self, source: "CheckpointSource") -> bool:
        return self.test(source)

    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        raise self.error(source)

    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        raise self.error(source)

    def error(self, source: "CheckpointSource") -> UnsupportedFormatError:
        """What `plan` raises."""
        return UnsupportedFormatError(
            f"{source.location} is a {self.title} checkpoint, which cannot be converted: {self.reason}. {self.way_out}"
        )


def _model_type(*names: str) -> Test:
    def test(source: "CheckpointSource") -> bool:
        return (source.config or {}).get("model_type") in names

    return test


def _has_key(pattern: str) -> Test:
    compiled = re.compile(pattern)

    def test(source: "CheckpointSource") -> bool:
        return any(compiled.fullmatch(key) for key in source.infos)

    return test


def _either(*tests: Test) -> Test:
    return lambda source: any(test(source) for test in tests)


def _native(name: str) -> str:
    return f"transformers' {name} loads it as it is."


HYBRID = "it has attention layers, which no class of hf_mamba has"

REFUSED: tuple[RefusedFormat, ...] = (
    RefusedFormat(
        name="moe_mamba",
        title="MoE-Mamba (hf_mamba's own format)",
        reason="it is in the format that the converters write",
        way_out="AutoModelForCausalLM.from_pretrained loads it after `import hf_mamba`.",
        test=_model_type("moe_mamba"),
    ),
    RefusedFormat(
        name="kyegomez_moe_mamba",
        title="kyegomez/MoE-Mamba",
        reason=(
            "that package is not the paper's model: no norms and no residuals, gates normalised over the batch, and its own "
            "forward fails"
        ),
        way_out="No class loads it; train anew with hf_mamba's MoeMambaForCausalLM.",
        test=_has_key(r"(.*\.)?mamba_block\.ffn_layers\.\d+\.gate\.w_gate\.weight"),
    ),
    RefusedFormat(
        name="jamba",
        title="Jamba",
        reason=f"{HYBRID}, and its norms on dt, B and C have weights",
        way_out=_native("JambaForCausalLM"),
        test=_either(_model_type("jamba"), _has_key(r"model\.layers\.\d+\.mamba\.dt_layernorm\.weight")),
    ),
    RefusedFormat(
        name="zamba",
        title="Zamba",
        reason=f"{HYBRID}, shared between depths",
        way_out=_native("ZambaForCausalLM"),
        test=_model_type("zamba"),
    ),
    RefusedFormat(
        name="zamba2",
        title="Zamba2",
        reason=f"{HYBRID}, shared between depths",
        way_out=_native("Zamba2ForCausalLM"),
        test=_model_type("zamba2"),
    ),
    RefusedFormat(
        name="nemotron_h",
        title="Nemotron-H",
        reason=HYBRID,
        way_out=_native("NemotronHForCausalLM"),
        test=_model_type("nemotron_h", "nemotron-h"),
    ),
    RefusedFormat(
        name="bamba",
        title="Bamba",
        reason=HYBRID,
        way_out=_native("BambaForCausalLM"),
        test=_model_type("bamba"),
    ),
    RefusedFormat(
        name="granitemoehybrid",
        title="Granite 4 (GraniteMoeHybrid)",
        reason=HYBRID,
        way_out=_native("GraniteMoeHybridForCausalLM"),
        test=_model_type("granitemoehybrid"),
    ),
    RefusedFormat(
        name="falcon_h1",
        title="Falcon-H1",
        reason=f"{HYBRID}, in every block beside the Mamba-2 mixer",
        way_out=_native("FalconH1ForCausalLM"),
        test=_model_type("falcon_h1"),
    ),
    RefusedFormat(
        name="caduceus",
        title="Caduceus or PlantCaduceus",
        reason="it reads sequences in both directions, and its weights respect reverse complements",
        way_out="AutoModelForMaskedLM with trust_remote_code=True loads it, with its authors' code.",
        test=_either(
            _model_type("caduceus"),
            _has_key(r".*\.mixer\.(submodule\.)?mamba_(fwd|rev)\..*"),
            _has_key(r"caduceus\..*"),
        ),
    ),
    RefusedFormat(
        name="mamba2attn_remote_code",
        title="OuteAI Mamba2Attn",
        reason=HYBRID,
        way_out="AutoModelForCausalLM with trust_remote_code=True loads it, with its authors' code.",
        test=_either(_model_type("mamba2attn"), lambda source: "mamba2_num_heads" in (source.config or {})),
    ),
    RefusedFormat(
        name="megatron_mamba2",
        title="Megatron-LM Mamba-2 (NVIDIA mamba2-8b, mamba2-hybrid-8b)",
        reason="its layers follow a pattern in Megatron-LM's arguments, with attention and MLP layers among them",
        way_out="Megatron-LM's `ssm` branch loads it.",
        test=_has_key(r"(.*\.)?decoder\.layers\.\d+\.mixer\.dt_bias"),
    ),
)
