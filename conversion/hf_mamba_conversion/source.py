"""A checkpoint on disk or on the Hub: its configuration, the names and shapes of its tensors, and lazy reading of each.

Nothing is trusted: pickles are opened with `weights_only=True`, an index may name only files beside it, and names, shapes
and dtypes are known, and checked against the index, before a weight is read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import ConversionError

__all__ = ["CARRIED_FILES", "CheckpointSource", "TensorInfo", "download_tokenizer", "sha256", "tokenizer_files"]

# in this order; a folder that has several is read by the first
STANDARD_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "consolidated.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# dictionaries in which training programs wrap their state dict
CONTAINER_KEYS = ("model", "state_dict", "model_state", "model_state_dict", "module")
MAX_CONTAINER_DEPTH = 3
TOKENIZER_FILE = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|.*\.tiktoken"
    r"|spiece\.model|sentencepiece.*\.model|chat_template\.(jinja|json))"
)
CARRIED_FILES = ("generation_config.json",)
# transformers writes an infinite limit as {"__float__": "Infinity"}
SPECIAL_FLOAT = "__float__"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class CheckpointSource:
    """A checkpoint that can be read tensor by tensor. A context manager; `close()` gives the files back.

    Attributes:
        location: what the user gave.
        folder: where configuration and tokenizer are looked for.
        weight_files: the files that hold the weights, in order.
        config: content of `config.json`, or None where there is none.
        params: content of `params.json` (Mistral's configuration), or None.
        infos: shape and dtype of each tensor by its key.
        container: keys under which the state dict lay in the file, such as ("model",).
        siblings: the other keys beside the state dict, such as {"optimizer", "step"}.
        warnings: oddities that do not prevent reading.
    """

    def __init__(self, location: str | Path, revision: str | None = None) -> None:
        """Open `location`: a folder, a file, or an id on the Hub (`revision` is its branch, tag or commit).

        Raises:
            ConversionError: nothing there, no weights or several candidates, or files that are damaged or unsafe.
        """
        self.location = str(location)
        self.warnings: list[str] = []
        self.infos: dict[str, TensorInfo] = {}
        self.container: tuple[str, ...] = ()
        self.siblings: frozenset[str] = frozenset()
        self._read_as: torch.dtype | None = None
        self._readers: dict[str, Callable[[], Tensor]] = {}
        self._open_files = ExitStack()
        path = _locate(self.location, revision)
        self.folder = path if path.is_dir() else path.parent
        self.config = _read_config(self.folder / "config.json")
        self.params = _read_config(self.folder / "params.json")
        try:
            self.weight_files = self._open_weights(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "CheckpointSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def close(self) -> None:
        """Give the files back."""
        self._readers.clear()
        self._open_files.close()

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU; mapped from the file where the format allows it, so do not write into it."""
        if name not in self._readers:
            raise ConversionError(f"{self.location} has no tensor {name!r}.")
        tensor = self._readers[name]()
        return tensor if self._read_as is None else tensor.to(self._read_as)

    @contextmanager
    def reading_as(self, dtype: torch.dtype) -> Iterator[None]:
        """Within the block, `read` gives every tensor in `dtype`."""
        self._read_as = dtype
        try:
            yield
        finally:
            self._read_as = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`.

        Raises:
            ConversionError: there is no such tensor.
        """
        if name not in self.infos:
            raise ConversionError(f"{self.location} has no tensor {name!r}, which this format needs.")
        return self.infos[name].shape

    def _open_weights(self, path: Path) -> list[Path]:
        file = _choose_weights(path) if path.is_dir() else path
        if file.name.endswith(".index.json"):
            return self._open_shards(file)
        self._open_file(file)
        return [file]

    def _open_file(self, file: Path) -> None:
        if file.suffix not in WEIGHT_SUFFIXES:
            raise ConversionError(
                f"{file} is no weight file; expected one of {', '.join(WEIGHT_SUFFIXES)}, an index, or a folder."
            )
        if file.suffix == ".safetensors":
            self._open_safetensors(file)
        else:
            self._open_pickle(file)

    def _open_shards(self, index: Path) -> list[Path]:
        content = _read_json(index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index.name} has no `weight_map`; it is not a shard index.")
        suffix = Path(index.name.removesuffix(".index.json")).suffix
        names = []
        for key, name in weight_map.items():
            _check_shard_name(index, key, name, suffix)
            if name not in names:
                names.append(name)
        missing = [name for name in names if not (index.parent / name).is_file()]
        if missing:
            raise ConversionError(
                f"{index.name} names {len(missing)} file(s) that are not in {index.parent}: {', '.join(missing[:5])}. "
                "Download the checkpoint again."
            )
        for name in names:
            before = set(self.infos)
            self._open_file(index.parent / name)
            held = set(self.infos) - before
            listed = {key for key, file in weight_map.items() if file == name}
            if held - listed:
                extra = sorted(held - listed)[0]
                raise ConversionError(f"{name} holds the tensor {extra!r}, which {index.name} does not list there.")
            if listed - held:
                absent = sorted(listed - held)[0]
                raise ConversionError(f"{index.name} places the tensor {absent!r} in {name}, but it is not there.")
        metadata = content.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        actual = sum(info.nbytes for info in self.infos.values())
        if total is not None and total != actual:
            self.warnings.append(f"{index.name} gives a total size of {total} bytes; the tensors have {actual}.")
        return [index.parent / name for name in names]

    def _open_safetensors(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle: Any = self._open_files.enter_context(safe_open(str(file), framework="pt"))
            for name in handle.keys():
                view = handle.get_slice(name)
                kind = view.get_dtype()
                if kind not in SAFETENSORS_DTYPES:
                    raise ConversionError(f"{file.name}: the tensor {name!r} has the unknown dtype {kind!r}.")
                dtype = SAFETENSORS_DTYPES[kind]
                shape = tuple(view.get_shape())
                self._add(file, name, shape, dtype, partial(handle.get_tensor, name))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file} cannot be read: {error}. Is it truncated? Download it again.") from error

    def _open_pickle(self, file: Path) -> None:
        content = self._load_pickle(file)
        container: list[str] = []
        siblings: set[str] = set()
        for _ in range(MAX_CONTAINER_DEPTH):
            inner = [key for key in CONTAINER_KEYS if isinstance(content, dict) and isinstance(content.get(key), dict)]
            if not inner:
                break
            container.append(inner[0])
            siblings |= {str(key) for key in content if key != inner[0]}
            content = content[inner[0]]
        if not isinstance(content, dict) or not content:
            raise ConversionError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors.")
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ConversionError(
                    f"{file.name}: entry {name!r} is a {type(value).__name__}, not a tensor; expected a state dict."
                )
            if value.layout is not torch.strided or value.is_quantized:
                raise ConversionError(
                    f"{file.name}: the tensor {name!r} is sparse or quantized; expected a plain one."
                )
            self._add(file, name, tuple(value.shape), value.dtype, value.detach)
        self.container = tuple(container)
        self.siblings = frozenset(siblings)

    def _load_pickle(self, file: Path) -> Any:
        import pickle

        # files in the format from before torch 1.6 cannot be mapped
        with file.open("rb") as opened:
            is_zip = opened.read(4) == b"PK\x03\x04"
        if not is_zip:
            self.warnings.append(
                f"{file.name} has the format from before torch 1.6, so all of it was loaded into memory."
            )
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), str(error).splitlines()[0])
            raise ConversionError(
                f"{file} is refused: it is damaged, or holds more than tensors and plain values and could run code when "
                f"opened ({reason.strip()}). Save only the state dict, with torch.save(model.state_dict(), path)."
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(f"{file} cannot be read: {reason}. Is it truncated? Download it again.") from error

    def _add(
        self, file: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, reader: Callable[[], Tensor]
    ) -> None:
        if name in self.infos:
            raise ConversionError(f"the tensor {name!r} is in {file.name} and in another file as well.")
        size = dtype.itemsize
        for length in shape:
            size *= length
        self.infos[name] = TensorInfo(shape, dtype, size)
        self._readers[name] = reader


def sha256(file: Path, advance: Callable[[int], None] | None = None) -> str:
    """Checksum of a file in hexadecimal; `advance` is told the bytes read since the last call."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a tokenizer, and of generation settings, directly in `folder`."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and (TOKENIZER_FILE.fullmatch(path.name) or path.name in CARRIED_FILES)
    )


def _locate(location: str, revision: str | None) -> Path:
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
    return _download(location, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    """Folder with the configuration, the tokenizer and one set of weights of a repository on the Hub."""
    names = _names_on_hub(repo_id, revision)
    if names is None:
        return _snapshot(repo_id, revision, wanted=None)
    weights = _choose_name(repo_id, names)
    configurations = ("config.json", "params.json", *CARRIED_FILES)
    return _snapshot(
        repo_id,
        revision,
        wanted=[
            name
            for name in names
            if name == weights
            or name in configurations
            or TOKENIZER_FILE.fullmatch(name)
            or _is_shard_of(name, weights)
        ],
    )


def download_tokenizer(repo_id: str) -> Path:
    """Folder with the tokenizer's files of a repository on the Hub.

    Raises:
        ConversionError: no such repository, or no connection and nothing in the cache.
    """
    names = _names_on_hub(repo_id, None)
    return _snapshot(repo_id, None, None if names is None else [n for n in names if TOKENIZER_FILE.fullmatch(n)])


def _names_on_hub(repo_id: str, revision: str | None) -> list[str] | None:
    """Files at the top of a repository, or None without a connection: then the cache may have them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        names = HfApi().list_repo_files(repo_id, revision=revision)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _not_on_hub(repo_id, error) from error
    except Exception:  # every version of huggingface_hub has another HTTP client, with its own connection errors
        return None
    return [name for name in names if "/" not in name]


def _snapshot(repo_id: str, revision: str | None, wanted: list[str] | None) -> Path:
    """Download the files `wanted`; None: take what the cache has."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=wanted, local_files_only=wanted is None)
        )
    except (OSError, ValueError) as error:
        raise _not_on_hub(repo_id, error) from error


def _not_on_hub(repo_id: str, error: Exception) -> ConversionError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConversionError(f"{repo_id!r} is no folder or file here and cannot be had from the Hub: {reason}")


def _is_shard_of(name: str, index: str) -> bool:
    stem, _, suffix = index.removesuffix(".index.json").partition(".")
    return index.endswith(".index.json") and re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name) is not None


def _choose_weights(folder: Path) -> Path:
    return folder / _choose_name(str(folder), [path.name for path in folder.iterdir() if path.is_file()])


def _choose_name(place: str, names: Iterable[str]) -> str:
    """The one file, or index, that holds the weights among these names."""
    present = [name for name in names if "/" not in name]
    for name in STANDARD_NAMES:
        if name in present:
            return name
    candidates = sorted(name for name in present if name.endswith((*WEIGHT_SUFFIXES, ".index.json")))
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


def _check_shard_name(index: Path, key: str, name: Any, suffix: str) -> None:
    plain = (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
        and "\0" not in name
    )
    if not plain:
        raise ConversionError(
            f"{index.name} places the tensor {key!r} in {name!r}, which is not the name of a file beside it; refused."
        )
    if not name.endswith(suffix):
        raise ConversionError(f"{index.name} places the tensor {key!r} in {name!r}; expected a {suffix} file.")


def _read_config(file: Path) -> dict[str, Any] | None:
    return _read_json(file) if file.is_file() else None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; a key given twice is an error, as one of the two values would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        if len(pairs) == 1 and pairs[0][0] == SPECIAL_FLOAT:
            return float(pairs[0][1])
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConversionError(f"{file} has the key {key!r} twice.")
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
