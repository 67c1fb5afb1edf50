"""Checks of configuration values, made when a configuration is built: before any memory is allocated for it."""

import functools
import math

from huggingface_hub.errors import StrictDataclassError

__all__ = ["check_choice", "check_common_fields", "check_finite", "check_positive", "plain_errors"]

# no tensor has a dimension of this size: such a value is a mistake, and building the model would exhaust the memory
MAX_SIZE = 2**31
# building even empty layers takes time and memory for each of them; published models have at most some hundreds
MAX_LAYERS = 2**14

POSITIVE_FIELDS = ("vocab_size", "hidden_size", "state_size", "num_hidden_layers", "expand", "conv_kernel")


def plain_errors(cls):
    """Class decorator: turn transformers' dataclass errors, which are plain `Exception`s, into `ValueError`s."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        try:
            original(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    cls.__init__ = __init__
    return cls


def check_positive(config, *names: str) -> None:
    """Raise ValueError unless every named field is an integer above zero."""
    for name in names:
        value = getattr(config, name)
        limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < limit:
            raise ValueError(
                f"{type(config).__name__}: `{name}` must be a positive integer below 2**{limit.bit_length() - 1}, got {value!r}."
            )


def check_finite(config, *names: str, minimum: float, above: bool = False) -> None:
    """Raise ValueError unless every named field is a finite number from `minimum` up, or `above` it."""
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < minimum or (above and value == minimum):
            bound = f"{'above' if above else 'from'} {minimum:g}{'' if above else ' up'}"
            raise ValueError(f"{type(config).__name__}: `{name}` must be a finite number {bound}, got {value!r}.")


def check_choice(config, name: str, choices) -> None:
    """Raise ValueError unless the field is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(
            f"{type(config).__name__}: `{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}."
        )


def check_common_fields(config) -> None:
    """Check the fields that Mamba, Mamba-2, Falcon-Mamba and MoE-Mamba share."""
    # importing the table of activations pulls in all of transformers' modeling code
    from transformers.activations import ACT2FN

    check_positive(config, *POSITIVE_FIELDS)
    check_choice(config, "hidden_act", tuple(ACT2FN))
    name = type(config).__name__
    rank = config.time_step_rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{name}: `time_step_rank` must be a positive integer or 'auto', got {rank!r}.")
    check_finite(config, "time_step_min", "time_step_max", "layer_norm_epsilon", minimum=0.0, above=True)
    check_finite(config, "time_step_floor", minimum=0.0)
    if config.time_step_min > config.time_step_max:
        raise ValueError(
            f"{name}: `time_step_min` must not be above `time_step_max`, "
            f"got {config.time_step_min} and {config.time_step_max}."
        )
    if hasattr(config, "time_step_scale"):
        check_finite(config, "time_step_scale", minimum=0.0, above=True)
    if hasattr(config, "initializer_range"):
        check_finite(config, "initializer_range", minimum=0.0)
    if hasattr(config, "intermediate_size"):
        check_positive(config, "intermediate_size")
