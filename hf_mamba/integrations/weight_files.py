"""The files of a saved model or adapter: complete, undamaged, and a clear word when they are not."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = ["check_weight_files", "explain_loading_error", "read_settings", "stored_shapes"]

INDEX = "model.safetensors.index.json"


def read_settings(file: Path) -> dict[str, Any]:
    """The content of config.json and its like.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file: {error}. Save the model anew, or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, from its header."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}


def check_weight_files(folder: str | Path, adapter: bool = False) -> None:
    """Check that every weight file is there and as long as its header says; no tensor is read.

    Args:
        adapter: the weights of a PEFT adapter instead of a model's.

    Raises:
        ValueError: a file is missing or damaged, or the index names one outside the folder.
    """
    folder = Path(folder)
    if adapter:
        names = ["adapter_model.safetensors"]
    elif (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        names = _shards(folder / INDEX)
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; save the model with save_pretrained(), or download it again.")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{folder / name} is damaged, or no safetensors file: {error}. Save the model anew, or download it again."
            ) from error


def _shards(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weight files: {error!r}.") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside or not names:
        raise ValueError(f"{index} must name files of its own folder, got {outside or 'none'}.")
    return names


def explain_loading_error(error: Exception, name: str) -> Exception | None:
    """What `from_pretrained` should say instead of `error`, or None where that says it.

    Args:
        name: the folder or the id on the Hub that was loaded.
    """
    folder = Path(name)
    saved = any((folder / file).is_file() for file in ("model.safetensors", INDEX))
    # what reading the index and opening the files it names raises
    if saved and isinstance(error, SafetensorError | LookupError | json.JSONDecodeError | FileNotFoundError):
        try:
            check_weight_files(folder)
        except ValueError as found:
            return found
    if isinstance(error, SafetensorError):
        return ValueError(f"A weight file of {name!r} is damaged, or no safetensors file: {error}. Download it again.")
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
        return RuntimeError(
            f"size mismatch: config.json and the weights of {name!r} do not belong together; the report above lists the tensors. "
            "Take the configuration that was saved with the weights."
        )
    return None
