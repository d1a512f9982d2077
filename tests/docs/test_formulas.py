"""The formulas of the documentation are typeset when it is built, and a wrong one ends the build."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(REPOSITORY.glob("docs/**/*.md"))
BLOCK = re.compile(r"^ *```math\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$]+?)(?<=\S)\$(?![\w$])")


def load():
    """docs/formulas.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("formulas", REPOSITORY / "docs" / "formulas.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FORMULAS = load()


def formulas(text):
    """Those of a page, as they are written."""
    return [*BLOCK.findall(text), *INLINE.findall(CODE.sub("", text))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_formula_of_a_page_is_typeset(page):
    for formula in formulas(page.read_text(encoding="utf-8")):
        assert ElementTree.fromstring(FORMULAS.mathml(formula.strip(), "block")).get("display") == "block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_formula_in_a_line_has_no_escapes_of_markdown(page):
    """A forge takes a backslash before punctuation from it, and ends it at the end of the line."""
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    assert [formula for formula in INLINE.findall(text) if re.search(r"\\[^\w\s]|\n", formula)] == []


def test_the_pages_have_formulas():
    found = {page.stem: len(formulas(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert min(found[page] for page in ("routers", "capacity", "planner", "long-context", "training", "vision")) >= 2


def texts(formula):
    """Names of the elements that hold text, and the text."""
    root = ElementTree.fromstring(FORMULAS.mathml(formula, "inline"))
    return [(each.tag.rpartition("}")[2], each.text) for each in root.iter() if each.text]


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (r"\frac{a}{b}", [("mi", "a"), ("mi", "b")]),
        (r"\lceil x \rceil", [("mi", "⌈"), ("mi", "x"), ("mi", "⌉")]),
        (r"p_\delta", [("mi", "p"), ("mi", "δ")]),
        (r"\text{top_k}", [("mtext", "top_k")]),
        (
            r"\begin{aligned} a &= 1 \\ b &= 2 \end{aligned}",
            [("mi", "a"), ("mo", "="), ("mn", "1"), ("mi", "b"), ("mo", "="), ("mn", "2")],
        ),
    ],
)
def test_what_a_formula_becomes(formula, expected):
    assert texts(formula) == expected


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (r"\fraction{a}{b}", r"latex2mathml does not know \\fraction"),
        (r"\frac{a}", "a part of mfrac is missing; expected 2, received 1"),
        (r"a }", "latex2mathml does not know }"),
        (r"x_{", "not LaTeX that latex2mathml reads"),
        (r"\left( a", "not LaTeX that latex2mathml reads"),
        (r"a & b", "not LaTeX that latex2mathml reads"),
        ("", "not LaTeX that latex2mathml reads"),
    ],
)
def test_a_wrong_formula_is_refused(formula, message):
    with pytest.raises(FORMULAS.FormulaError, match=message):
        FORMULAS.mathml(formula, "block")


def site(tmp_path, text, extension="attr_list"):
    """Builds a site of one page with the hooks of this one."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(text)
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: one page\n"
        "docs_dir: pages\n"
        f"hooks: [{REPOSITORY / 'docs' / 'hooks.py'}]\n"
        "plugins: []\n"
        f"markdown_extensions: [{extension}, pymdownx.superfences, {{pymdownx.arithmatex: {{generic: true}}}}]\n"
    )
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    return done, tmp_path / "site" / "index.html"


def test_a_page_is_built_with_its_formulas(tmp_path):
    done, page = site(
        tmp_path, "The gate is $g_k$, not `$g_k$`.\n\n```math\n\\sum_k g_k < 2\n```\n\nIt costs $5 or $6.\n"
    )
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    assert len(re.findall(r'<math [^>]*display="inline">', html)) == 1
    (block,) = re.findall(r'<div class="formula">(<math .*?</math>)</div>', html)
    assert ElementTree.fromstring(block).get("display") == "block"
    assert "<code>$g_k$</code>" in html
    assert "It costs $5 or $6." in html


def test_code_in_a_table_is_read_as_a_forge_reads_it(tmp_path):
    done, page = site(tmp_path, "| `a\\|b` | c \\| d |\n|---|---|\n| `e\\|f` | `g` |\n\n`h\\|i`\n", extension="tables")
    assert done.returncode == 0, done.stderr
    html = page.read_text()
    assert re.findall(r"<code>(.*?)</code>", html) == ["a|b", "e|f", "g", "h\\|i"]
    assert "c | d" in html


def test_a_build_ends_at_a_wrong_formula_and_names_its_page(tmp_path):
    done, _ = site(tmp_path, "```math\n\\frac{1}\n```\n")
    assert done.returncode != 0
    assert r"docs/index.md: \frac{1}: a part of mfrac is missing; expected 2, received 1" in done.stderr + done.stdout
