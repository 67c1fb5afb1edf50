"""What a conversion raises when it cannot go on."""

__all__ = ["ConversionError", "UnsupportedFormatError"]


class ConversionError(ValueError):
    """A checkpoint that cannot be read, planned, converted or verified. The message names the tensor or file and the way out."""


class UnsupportedFormatError(ConversionError):
    """A checkpoint that was recognised but that no class of hf_mamba can hold."""
