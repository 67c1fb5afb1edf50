"""Settings of our kernels to compare with the shipped ones: `python -m benchmarks ops --variants`.

A setting that wins on the rows of its op goes into the tuning table of the kernel, and its line here goes.
"""

from typing import Any

from benchmarks.op_contenders import OURS, Implementation, implementation

__all__ = ["VARIANTS", "variant", "variants_of"]

Settings = tuple[tuple[str, str, Any], ...]

# op: what differs, and the module attributes that make it so: (module, attribute, value)
VARIANTS: dict[str, dict[str, Settings]] = {}


def variants_of(op: str) -> list[str]:
    """Contender names of the variants of an op."""
    return [f"{OURS}: {name}" for name in VARIANTS.get(op, {})]


def variant(op: str, contender: str) -> Implementation | None:
    """Our implementation with the settings of one of `variants_of(op)`; None for another contender."""
    settings = VARIANTS.get(op, {}).get(contender.removeprefix(f"{OURS}: "))
    ours = implementation(op, OURS)
    if settings is None or ours is None:
        return None
    return Implementation(contender, ours.call, settings=settings)
