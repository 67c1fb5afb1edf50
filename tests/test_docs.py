"""Every code block of docs/ runs, every link leads somewhere, and the site is built without warnings."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from typer.testing import CliRunner

import hf_mamba
from hf_mamba.cli import app

from .hub.conftest import hub as loopback_hub

# fixtures of other folders have to be named in the module that uses them
__all__ = ["loopback_hub"]

pytestmark = pytest.mark.checkout

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}

BLOCK = re.compile(r"^(?P<skip><!-- not run: [^\n]+ -->\n)?^```(?P<kind>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
# shown, not run: output, drawings, and what Sphinx reads
SHOWN = ("", "text")

# these pages upload: their blocks are given a Hub on this machine
ON_A_HUB = ("tutorials/upload.md",)


@dataclass
class Block:
    """A fenced block: its language, its code, the line it begins at, the output shown below it, and why it is not run."""

    kind: str
    code: str
    line: int
    output: str | None
    skipped: bool


def blocks_of(text: str) -> list[Block]:
    found = list(BLOCK.finditer(text))
    blocks = []
    for match, after in pairwise([*found, None]):
        # a text block that follows at once is what the block before prints
        shows = after is not None and after["kind"] == "text" and not text[match.end() : after.start()].strip()
        blocks.append(
            Block(
                kind=match["kind"],
                code=match["code"],
                line=text[: match.start("code")].count("\n") + 1,
                output=after["code"] if after is not None and shows else None,
                skipped=match["skip"] is not None,
            )
        )
    return blocks


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    # the traceback of a failure names the page and its line
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def run_shell(block: Block, folder: Path) -> str:
    """Run the lines of a block; those that are `hf-mamba` alone in this process, which has imported torch already."""
    lines = [line for line in block.code.replace("\\\n", " ").splitlines() if line.strip()]
    if all(line.startswith("hf-mamba ") for line in lines):
        output = ""
        for line in lines:
            result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            output += result.stdout
        return output
    command = f'hf-mamba() {{ {shlex.quote(sys.executable)} -m hf_mamba.cli "$@"; }}\nset -e\n{block.code}'
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), str(ROOT / "conversion")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=environment, timeout=120
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run the blocks of a page one after the other, in one namespace; what they print has to be what is shown."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.skipped or block.kind in SHOWN or block.kind.startswith("{"):
            continue
        if block.kind == "python":
            output = run_python(block, page, namespace)
        elif block.kind == "sh":
            output = run_shell(block, folder)
        else:
            {"json": json.loads, "yaml": yaml.safe_load}[block.kind](block.code)
            continue
        if block.output is not None:
            assert output.rstrip() == block.output.rstrip(), f"{page}, line {block.line}"
    return namespace


@pytest.fixture
def process_as_before(monkeypatch: pytest.MonkeyPatch):
    """Random numbers, dtype, gradients and registration are those from before; the network is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    state, dtype, grad = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    hf_mamba.register()


def with_code(names: dict[str, Path]) -> list[str]:
    return [
        name for name, page in names.items() if re.search(r"^```(python|sh|json|yaml)$", page.read_text("utf-8"), re.M)
    ]


@pytest.mark.parametrize("name", with_code(PAGES))
def test_blocks_of_a_page_run(
    name: str, request: pytest.FixtureRequest, monkeypatch, tmp_path: Path, process_as_before
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if name in ON_A_HUB:
        request.getfixturevalue("loopback_hub")
    namespace = run_page(PAGES[name], folder)
    if name == "fine_tuning.md":
        assert type(namespace["merged"]).__name__ == "Mamba2ForCausalLM" and namespace["loss"].isfinite()


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_run_or_say_why_not(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    blocks = blocks_of(text)
    # a fence that the pattern does not see would be left out silently
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks)
    for block in blocks:
        known = (*SHOWN, "python", "sh", "json", "yaml")
        assert block.kind in known or block.kind.startswith("{"), f"{name}, line {block.line}: {block.kind!r}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name: str) -> None:
    text = BLOCK.sub("", PAGES[name].read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|#", target):
            continue
        assert (PAGES[name].parent / target.split("#")[0]).exists(), f"{name}: {target}"


def test_included_parts_are_there() -> None:
    """Sphinx says so too, but is not installed everywhere."""
    included = [
        (page.parent / block.kind.removeprefix("{include}").strip(), block.code)
        for page in PAGES.values()
        for block in blocks_of(page.read_text(encoding="utf-8"))
        if block.kind.startswith("{include}")
    ]
    assert included
    for file, options in included:
        start = re.search(r'^:start-after: "(.+)"$', options, re.M)
        assert start is not None and file.read_text(encoding="utf-8").count(f"{start[1]}\n") == 1, file


def test_every_page_is_in_the_navigation() -> None:
    listed = set()
    for name, page in PAGES.items():
        for block in blocks_of(page.read_text(encoding="utf-8")):
            if block.kind == "{toctree}":
                entries = [line for line in block.code.splitlines() if line and not line.startswith(":")]
                listed |= {(Path(name).parent / entry).as_posix() + ".md" for entry in entries}
    assert listed | {"index.md"} == set(PAGES)


@pytest.mark.parametrize("package", ["hf_mamba", "mamba_kernels", "mamba_kernels.compat", "hf_mamba_conversion"])
def test_reference_has_every_public_name(package: str) -> None:
    text = PAGES[f"reference/{package.split('.')[0]}.md"].read_text(encoding="utf-8")
    missing = [name for name in importlib.import_module(package).__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_reference_names_every_command() -> None:
    text = PAGES["reference/command_line.md"].read_text(encoding="utf-8")
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert re.findall(r"^\| `hf-mamba ([a-z-]+)", text, re.M) == sorted(commands)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sphinx", "furo", "myst_parser")),
    reason="the site's generator is not installed: pip install hf-mamba[docs], or make docs",
)
def test_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, DOCS, tmp_path / "site"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {name.replace(".md", ".html") for name in PAGES} <= pages
    # readable without a network: nothing is loaded from elsewhere
    for page in pages:
        html = (tmp_path / "site" / page).read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"https?://[^\"]*\"", html), page
