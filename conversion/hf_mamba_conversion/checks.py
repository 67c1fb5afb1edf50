"""Checks of a plan against the files and against the model, all before a weight is read."""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConversionError
from .formats.base import ConversionPlan, TensorRule
from .source import CheckpointSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FLOATING_DTYPES", "check_plan", "kept_in_fp32", "model_class", "target_dtype"]

FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 5


def model_class(config: "PreTrainedConfig") -> Any:
    """The class of hf_mamba with a language-model head for `config`."""
    import hf_mamba

    name = type(config).__name__.removesuffix("Config")
    return getattr(hf_mamba, f"{name}ForCausalLM")


def check_plan(source: CheckpointSource, plan: ConversionPlan) -> int:
    """Check that plan, files and model fit together; the number of parameters, a tied head counted once.

    Raises:
        ConversionError: a tensor that is missing, unaccounted for, of the wrong shape or not floating point; names each.
    """
    _check_accounting(source, plan)
    for rule in plan.rules:
        _check_rule(source, rule)
    return _check_model(plan)


def _check_accounting(source: CheckpointSource, plan: ConversionPlan) -> None:
    uses = Counter(key for rule in plan.rules for key in rule.sources)
    missing = sorted(key for key in {*uses, *plan.derivable.values()} if key not in source)
    if missing:
        raise ConversionError(
            f"{source.location} lacks {len(missing)} tensor(s) that its configuration calls for: {_some(missing)}. "
            "Is the download complete, and config.json the right one?"
        )
    extra = sorted(set(source.infos) - set(uses) - set(plan.derivable) - set(plan.ignored))
    if extra:
        raise ConversionError(
            f"{source.location} has {len(extra)} tensor(s) that its format and configuration do not explain: {_some(extra)}. "
            "Converting would lose them; is config.json the right one?"
        )
    for key, original in plan.derivable.items():
        if key in source and source.infos[key] != source.infos[original]:
            raise ConversionError(
                f"{key!r} should equal {original!r}, but has {_describe(source, key)} instead of "
                f"{_describe(source, original)}."
            )


def _check_rule(source: CheckpointSource, rule: TensorRule) -> None:
    for key, shape in zip(rule.sources, rule.source_shapes, strict=True):
        info = source.infos[key]
        if info.shape != shape:
            raise ConversionError(
                f"the tensor {key!r} has shape {info.shape}, but the configuration calls for {shape}. "
                "Is config.json the right one?"
            )
        if info.dtype not in FLOATING_DTYPES:
            raise ConversionError(
                f"the tensor {key!r} has dtype {_dtype_name(info.dtype)}; expected one of "
                f"{', '.join(map(_dtype_name, FLOATING_DTYPES))}. Quantized checkpoints cannot be converted: take the original."
            )
    dtypes = {source.infos[key].dtype for key in rule.sources}
    if len(dtypes) > 1:
        raise ConversionError(
            f"{rule.target!r} is made of tensors of several dtypes ({', '.join(sorted(map(_dtype_name, dtypes)))}), of which "
            f"{rule.sources[0]!r} is one; cast the checkpoint to one dtype first."
        )


def _check_model(plan: ConversionPlan) -> int:
    with torch.device("meta"):
        model = model_class(plan.config)(plan.config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if plan.config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    given = {rule.target: rule.shape for rule in plan.rules}
    if len(given) != len(plan.rules) or given != wanted:
        odd = sorted(given.items() ^ wanted.items())
        raise ConversionError(
            f"the plan does not make the tensors of {type(model).__name__} ({_some([name for name, _ in odd])}). This is an "
            "error in hf_mamba; please report it with the checkpoint's config.json."
        )
    return parameters


def kept_in_fp32(config: "PreTrainedConfig", name: str) -> bool:
    """Whether the model computes with this tensor in fp32 whatever its dtype, so that casting it would lose precision."""
    patterns = model_class(config)._keep_in_fp32_modules_strict
    return any(re.search(rf"(^|\.){re.escape(pattern)}($|\.)", name) for pattern in patterns)


def target_dtype(
    source: CheckpointSource, config: "PreTrainedConfig", rule: TensorRule, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype in which a rule's result is written: that of the source unless `dtype` asks for another."""
    given = source.infos[rule.sources[0]].dtype
    if dtype is None:
        return given
    if dtype.itemsize < 4 and kept_in_fp32(config, rule.target):
        return given if given.itemsize <= 4 else torch.float32
    return dtype


def _describe(source: CheckpointSource, key: str) -> str:
    return f"shape {source.infos[key].shape} and dtype {_dtype_name(source.infos[key].dtype)}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
