"""What every source format offers: recognise a checkpoint, plan its conversion, compute its logits independently."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..errors import ConversionError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..source import CheckpointSource

__all__ = ["ConversionPlan", "Format", "FormatOption", "TensorRule", "config_count", "config_value", "make_config"]

Shape = tuple[int, ...]

# of layers, or of experts in one: what a file claims beyond this would only fill the memory with names
MAX_COUNT = 10_000


@dataclass(frozen=True)
class TensorRule:
    """How one tensor of the result is made. The pipeline reads, builds, casts and writes one rule at a time.

    Attributes:
        target: key in the result, as in the `state_dict` that `save_pretrained` writes.
        sources: keys of the source, in the order in which `build` takes them.
        shape: shape of the result.
        source_shapes: shape of each source; checked against the files before anything is read.
        build: makes the result from the source tensors, in their dtype; None: the only source is taken as it is.
    """

    target: str
    sources: tuple[str, ...]
    shape: Shape
    source_shapes: tuple[Shape, ...]
    build: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        assert len(self.sources) == len(self.source_shapes), f"{self.target}: a shape for each source"
        assert self.build is not None or self.source_shapes == (self.shape,), f"{self.target}: a copy keeps its shape"


@dataclass
class ConversionPlan:
    """Everything that is decided before the first weight is read.

    Attributes:
        config: configuration of the result.
        rules: one for each tensor of the result.
        derivable: source key -> source key that it must be equal to, for tensors that are not written because the
            result derives them (a tied head). Checked while converting.
        ignored: source key -> why its content does not matter (a buffer that is computed, say).
        notes: sentences for the user: what was inferred, what is uncertain.
        options: the format options that hold, defaults filled in.
    """

    config: "PreTrainedConfig"
    rules: list[TensorRule]
    derivable: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FormatOption:
    """A choice that no file of the format decides, such as an activation. The first of `choices` is the default."""

    choices: tuple[str, ...]
    help: str


class Format(ABC):
    """One dialect of checkpoints.

    Attributes:
        name: short, such as "mamba_ssm".
        title: for people, such as "mamba_ssm (state-spaces/mamba)".
        options: what the user may choose with `--option NAME=VALUE`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[Mapping[str, FormatOption]] = {}

    @abstractmethod
    def recognises(self, source: "CheckpointSource") -> bool:
        """Whether keys and configuration of `source` are this format's. Reads no weights and raises nothing."""

    @abstractmethod
    def plan(self, source: "CheckpointSource", options: Mapping[str, str]) -> ConversionPlan:
        """Decide configuration and tensors of the result from names, shapes and configuration alone.

        Not to be done here: the pipeline checks that every source tensor is in a rule, `derivable` or `ignored`, that the
        sources of each rule exist with the right shapes, and that the rules are exactly the parameters of `config`'s model.

        Args:
            source: the checkpoint.
            options: one value for each entry of `self.options` (see `resolve_options`).

        Raises:
            ConversionError: a configuration that is incomplete, contradictory or not representable.
        """

    @abstractmethod
    def reference_logits(self, source: "CheckpointSource", plan: ConversionPlan, input_ids: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary), fp32, of the source's model, from the source's own tensors and configuration.

        Plain torch, without any class or op of hf_mamba, so that it can prove a conversion wrong. Computed in fp32, or in
        fp64 where `source` gives its tensors so (see `plain_mamba.precise`). Of `plan` only `options` may be read.
        `input_ids` is (batch, length), int64.
        """

    def resolve_options(self, given: Mapping[str, str]) -> dict[str, str]:
        """`given` checked, with the defaults filled in.

        Raises:
            ConversionError: an option that the format does not have, or a value that is none of its choices.
        """
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ConversionError(f"the format {self.name} has no option {unknown[0]!r}; its options: {known}.")
        for name, value in given.items():
            if value not in self.options[name].choices:
                raise ConversionError(
                    f"option {name!r} must be one of {', '.join(self.options[name].choices)}, got {value!r}."
                )
        return {name: given.get(name, option.choices[0]) for name, option in self.options.items()}


def config_value(
    config: Mapping[str, Any], key: str, kind: type, default: Any = None, file: str = "config.json"
) -> Any:
    """`config[key]` checked to be of type `kind`; `default` where it is missing.

    Args:
        file: where `config` was read, for messages.

    Raises:
        ConversionError: missing without a default, or of another type.
    """
    value = config.get(key, default)
    if value is None and key not in config:
        raise ConversionError(f"{file} has no {key!r}, which this format needs; is it the right {file}?")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConversionError(f"{file}: {key!r} must be {kind.__name__}, got {value!r}.")
    return value


def config_count(config: Mapping[str, Any], key: str, least: int = 1, default: int | None = None) -> int:
    """`config[key]` checked to be a possible number of layers or experts, `least` or more.

    Raises:
        ConversionError: missing without a default, no integer, or out of range.
    """
    value: int = config_value(config, key, int, default)
    if not least <= value <= MAX_COUNT:
        raise ConversionError(f"config.json: {key!r} must be from {least} to {MAX_COUNT}, got {value}.")
    return value


def make_config(maker: Callable[..., "PreTrainedConfig"], *args: Any, **fields: Any) -> "PreTrainedConfig":
    """`maker(*args, **fields)`, a configuration of the result from what a source says of itself.

    Raises:
        ConversionError: the values describe no model.
    """
    try:
        return maker(*args, **fields)
    # transformers raises the last two for a `dtype` that is none
    except (TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
        raise ConversionError(f"the checkpoint's configuration does not describe a model: {error}") from error
