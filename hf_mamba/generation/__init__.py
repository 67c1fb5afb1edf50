"""How `generate()` uses the recurrent cache."""

from .mixin import RecurrentGenerationMixin

__all__ = ["RecurrentGenerationMixin"]
