"""The result's folder: written under a temporary name beside its place, then renamed, or removed."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConversionError

__all__ = ["check_destination", "check_space", "new_folder"]

# room for configuration, tokenizer and card
SPARE_BYTES = 64 * 2**20


def check_destination(dest: Path, source: Path) -> None:
    """Refuse a `dest` that would overwrite something or lie inside the `source` folder.

    Raises:
        ConversionError: either of the two.
    """
    if dest.exists() and not dest.is_dir():
        raise ConversionError(f"{dest} is a file; give the name of a folder to be made.")
    if dest.is_dir() and any(dest.iterdir()):
        raise ConversionError(f"{dest} exists and is not empty; remove it or give another name.")
    if source.is_dir() and source.resolve() in (dest.resolve(), *dest.resolve().parents):
        raise ConversionError(f"{dest} lies inside the source {source}, which is never changed; give another place.")


def check_space(dest: Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        ConversionError: fewer than `needed` bytes are free.
    """
    existing = next(parent for parent in dest.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        raise ConversionError(
            f"{existing} has {free / 1e9:.1f} GB free, but the result needs {needed / 1e9:.1f} GB; free some space, give "
            "another place, or a smaller dtype."
        )


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A temporary folder beside `dest`, renamed to `dest` if the block succeeds and removed if it raises anything."""
    dest = dest.absolute()
    made = [parent for parent in dest.parents if not parent.exists()]
    temporary = dest.with_name(f".{dest.name}.incomplete-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if dest.exists():
            # an empty folder; not every system renames over one
            dest.rmdir()
        temporary.rename(dest)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
