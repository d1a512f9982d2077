"""Every file that the documentation names exists."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"])
NAMED = re.compile(r"(?<![\w/.-])(?:moeport|tests|docs|configs|benchmarks)/[\w./*-]*\w")
EXAMPLES = re.compile(r"NAME|sigma|double_benchmark")
"""Files of the worked examples and of another project's commands."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page):
    named = set(NAMED.findall(page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not EXAMPLES.search(path) and not any(REPOSITORY.glob(path))] == []
