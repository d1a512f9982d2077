"""Every file, module and name that the documentation mentions exists."""

import ast
import re
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"])
NAMED = re.compile(r"(?<![\w/.-])(?:moeport|tests|docs|configs|benchmarks)/[\w./*-]*\w")
DOTTED = re.compile(r"(?<![\w/.-])(?:moeport|benchmarks)(?:\.[a-zA-Z_]\w*)+")
PYTHON = re.compile(r"^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
EXAMPLES = re.compile(r"NAME|sigma|double_benchmark")
"""Files of the worked examples and of another project's commands."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_the_files_that_a_page_names_exist(page):
    named = set(NAMED.findall(page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not EXAMPLES.search(path) and not any(REPOSITORY.glob(path))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_the_modules_and_names_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    assert [name for name in sorted({*DOTTED.findall(text), *imported(text)}) if not exists(name)] == []


def imported(text):
    """The dotted names that the Python examples of a page import from moeport."""
    for _, code in PYTHON.findall(text):
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "moeport":
                yield from (f"{node.module}.{each.name}" for each in node.names if each.name != "*")


def exists(dotted):
    """Whether a dotted name is a module or, by its text, something that a module has; imports no framework."""
    module, *names = dotted.split(".")
    path = REPOSITORY / module
    while names and ((path / names[0]).is_dir() or (path / f"{names[0]}.py").is_file()):
        path /= names.pop(0)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return not names or re.search(rf"\b{names[0]}\b", source.read_text(encoding="utf-8")) is not None


def test_a_module_or_name_that_is_gone_is_found():
    gone = ["moeport.core.gone", "moeport.core.ops.gone", "moeport.gone.ops"]
    assert [exists(name) for name in [*gone, "moeport.core", "moeport.core.ops.Ops"]] == [False] * 3 + [True] * 2
