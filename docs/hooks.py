"""The site has CONTRIBUTING.md and examples/, with links that work from there, and formulas that need no script."""

import logging
import re
from html import escape, unescape
from importlib.util import find_spec
from pathlib import Path

import notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pymdownx.arithmatex import arithmatex_fenced_format

TYPESETS = find_spec("latex2mathml") is not None
if TYPESETS:
    from formulas import FormulaError, typeset

ROOT = Path(__file__).parents[1]
EXAMPLES = {".ipynb", ".md", ".py", ".sh", ".yaml"}
"""Suffixes of what examples/ has besides bytecode; all but .md can be downloaded."""
OVERVIEW = "overview.md"
"""The name of a README.md in examples/, since the page of that name would be the head of its section."""
CELL = re.compile(r"<(t[dh])\b.*?</\1>", re.DOTALL)
PROSE = 48
"""Characters from which on a cell is prose, which a narrow column would make many lines high."""
CODE = re.compile(r"<code>[^<]*</code>")
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
"""An option in code, which a browser would break after its dashes."""
PARAGRAPH = re.compile(r"<p>(.*?)</p>", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
DESCRIPTION = 160
"""Characters of a description that search engines show."""
LOG = logging.getLogger("mkdocs.hooks.formulas")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Blocks of code in the language `math` are formulas, as forges take them to be."""
    format_ = arithmatex_fenced_format(mode="generic", tag="div")
    fence = {"name": "math", "class": "arithmatex", "format": format_}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    if not TYPESETS:
        LOG.warning("formulas stay LaTeX, since latex2mathml is not installed: pip install 'moeport[docs]'")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add contributing.md and examples/; their links into docs/ lose the folder, and notebooks become pages."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    for path in sorted((ROOT / "examples").rglob("*")):
        if path.suffix in EXAMPLES:
            files.append(_example(config, path))
        if path.suffix == ".ipynb":
            name = path.relative_to(ROOT).with_suffix(".md").as_posix()
            files.append(File.generated(config, name, content=notebooks.page(path)))
    return files


def _example(config: MkDocsConfig, path: Path) -> File:
    name = path.relative_to(ROOT).as_posix()
    if path.suffix != ".md":
        return File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.INCLUDED)
    text = path.read_text(encoding="utf-8")
    for old, new in {"../docs/": "../", ".ipynb)": ".md)", "README.md": OVERVIEW}.items():
        text, name = text.replace(old, new), name.replace(old, new)
    return File.generated(config, name, content=text)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Typeset the formulas of a page; a wrong one ends the build. Code in tables loses the escapes that forges need.

    Options stay in one line, and prose in tables has room. The first sentences describe the page to search engines and
    in previews. The home page has no list of its part's pages, since it is the only one.
    """
    html = CELL.sub(lambda cell: _cell(cell[0]), html)
    page.meta.setdefault("description", _described(html))
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    html = CODE.sub(lambda code: OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)
    if not TYPESETS:
        return html
    try:
        return typeset(html)
    except FormulaError as error:
        raise PluginError(f"docs/{page.file.src_uri}: {error}") from error


def _cell(cell: str) -> str:
    """A cell of a table: its code without the escapes of forges, and marked if it is prose."""
    cell = CODE.sub(lambda code: code[0].replace(r"\|", "|"), cell)
    is_prose = cell.startswith("<td>") and len(unescape(TAG.sub("", cell))) >= PROSE
    return cell.replace("<td>", '<td class="prose">', 1) if is_prose else cell


def _described(html: str) -> str | None:
    """The first paragraph with a whole sentence, as the value of an attribute, cut at the end of a word."""
    texts = (unescape(" ".join(TAG.sub("", each).split())) for each in PARAGRAPH.findall(html))
    text = next((each for each in texts if len(each.split()) >= 8 and not each.startswith("In short:")), None)
    if text is None:
        return None
    return escape(text if len(text) <= DESCRIPTION else text[:DESCRIPTION].rpartition(" ")[0] + " ...")
