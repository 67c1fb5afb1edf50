"""Print the oldest versions that pyproject.toml allows as exact pins, for `make test-oldest`."""

import argparse
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["oldest"]


def oldest(requirement: str) -> str:
    """`name>=1.2; marker` as `name==1.2; marker`.

    Raises:
        ValueError: the requirement has no lower bound, so there is no oldest version to test.
    """
    parsed = Requirement(requirement)
    bounds = [specifier.version for specifier in parsed.specifier if specifier.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"pyproject.toml: {requirement!r} needs exactly one lower bound (>=), found {len(bounds)}.")
    marker = f"; {parsed.marker}" if parsed.marker else ""
    return f"{parsed.name}=={bounds[0]}{marker}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", help="this requirement in place of the oldest torch, such as torch==2.13.0")
    arguments = parser.parse_args()
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    for requirement in pyproject["project"]["dependencies"]:
        replaced = arguments.torch and Requirement(requirement).name == "torch"
        print(arguments.torch if replaced else oldest(requirement))


if __name__ == "__main__":
    main()
