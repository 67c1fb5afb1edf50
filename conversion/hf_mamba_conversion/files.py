"""The files of a checkpoint: where they are, which of them count, what JSON files say, and checksums."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .hub import download

__all__ = [
    "CARRIED_FILES",
    "WEIGHT_SUFFIXES",
    "choose_weights",
    "download_tokenizer",
    "locate",
    "read_json",
    "sha256",
    "tokenizer_files",
]

# in this order; a folder that has several is read by the first
STANDARD_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
CONFIGURATIONS = ("config.json", "params.json")
CARRIED_FILES = ("generation_config.json",)
TOKENIZER_FILE = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.tiktoken"
    r"|spiece\.model|sentencepiece.*\.model|chat_template\.(jinja|json))"
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# transformers writes an infinite limit as {"__float__": "Infinity"}
SPECIAL_FLOAT = "__float__"


def locate(location: str, revision: str | None) -> Path:
    """The folder or file that `location` names; what is on the Hub is downloaded: configuration, tokenizer, one set of weights.

    Raises:
        ConversionError: there is no such thing, here or on the Hub.
    """
    path = Path(location).expanduser()
    if path.exists():
        if revision is not None:
            raise ConversionError(f"a revision ({revision!r}) has a meaning on the Hub only, but {location} is local.")
        return path
    looks_like_path = location.startswith((".", "/", "~")) or "\\" in location or location.endswith(WEIGHT_SUFFIXES)
    if looks_like_path or HUB_ID.fullmatch(location) is None:
        raise ConversionError(
            f"there is no {location!r}; give a folder, a weight file, or an id on the Hub such as owner/name."
        )
    return download(location, revision, lambda names: _wanted(location, names))


def _wanted(place: str, names: list[str]) -> list[str]:
    """The files of a repository that a conversion needs."""
    weights = _choose_name(place, names)
    needed = {weights, *CONFIGURATIONS, *CARRIED_FILES}
    return [name for name in names if name in needed or TOKENIZER_FILE.fullmatch(name) or _is_shard_of(name, weights)]


def download_tokenizer(repo_id: str) -> Path:
    """Folder with the tokenizer's files of a repository on the Hub.

    Raises:
        ConversionError: no such repository, or no connection and nothing in the cache.
    """
    return download(repo_id, None, lambda names: [name for name in names if TOKENIZER_FILE.fullmatch(name)])


def choose_weights(folder: Path) -> Path:
    """The weight file of a folder, or the index of its shards.

    Raises:
        ConversionError: there is none, or several and no way to tell which.
    """
    return folder / _choose_name(str(folder), [path.name for path in folder.iterdir() if path.is_file()])


def _choose_name(place: str, names: list[str]) -> str:
    """The one file, or index, that holds the weights among these names."""
    for name in STANDARD_NAMES:
        if name in names:
            return name
    candidates = sorted(name for name in names if name.endswith((*WEIGHT_SUFFIXES, ".index.json")))
    indexes = [name for name in candidates if name.endswith(".index.json")]
    if len(indexes) == 1:
        return indexes[0]
    if not candidates:
        raise ConversionError(f"{place} has no weights: no {', '.join(WEIGHT_SUFFIXES)} file in it.")
    if len(candidates) > 1:
        raise ConversionError(
            f"{place} has several weight files and no index ({', '.join(candidates[:5])}); give the one to convert."
        )
    return candidates[0]


def _is_shard_of(name: str, index: str) -> bool:
    stem, _, suffix = index.removesuffix(".index.json").partition(".")
    return index.endswith(".index.json") and re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}", name) is not None


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer, and of generation settings, directly in `folder`."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and (TOKENIZER_FILE.fullmatch(path.name) or path.name in CARRIED_FILES)
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a key given twice is an error, as one of the two values would be lost.

    Raises:
        ConversionError: not JSON, not an object, or a key given twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        if len(pairs) == 1 and pairs[0][0] == SPECIAL_FLOAT:
            return float(pairs[0][1])
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConversionError(f"{file} has the key {key!r} twice; only one of the two can be right.")
            found[key] = value
        return found

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ConversionError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}; expected an object.")
    return content


def sha256(file: Path, advance: Callable[[int], None] | None = None) -> str:
    """Checksum of a file in hexadecimal; `advance` is told the bytes read since the last call."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()
