"""The small language models that ship inside the package."""

from pathlib import Path

__all__ = ["DEMO_CHECKPOINTS", "demo_checkpoint"]

# their names are their model types
DEMO_CHECKPOINTS = ("mamba", "mamba2", "moe_mamba")


def demo_checkpoint(name: str = "mamba2") -> str:
    """Path of a demo checkpoint's folder, for `from_pretrained` and `pipeline`.

    Args:
        name: "mamba", "mamba2" or "moe_mamba", trained on the same tokens with the same active size.

    Raises:
        ValueError: there is no checkpoint of that name.
        FileNotFoundError: the package was installed without its data files.

    Example:
        >>> import hf_mamba
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained(hf_mamba.demo_checkpoint()).model_type
        'mamba2'
    """
    if name not in DEMO_CHECKPOINTS:
        raise ValueError(f"There is no demo checkpoint {name!r}; choose from {', '.join(DEMO_CHECKPOINTS)}.")
    path = Path(__file__).parent / "demo" / name
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"The demo checkpoint is missing at {path}; reinstall hf-mamba.")
    return str(path)
