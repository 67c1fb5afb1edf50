"""Checks of configuration values, made when a configuration is built: before any memory is allocated for it."""

import functools

from huggingface_hub.errors import StrictDataclassError

__all__ = ["check_choice", "check_common_fields", "check_positive", "plain_errors"]

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
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}: `{name}` must be a positive integer, got {value!r}.")


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
    if not 0 < config.time_step_min <= config.time_step_max:
        raise ValueError(
            f"{name}: `time_step_min` and `time_step_max` must satisfy 0 < min <= max, "
            f"got {config.time_step_min} and {config.time_step_max}."
        )
    if config.layer_norm_epsilon <= 0:
        raise ValueError(f"{name}: `layer_norm_epsilon` must be positive, got {config.layer_norm_epsilon}.")
