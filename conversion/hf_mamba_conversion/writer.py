"""Weight files, written one tensor at a time: safetensors shards, and the `.bin` file that mamba_ssm loads."""

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import ConversionError

__all__ = ["BinWriter", "SafetensorsWriter", "TensorSpec", "parse_size"]

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# bytes of the fixed parts of a zip file's headers
CENTRAL_HEADER, LOCAL_HEADER = 46, 30
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shard:
    """A file and what is in it, in the order of its bytes."""

    file: str
    tensors: list[TensorSpec]


class SafetensorsWriter:
    """Writes tensors into `model.safetensors`, or into shards with an index, straight to their place in the file.

    Shapes and dtypes are known beforehand, so a file's header is written first and each tensor follows as it comes;
    at no time is more than one tensor in memory.

    Attributes:
        order: the tensors in the order in which `write` wants them.
        checksums: file name → SHA-256, complete after `close`.
    """

    def __init__(self, folder: Path, tensors: Iterable[TensorSpec], max_shard_size: int) -> None:
        """Plan the shards, none larger than `max_shard_size` bytes unless a single tensor is. Nothing is written yet."""
        self.folder = folder
        self.shards = _split(list(tensors), max_shard_size)
        self.order = [spec for shard in self.shards for spec in shard.tensors]
        self.checksums: dict[str, str] = {}
        self._todo = [(shard, position) for shard in self.shards for position in range(len(shard.tensors))]
        self._next = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor of `order`; its shape and dtype must be those announced."""
        shard, position = self._todo[self._next]
        spec = shard.tensors[position]
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, (
            f"{spec} announced, got {tensor.shape}"
        )
        if position == 0:
            self._file = (self.folder / shard.file).open("xb")
            self._digest = hashlib.sha256()
            self._put(_header(shard.tensors))
        self._put(_bytes(tensor))
        self._next += 1
        if position == len(shard.tensors) - 1:
            self._finish(shard)

    def close(self) -> None:
        """Write the index if there are several shards. Every tensor must have been written."""
        assert self._next == len(self._todo), f"{len(self._todo) - self._next} tensors were not written"
        if len(self.shards) > 1:
            content = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.order)},
                "weight_map": {spec.name: shard.file for shard in self.shards for spec in shard.tensors},
            }
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            file = "model.safetensors.index.json"
            (self.folder / file).write_text(text, encoding="utf-8")
            self.checksums[file] = hashlib.sha256(text.encode()).hexdigest()

    def abort(self) -> None:
        """Close the file being written, if any; what was written is left to whoever removes the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, content: "bytes | memoryview") -> None:
        assert self._file is not None
        self._file.write(content)
        self._digest.update(content)

    def _finish(self, shard: Shard) -> None:
        self.abort()
        self.checksums[shard.file] = self._digest.hexdigest()


class BinWriter:
    """Writes `pytorch_model.bin`, a pickled state dict, with the interface of `SafetensorsWriter`.

    The file is laid out first, without data; then each tensor is copied into its place through a mapping of the file.
    """

    FILE = "pytorch_model.bin"

    def __init__(self, folder: Path, tensors: Iterable[TensorSpec], aliases: Mapping[str, str]) -> None:
        """Plan the file; `aliases` names tensors that share the storage of another one, such as a tied head."""
        self.path = folder / self.FILE
        self.order = list(tensors)
        self.aliases = dict(aliases)
        self.checksums: dict[str, str] = {}
        self._targets: dict[str, Tensor] = {}
        self._records: dict[str, int] = {}
        self._next = 0

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor of `order`; its shape and dtype must be those announced."""
        if self._next == 0:
            self._lay_out()
        spec = self.order[self._next]
        target = self._targets.pop(spec.name)
        assert target.shape == tensor.shape and target.dtype == tensor.dtype, f"{spec} announced, got {tensor.shape}"
        target.copy_(tensor.detach())
        # torch numbers the records of a file in the order of its tensors
        self._records[f"data/{self._next}"] = zlib.crc32(_bytes(tensor))
        self._next += 1

    def close(self) -> None:
        """Finish the file. Every tensor must have been written."""
        assert self._next == len(self.order), f"{len(self.order) - self._next} tensors were not written"
        # the mapping ends when its last tensor goes
        self._targets.clear()
        _set_record_checksums(self.path, self._records)

    def abort(self) -> None:
        """Let go of the file."""
        self._targets.clear()

    def _lay_out(self) -> None:
        import mmap

        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            state: dict[str, Tensor] = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in self.order}
        for alias, name in self.aliases.items():
            state[alias] = state[name]
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, self.path)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            self._targets = torch.load(self.path, mmap=True, weights_only=True)


def _bytes(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16, but every dtype is bytes
    content: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _set_record_checksums(path: Path, checksums: Mapping[str, int]) -> None:
    """Enter the CRC-32 of records that were filled in after torch wrote the archive around them.

    torch does not look at them, but other readers of zip files refuse a record whose checksum is wrong. Each stands twice: in
    the central directory, and in the descriptor that follows the record's data.
    """
    with zipfile.ZipFile(path) as archive:
        entries, position = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(position)
            lengths = struct.unpack("<HHH", file.read(CENTRAL_HEADER)[28:34])
            checksum = checksums.get(entry.filename.partition("/")[2])
            if checksum is not None:
                packed = struct.pack("<I", checksum)
                file.seek(position + 16)
                file.write(packed)
                file.seek(entry.header_offset)
                name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[26:30])
                descriptor = entry.header_offset + LOCAL_HEADER + name + extra + entry.file_size
                file.seek(descriptor)
                if file.read(4) == b"PK\x07\x08":
                    file.seek(descriptor + 4)
                    file.write(packed)
            position += CENTRAL_HEADER + sum(lengths)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number.

    Raises:
        ConversionError: not a positive size.
    """
    text = str(size).strip().upper()
    digits = text.rstrip("KMGIB ")
    unit = text[len(digits) :].strip()
    try:
        value = int(float(digits) * SIZE_UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value < 1:
        raise ConversionError(f"a shard size must be a positive number of bytes such as 5GB or 500MB, got {size!r}.")
    return value


def _split(tensors: list[TensorSpec], max_shard_size: int) -> list[Shard]:
    groups: list[list[TensorSpec]] = [[]]
    room = max_shard_size
    for spec in tensors:
        if groups[-1] and spec.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(spec)
        room -= spec.nbytes
    # wide dtypes first, so that every tensor is aligned to its own width
    ordered = [sorted(group, key=lambda spec: -spec.dtype.itemsize) for group in groups]
    if len(ordered) == 1:
        return [Shard("model.safetensors", ordered[0])]
    return [Shard(f"model-{i:05d}-of-{len(ordered):05d}.safetensors", group) for i, group in enumerate(ordered, 1)]


def _header(tensors: list[TensorSpec]) -> bytes:
    """The head of a safetensors file: length, then names, dtypes, shapes and places as JSON, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in tensors:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
