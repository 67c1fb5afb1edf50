"""The layer rule: mamba_kernels <- hf_mamba <- hf_mamba_conversion, and mamba_kernels needs torch and triton only.

The imports are read from the source, those inside functions and under TYPE_CHECKING included. The command line, hf_mamba/cli,
is where the packages meet: it may import hf_mamba_conversion, though only inside a function or for type checking, so that
`hf-mamba generate` does not pay for it.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# what a package may not import from this project; tests and benchmarks are not in the wheel
FORBIDDEN = {
    "mamba_kernels": {"hf_mamba", "hf_mamba_conversion", "benchmarks", "tests"},
    "hf_mamba": {"hf_mamba_conversion", "benchmarks", "tests"},
    "hf_mamba_conversion": {"benchmarks", "tests"},
}
# where hf_mamba may import which upper package lazily
COMPOSITION_ROOT = "cli"
LAZILY_COMPOSED = {"hf_mamba_conversion"}
KERNEL_DEPENDENCIES = {"torch", "triton"}


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None, f"{name} is not importable"
    return Path(next(iter(spec.submodule_search_locations)))


def imports(source: str) -> Iterator[tuple[int, str, int]]:
    """Line, dotted name and relative level of each import, `importlib.import_module` of a literal included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value, 0


def import_time_lines(source: str) -> set[int]:
    """Lines of imports that run when the module is imported: outside functions and outside `if TYPE_CHECKING`."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            children: list[ast.AST] = list(node.orelse)
        else:
            yield node
            children = list(ast.iter_child_nodes(node))
        for child in children:
            yield from walk(child)

    return {
        node.lineno for node in walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)
    }


def breaches(package: str, folder: Path) -> list[str]:
    """One line for each import in `folder` that the layer rule forbids to `package`."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        depth = len(relative.parts)
        text = file.read_text(encoding="utf-8")
        composes = package == "hf_mamba" and relative.parts[0] == COMPOSITION_ROOT
        eager = import_time_lines(text)
        for line, name, level in imports(text):
            root = name.split(".")[0]
            place = f"{package}/{relative}:{line}"
            if level > depth:
                found.append(f"{place}: a relative import leaves the package")
            elif level == 0 and composes and root in LAZILY_COMPOSED:
                if line in eager:
                    found.append(f"{place}: {name} must be imported inside the command that needs it")
            elif level == 0 and root in FORBIDDEN[package]:
                found.append(f"{place}: {name} lies above {package}")
            elif level == 0 and package == "mamba_kernels":
                if root == package:
                    found.append(f"{place}: {name} must be imported relatively")
                elif root not in KERNEL_DEPENDENCIES and root not in sys.stdlib_module_names:
                    found.append(f"{place}: {name} is neither standard library, torch nor triton")
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_import_breaks_the_layer_rule(package: str) -> None:
    folder = package_folder(package)
    assert any(folder.rglob("*.py"))
    assert breaches(package, folder) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("mamba_kernels", "import hf_mamba"),
        ("mamba_kernels", "def f():\n    from hf_mamba.cache import RecurrentCache"),
        ("mamba_kernels", "from ..outside import x"),
        ("mamba_kernels", "from mamba_kernels.dispatch import select"),
        ("mamba_kernels", "import numpy"),
        ("mamba_kernels", "from transformers import Cache"),
        ("hf_mamba", "import hf_mamba_conversion.hub"),
        ("hf_mamba", "import importlib\nimportlib.import_module('hf_mamba_conversion')"),
        ("hf_mamba_conversion", "from benchmarks import timing"),
    ],
    ids=lambda value: value.replace("\n", " ") if " " in value else value,
)
def test_a_breach_is_found(package: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    assert len(breaches(package, tmp_path)) == 1


LAZY = "def command():\n    from hf_mamba_conversion import convert\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_mamba_conversion import ConversionReport\n"


@pytest.mark.parametrize(
    ("place", "source", "count"),
    [
        ("cli/convert.py", LAZY + TYPES, 0),
        ("cli/convert.py", "from hf_mamba_conversion import convert\n", 1),
        ("cli/convert.py", "try:\n    import hf_mamba_conversion\nexcept ImportError:\n    pass\n", 1),
        ("cli/convert.py", "class A:\n    import hf_mamba_conversion\n", 1),
        ("cli/convert.py", TYPES + "else:\n    import hf_mamba_conversion\n", 1),
        ("cli/convert.py", "def command():\n    import benchmarks\n", 1),
        ("env.py", LAZY, 1),
        ("models/cli/convert.py", LAZY, 1),
    ],
    ids=["lazy", "eager", "in_try", "in_class", "in_else", "benchmarks", "outside_cli", "other_cli"],
)
def test_the_command_line_alone_may_compose_and_only_lazily(
    place: str, source: str, count: int, tmp_path: Path
) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(source)
    assert len(breaches("hf_mamba", tmp_path)) == count


def test_lawful_imports_pass(tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    (tmp_path / "ssd" / "eager.py").write_text("import math\nimport torch\nimport triton\nfrom ..checks import x\n")
    assert breaches("mamba_kernels", tmp_path) == []
