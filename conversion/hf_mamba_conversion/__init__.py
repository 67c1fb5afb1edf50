"""Checkpoint converters between the dialects of Mamba checkpoints and Hugging Face's format.

`convert()` does everything; `detect()` only says what a checkpoint is.
"""

from pathlib import Path

from .errors import ConversionError, UnsupportedFormatError
from .formats import FORMATS, Format, FormatOption, detect_format
from .pipeline import DTYPES, TARGETS, convert
from .progress import Progress
from .report import ConversionReport, VerifyResult
from .source import CheckpointSource

__all__ = [
    "DTYPES",
    "FORMATS",
    "TARGETS",
    "CheckpointSource",
    "ConversionError",
    "ConversionReport",
    "Format",
    "FormatOption",
    "Progress",
    "UnsupportedFormatError",
    "VerifyResult",
    "convert",
    "detect",
]


def detect(source: str | Path, revision: str | None = None) -> Format:
    """The format of a folder, a weight file or a Hub id; refused formats included, whose `plan` says why.

    Raises:
        ConversionError: the files cannot be read, or no format knows them.
    """
    with CheckpointSource(source, revision=revision) as opened:
        return detect_format(opened)
