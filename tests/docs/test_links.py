"""The links of pages that are read outside the site lead to files and headings of the repository.

`mkdocs build --strict` checks those inside the site.
"""

import re
from pathlib import Path

import pytest

slugify = pytest.importorskip("markdown.extensions.toc").slugify
REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("examples/**/*.md"), *REPOSITORY.glob(".github/**/*.md")])
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ (.+?)(?: \{ #([\w-]+) \})?$", re.MULTILINE)


def broken(page, text):
    """Links of a page that lead to no file of the repository, or to no heading or anchor of it."""
    for match in LINK.finditer(FENCED.sub("", text)):
        target = match[1] or match[2]
        if not re.match(r"\w+:", target) and not leads_somewhere(page, text, target):
            yield target


def leads_somewhere(page, text, target):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or not file.is_relative_to(REPOSITORY):
        return False
    return not anchor or anchor in anchors(text if file == page else file.read_text(encoding="utf-8"))


def anchors(text):
    """Names of the headings of a page, as GitHub and mkdocs make them."""
    text = FENCED.sub("", text)
    for heading, name in HEADING.findall(text):
        yield name or slugify(re.sub(r"[`*[]|\]\([^)]*\)", "", heading), "-")
    yield from re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_somewhere(page):
    assert list(broken(page, page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("[Training](docs/training.md#a-run-that-becomes-longer-than-planned)", False),
        ("[here](#own)", False),
        ("![a picture](docs/images/report.png)", False),
        ("[elsewhere](https://example.org/missing.md)", False),
        ("[Training](docs/training.md#a-run-that-becomes-shorter)", True),
        ("[nothing](docs/missing.md)", True),
        ("[here](#not-here)", True),
        ("[outside](../missing.md)", True),
        ('<img src="docs/images/missing.png">', True),
    ],
)
def test_what_is_broken(link, is_broken):
    assert bool(list(broken(REPOSITORY / "README.md", f"## Own\n\n{link}\n"))) is is_broken
