"""A checkpoint on disk or on the Hub: its configuration, the names and shapes of its tensors, and lazy reading of each.

Nothing is trusted: pickles are opened with `weights_only=True`, an index may name only files beside it, and names, shapes
and dtypes are known, and checked against the index, before a weight is read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import ConversionError
from .files import WEIGHT_SUFFIXES, choose_weights, locate, read_json

__all__ = ["CheckpointSource", "TensorInfo"]

# dictionaries in which training programs wrap their state dict
CONTAINER_KEYS = ("model", "state_dict", "model_state", "model_state_dict", "module")
MAX_CONTAINER_DEPTH = 3

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
        path = locate(self.location, revision)
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
        file = choose_weights(path) if path.is_dir() else path
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
        content = read_json(index)
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
                raise ConversionError(
                    f"{name} holds the tensor {extra!r}, which {index.name} does not list there; are they of one checkpoint?"
                )
            if listed - held:
                absent = sorted(listed - held)[0]
                raise ConversionError(
                    f"{index.name} places the tensor {absent!r} in {name}, but it is not there; are they of one checkpoint?"
                )
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
                    f"{file.name}: entry {name!r} is of type {type(value).__name__}, not a tensor; expected a state dict."
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
            lines = str(error).splitlines()
            reason = next((line for line in lines if "GLOBAL" in line), lines[0]).strip().rstrip(".")
            raise ConversionError(
                f"{file} is refused: it is damaged, or holds more than tensors and plain values and could run code when "
                f"opened ({reason}). Save only the state dict, with torch.save(model.state_dict(), path)."
            ) from error
        except Exception as error:  # in a damaged file the unpickler stumbles over anything
            # torch's first sentence says what is wrong, those after it guess why
            reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
            raise ConversionError(f"{file} cannot be read: {reason}. Is it truncated? Download it again.") from error

    def _add(
        self, file: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, reader: Callable[[], Tensor]
    ) -> None:
        if name in self.infos:
            raise ConversionError(
                f"the tensor {name!r} is in {file.name} and in another file as well; only one of the two can be right, so one "
                "file must go."
            )
        size = dtype.itemsize
        for length in shape:
            size *= length
        self.infos[name] = TensorInfo(shape, dtype, size)
        self._readers[name] = reader


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
    return read_json(file) if file.is_file() else None
