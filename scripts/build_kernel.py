"""Build the Hub kernel: the folder that `kernels.get_local_kernel` loads and that a kernel repository on the Hub holds.

    python scripts/build_kernel.py build/mamba-kernels

A copy of `mamba_kernels` for each backend with `layers.py` in it, in the layout of Hugging Face's kernel-builder for kernels
without compiled code (`[torch-noarch]` in kernels/build.toml). The same sources give the same bytes.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["build"]

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# what `kernels` calls a folder of code for every GPU of a backend
VARIANT = "torch-{backend}"


def build(destination: Path) -> list[Path]:
    """Write the kernel repository.

    Args:
        destination: the folder to make; one that an earlier build made is replaced.

    Returns:
        The folder of each backend.

    Raises:
        ValueError: `destination` holds something else, or a source imports what a kernel may not.
    """
    with open(KERNELS / "build.toml", "rb") as file:
        general = tomllib.load(file)["general"]
    files = _sources(general["name"].replace("-", "_"))
    if destination.exists():
        if any(destination.iterdir()) and not (destination / "build.toml").is_file():
            raise ValueError(f"{destination} is not empty and holds no kernel; name another folder.")
        shutil.rmtree(destination)
    destination.mkdir(parents=True)
    shutil.copyfile(KERNELS / "CARD.md", destination / "README.md")
    shutil.copyfile(KERNELS / "build.toml", destination / "build.toml")
    shutil.copyfile(KERNELS.parent / "LICENSE", destination / "LICENSE")
    folders = []
    for backend in general["backends"]:
        folder = destination / "build" / VARIANT.format(backend=backend)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        metadata = json.dumps(_metadata(general, backend, files), indent=2) + "\n"
        (folder / "metadata.json").write_text(metadata, encoding="utf-8")
        folders.append(folder)
    return folders


def _sources(package: str) -> dict[str, bytes]:
    """The package's files with the layers, by path."""
    root = KERNELS / "torch-ext" / package
    paths = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    files["layers.py"] = (KERNELS / "layers.py").read_bytes()
    # the loader looks for the layers as an attribute of the package
    files["__init__.py"] += b"\nfrom . import layers  # noqa: E402, F401\n"
    # the loader gives the package a name of its own, so importing it by its usual name would load another copy
    absolute = re.compile(rb"^\s*(from|import) " + package.encode(), re.MULTILINE)
    wrong = [name for name, content in files.items() if name.endswith(".py") and _code_matches(absolute, content)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must import {package} relatively.")
    return files


def _code_matches(pattern: re.Pattern[bytes], content: bytes) -> bool:
    """Whether a line of code matches; the examples in docstrings are prompts and do not."""
    return any(pattern.match(line) for line in content.splitlines())


def _metadata(general: dict[str, Any], backend: str, files: dict[str, bytes]) -> dict[str, Any]:
    digests = {name: hashlib.sha256(content).digest() for name, content in files.items()}
    whole = hashlib.sha256(b"".join(name.encode() + digest for name, digest in sorted(digests.items()))).hexdigest()
    name = general["name"]
    return {
        "name": name,
        # the name under which the module is imported: other versions may be loaded beside it
        "id": f"_{name.replace('-', '_')}_{backend}_{whole[:12]}",
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, nargs="?", default=Path("build/mamba-kernels"))
    destination = parser.parse_args().destination
    try:
        folders = build(destination)
    except ValueError as error:
        parser.error(str(error))
    for folder in folders:
        print(folder)
    print(f"\nLoad it with kernels.get_local_kernel(Path({str(destination)!r})), or upload it:")
    print(f"hf upload <owner>/{destination.name} {destination}")


if __name__ == "__main__":
    main()
