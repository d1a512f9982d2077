"""A notebook becomes a page with its texts, its code and what it showed."""

import importlib.util
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def notebooks():
    """docs/notebooks.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("notebooks", REPOSITORY / "docs" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(*outputs, **metadata):
    return {"cell_type": "code", "source": ["a = 1\n", "a"], "metadata": metadata, "outputs": list(outputs)}


def text(*lines):
    return {"cell_type": "markdown", "source": list(lines), "metadata": {}}


@pytest.fixture
def page(notebooks, tmp_path):
    def page(*cells):
        (tmp_path / "one.ipynb").write_text(json.dumps({"cells": cells}))
        return notebooks.page(tmp_path / "one.ipynb")

    return page


def test_texts_and_code_follow_each_other(page):
    assert page(text("# Title\n", "\n", "More."), code(), text("End.")) == (
        "# Title\n\nMore.\n\n[Download this notebook](one.ipynb).\n\n```python\na = 1\na\n```\n\nEnd.\n"
    )


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ({"output_type": "stream", "text": ["1\n", "2\n"]}, "```text\n1\n2\n```"),
        ({"data": {"text/plain": ["1"]}}, "```text\n1\n```"),
        ({"data": {"text/markdown": ["| a |\n", "|---|"], "text/plain": ["<Markdown>"]}}, "| a |\n|---|"),
        ({"data": {"text/html": ['<iframe srcdoc="a\n\n', 'b"></iframe>']}}, '<iframe srcdoc="a&#10;&#10;b"></iframe>'),
        (
            {"data": {"image/png": "QUI=\n", "text/plain": ["<Figure>"]}},
            '<img alt="Loss &amp; load" src="data:image/png;base64,QUI=">',
        ),
    ],
)
def test_what_a_cell_showed_in_its_best_form(page, output, shown):
    assert page(text("# Title"), code(output, alt="Loss & load")).endswith(f"a\n```\n\n{shown}\n")


def test_every_figure_of_the_examples_has_an_alternative_text(notebooks):
    for path in REPOSITORY.glob("examples/*.ipynb"):
        assert '<img alt=""' not in notebooks.page(path)
