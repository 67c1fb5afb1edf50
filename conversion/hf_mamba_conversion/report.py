"""What a conversion found and did."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .formats import FormatOption

__all__ = ["ConversionReport", "VerifyResult"]


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of comparing the result with an independent forward of the source.

    Attributes:
        max_difference: the largest absolute difference of two logits.
        max_logit: the largest absolute logit of the source, for scale.
        tokens: number of positions compared.
        dtype: "float32", or "float64" where the rounding of fp32 alone exceeded the tolerance, as it does with large logits.
        before_cast: the comparison was made with the weights before they were cast to the result's dtype; that the result
            holds exactly those weights, cast, was checked value by value.
    """

    max_difference: float
    max_logit: float
    tokens: int
    dtype: str
    before_cast: bool


@dataclass
class ConversionReport:
    """Everything about one conversion.

    Attributes:
        source: what was given.
        format, title: short and full name of the format that was detected.
        to: "hf" or "mamba_ssm".
        config: the model's configuration.
        target_config: what is written into `config.json`.
        class_name: class that loads the result.
        parameters: number of parameters, a tied head counted once.
        dtypes: dtype of the result → number of tensors.
        nbytes: bytes of all tensors of the result.
        options: the format options that held.
        choices: what each of them could be, and what it is for.
        notes, warnings: sentences for the user.
        command: the command line that does the same.
        destination: the finished folder; None after a dry run.
        inputs, outputs: file name → SHA-256.
        verified: outcome of `verify`, or None.
        url: where the result was pushed to, or None.
    """

    source: str
    format: str
    title: str
    to: str
    config: "PreTrainedConfig"
    target_config: dict[str, Any]
    class_name: str
    parameters: int
    dtypes: dict[str, int]
    nbytes: int
    options: dict[str, str]
    choices: "dict[str, FormatOption]"
    notes: list[str]
    warnings: list[str]
    command: str
    destination: Path | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    verified: VerifyResult | None = None
    url: str | None = None
