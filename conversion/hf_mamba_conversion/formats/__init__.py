"""The source formats, in the order in which they are tried: narrow evidence before wide."""

from ..errors import ConversionError
from ..source import CheckpointSource
from .base import ConversionPlan, Format, FormatOption, TensorRule
from .blackmamba import BlackMambaFormat
from .codestral import CodestralFormat
from .huggingface import HuggingFaceFormat
from .llm_random import LlmRandomFormat
from .mamba_ssm import MambaSsmFormat
from .mamba_ssm_moe import MambaSsmMoeFormat
from .refused import REFUSED

__all__ = ["FORMATS", "ConversionPlan", "Format", "FormatOption", "TensorRule", "detect_format"]

FORMATS: tuple[Format, ...] = (
    *REFUSED,
    HuggingFaceFormat(),
    CodestralFormat(),
    LlmRandomFormat(),
    BlackMambaFormat(),
    MambaSsmMoeFormat(),
    MambaSsmFormat(),
)


def detect_format(source: CheckpointSource) -> Format:
    """The format of an opened checkpoint; refused formats included, which say why when asked for a plan.

    Raises:
        ConversionError: no format knows these names.
    """
    for form in FORMATS:
        if form.recognises(source):
            return form
    shown = ", ".join(sorted(source.infos)[:4])
    kind = (source.config or {}).get("model_type")
    known = ", ".join(form.name for form in FORMATS if form not in REFUSED)
    raise ConversionError(
        f"{source.location} is in no format known here (known: {known}). "
        f"Its config.json says model_type {kind!r}; its tensors begin with {shown}."
    )
