"""What a conversion tells its caller while it runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import ConversionReport

__all__ = ["Progress"]


class Progress:
    """Does nothing; the command line overrides all three methods. An exception raised in one stops the conversion cleanly."""

    def planned(self, report: "ConversionReport") -> None:
        """Format, configuration and parameter count are known; nothing is written yet."""

    def stage(self, title: str, total: int = 0) -> None:
        """A stage begins, with `total` bytes to go through, or 0 if that is unknown."""

    def advance(self, amount: int) -> None:
        """So many bytes more are done."""
