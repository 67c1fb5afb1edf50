"""`--verify`: logits of the written model against an independent forward of the source layout, both in fp32 or fp64 on the CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import model_class
from .errors import ConversionError
from .formats.base import ConversionPlan, Format, TensorRule
from .formats.mamba_ssm import MambaSsmFormat
from .report import VerifyResult
from .source import CheckpointSource

__all__ = ["TOLERANCE", "apply_rule", "logits_in_fp64", "verify"]

TOLERANCE = 1e-4
BATCH, LENGTH, SEED = 2, 24, 0


def apply_rule(source: CheckpointSource, rule: TensorRule) -> Tensor:
    """The tensor that `rule` makes of the source, in the source's dtype."""
    tensors = [source.read(key) for key in rule.sources]
    return tensors[0] if rule.build is None else rule.build(*tensors)


@torch.no_grad()
def verify(
    folder: Path,
    source: CheckpointSource,
    form: Format,
    plan: ConversionPlan,
    dtypes: dict[str, torch.dtype],
    to: str,
) -> VerifyResult:
    """Load the result in `folder` and compare its logits with `form.reference_logits` on fixed tokens.

    Logits of published models reach 80, where the rounding of fp32 alone may exceed the tolerance, and rounding may send a token
    to another expert. Differences beyond the tolerance are therefore looked at again in fp64, where none is due to rounding.

    If the result has another dtype than the source, rounding would hide errors. Then every tensor of the result is compared
    with the source's, cast, and the logits are compared with the weights before the cast.

    Args:
        dtypes: the dtype of each tensor of the result, by its key in `plan.rules`.
        to: "hf" or "mamba_ssm", the format of the result.

    Raises:
        ConversionError: logits that differ by more than `TOLERANCE` or are not finite, or tensors that are not the source's.
    """
    cast = any(source.infos[rule.sources[0]].dtype != dtypes[rule.target] for rule in plan.rules)
    model = _load_hf(folder, plan) if to == "hf" else _load_mamba_ssm(folder, plan)
    if cast:
        _restore_precision(model, source, plan, dtypes)
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(0, plan.config.vocab_size, (BATCH, LENGTH), generator=generator)
    logits = model(input_ids, use_cache=False).logits
    reference = form.reference_logits(source, plan, input_ids)
    dtype = "float32"
    if logits.shape == reference.shape and _difference(logits, reference) > TOLERANCE:
        dtype = "float64"
        logits = logits_in_fp64(model, input_ids)
        with source.reading_as(torch.float64):
            reference = form.reference_logits(source, plan, input_ids)
    if logits.shape != reference.shape:
        raise ConversionError(
            f"verification failed: the result gives logits of shape {tuple(logits.shape)}, the source's own layout "
            f"{tuple(reference.shape)}."
        )
    difference, scale = _difference(logits, reference), _largest(reference)
    # not a number is not close
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"verification failed: logits of the result differ from the source's by {difference:.3g} (largest logit "
            f"{scale:.3g}); at most {TOLERANCE:g} is allowed. Nothing was written. If the weights are sound, this is an error "
            "in hf_mamba: please report it."
        )
    return VerifyResult(
        max_difference=difference, max_logit=scale, tokens=input_ids.numel(), dtype=dtype, before_cast=cast
    )


def _difference(logits: Tensor, reference: Tensor) -> float:
    return (logits - reference).abs().max().item()


def _largest(reference: Tensor) -> float:
    return reference.abs().max().item()


def logits_in_fp64(model: Any, input_ids: Tensor) -> Tensor:
    """Logits (batch, length, vocabulary), fp64, of `model`, which is in fp64 afterwards.

    The mixers compute `exp(A_log)` in fp32 whatever their dtype, so an error of about 1e-8 relative to the logits remains.
    """
    for module in model.modules():
        # this switch would round the residual stream
        if getattr(module, "residual_in_fp32", False):
            module.residual_in_fp32 = False
    model.double()
    # not by `model(…)`, which gives logits in fp32: those above 1024 would be rounded by as much as the tolerance
    return model.lm_head(model.backbone(input_ids, use_cache=False).last_hidden_state)


def _load_hf(folder: Path, plan: ConversionPlan) -> Any:
    try:
        model = model_class(plan.config).from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"verification failed: the result cannot be loaded: {error}") from error
    return model.eval()


def _load_mamba_ssm(folder: Path, plan: ConversionPlan) -> Any:
    """The model of a folder in mamba_ssm's format, read back by the converter's own way in."""
    with CheckpointSource(folder) as written:
        back = MambaSsmFormat().plan(written, {})
        model = model_class(back.config)(back.config)
        for rule in back.rules:
            model.get_parameter(rule.target).copy_(apply_rule(written, rule))
    model.tie_weights()
    return model.eval()


def _restore_precision(
    model: Any, source: CheckpointSource, plan: ConversionPlan, dtypes: dict[str, torch.dtype]
) -> None:
    for rule in plan.rules:
        exact = apply_rule(source, rule)
        parameter = model.get_parameter(rule.target)
        if not torch.equal(parameter, exact.to(dtypes[rule.target]).to(parameter.dtype)):
            raise ConversionError(
                f"verification failed: {rule.target!r} of the result is not the source's tensor, cast."
            )
        parameter.copy_(exact)
