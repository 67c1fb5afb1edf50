"""The small language model that ships inside the package."""

from pathlib import Path

__all__ = ["demo_checkpoint"]


def demo_checkpoint() -> str:
    """Path of the demo checkpoint's folder, for `from_pretrained` and `pipeline`.

    Raises:
        FileNotFoundError: the package was installed without its data files.

    Example:
        >>> import hf_mamba
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained(hf_mamba.demo_checkpoint()).model_type
        'mamba2'
    """
    path = Path(__file__).parent / "demo"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"The demo checkpoint is missing at {path}; reinstall hf-mamba.")
    return str(path)
