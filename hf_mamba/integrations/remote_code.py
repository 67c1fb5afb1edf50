"""What a saved model needs to load with hf_mamba, without it, and with `trust_remote_code=True`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..registration import AUTO_CLASSES, MODEL_TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["REMOTE_CODE", "auto_map", "published_config", "shim", "write_shim"]

# the file that `trust_remote_code=True` runs
REMOTE_CODE = "modeling_hf_mamba.py"


def auto_map(model_type: str) -> dict[str, str] | None:
    """Where the classes of a model type are that transformers has no class of its own for; None for the other types."""
    entry = MODEL_TYPES.get(model_type)
    if entry is None or entry.native_config_class is not None:
        return None
    module, prefix = REMOTE_CODE.removesuffix(".py"), entry.config_class.__name__.removesuffix("Config")
    models = {auto_class.__name__: f"{module}.{prefix}{suffix}" for suffix, auto_class in AUTO_CLASSES.items()}
    return {"AutoConfig": f"{module}.{prefix}Config"} | models


def shim(names: Mapping[str, str]) -> str:
    """The file that `names` point into. transformers reads its import and says how to install a package that is missing."""
    classes = ", ".join(sorted({name.split(".")[1] for name in names.values()}))
    return f"from hf_mamba import {classes}  # pip install hf-mamba\n"


def write_shim(config: "PreTrainedConfig", folder: str | os.PathLike) -> None:
    """Write the file that `trust_remote_code=True` runs, beside the configuration of a model type that needs it."""
    folder, names = Path(folder), auto_map(config.model_type)
    # an adapter is saved without a configuration
    if names is not None and (folder / "config.json").is_file():
        (folder / REMOTE_CODE).write_text(shim(names), encoding="utf-8")


@contextmanager
def published_config(config: "PreTrainedConfig") -> Iterator[None]:
    """`config` as it is to be saved: without an instruction for initialising, and with the map to the shim if one is needed.

    `rescale_prenorm_residual` is off in the file: transformers' native classes would apply it again to the weights they load.
    """
    # the package is imported, not copied: transformers would try to copy the file of a class that came through the shim
    values: dict[str, Any] = {"rescale_prenorm_residual": False, "_auto_class": None}
    names = auto_map(config.model_type)
    if names is not None:
        values["auto_map"] = names
    before = {name: config.__dict__[name] for name in values if name in config.__dict__}
    config.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            config.__dict__.pop(name, None)
        config.__dict__.update(before)
