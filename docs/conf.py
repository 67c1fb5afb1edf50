"""Sphinx configuration of the documentation; `make docs` builds it.

Nothing outside this machine is needed, neither to build the pages nor to read them: the theme and its fonts are files of the
package furo, and formulas become MathML, which browsers draw without a script.
"""

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels/torch-ext"), str(ROOT / "conversion")]
# pages are built from what is installed
os.environ["HF_HUB_OFFLINE"] = "1"

from hf_mamba import __version__  # noqa: E402

logger = logging.getLogger(__name__)

project = "hf_mamba"
copyright = "the hf_mamba developers, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"hf_mamba {release}"
html_copy_source = False
html_math_renderer = "mathml"
html_show_sphinx = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_custom_sections = [
    (name, "params_style") for name in ("Layers", "Experts", "Router", "Losses", "Initialisation")
]
napoleon_use_rtype = False


def _plain_headings(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """napoleon knows sections by headings of one word: a remark in brackets goes in front of the section."""
    for index in reversed(range(len(lines))):
        heading = re.fullmatch(r"(Losses) \((.+)\):", lines[index])
        if heading:
            lines[index : index + 1] = [f"{heading[1]} are {heading[2]}.", "", f"{heading[1]}:"]


def _repository_files(app: Sphinx, name: str, content: list[str]) -> None:
    """The site is built without knowing where the repository is: links out of docs/ become the file's path."""
    folder = (DOCS / name).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        path = target.relative_to(ROOT).as_posix()
        return f"`{path}`" if match[1].strip("`/") in path else f"{match[1]} (`{path}`)"

    content[0] = re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)\)", link, content[0])


def _markdown_to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings of this project are read in terminals and write code in single backticks, as Markdown does."""
    lines[:] = [re.sub(r"(?<![`:\\])`([^`]+)`(?!`)", r"``\1``", line) for line in lines]


def _mathml(translator: Any, node: nodes.Element) -> None:
    try:
        math = latex2mathml.tex2mathml(node.astext())
    # SyntaxError before docutils 0.22, then a ValueError
    except (SyntaxError, ValueError) as error:
        logger.warning("formula: %s", error, location=node)
        math = f"<math><mtext>{html.escape(node.astext())}</mtext></math>"
    if isinstance(node, nodes.math_block):
        math = math.replace("<math", '<math display="block"', 1)
    translator.body.append(math)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _repository_files)
    # before and after napoleon, which has priority 500
    app.connect("autodoc-process-docstring", _plain_headings, priority=400)
    app.connect("autodoc-process-docstring", _markdown_to_rst, priority=600)
    app.add_html_math_renderer("mathml", inline_renderers=(_mathml, None), block_renderers=(_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
