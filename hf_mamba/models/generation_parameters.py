"""Whether a configuration holds options of generate(), which transformers wants to know in every call."""

from functools import cache
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

__all__ = ["generation_parameters"]

MAX_REMEMBERED = 256

# classes with the values of such options for which there was nothing to report
_without: set[tuple[Any, ...]] = set()


@cache
def _names() -> tuple[str, ...]:
    return tuple(GenerationConfig._get_default_generation_params())


def generation_parameters(self: PreTrainedConfig) -> dict[str, Any]:
    """`PreTrainedConfig._get_generation_parameters`, asked again only when one of the options has changed.

    Up to 5.23, transformers builds a configuration of default values for the answer: half a millisecond of the time to the first
    token.
    """
    held = vars(self)
    state = (type(self), *((name, repr(held[name])) for name in _names() if held.get(name) is not None))
    if state in _without:
        return {}
    found = PreTrainedConfig._get_generation_parameters(self)
    if not found:
        if len(_without) >= MAX_REMEMBERED:
            _without.clear()
        _without.add(state)
    return found
