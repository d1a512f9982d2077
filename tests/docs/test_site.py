"""The site works without a network: no page, style or setting of it names something that a browser would fetch."""

import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
CONFIG = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = sorted([*REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "CONTRIBUTING.md"])
FENCED = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
FETCHED = re.compile(
    r"!\[[^]]*\]\((?:https?:)?//[^)]*\)"  # an image of Markdown
    r"|<(?:img|script|iframe|source|video|embed|object)\b[^>]*=[\"'](?:https?:)?//[^>]*>"
    r"|<link\b[^>]*(?:https?:)?//[^>]*>"
    r"|(?:url\(|@import )[\"' ]*(?:https?:)?//[^;]*"
)


def test_the_settings_fetch_nothing():
    assert CONFIG["theme"]["font"] is False, "Material would load Google's fonts"
    assert not CONFIG.keys() & {"extra_javascript", "extra_templates"}
    assert not [name for name in CONFIG["extra_css"] if not (REPOSITORY / "docs" / name).is_file()]
    assert "extra" not in CONFIG or "analytics" not in CONFIG["extra"]


def test_a_strict_build_is_not_quiet():
    """With --quiet, mkdocs counts no warnings: --strict would find nothing."""
    recipes = [REPOSITORY / "Makefile", *REPOSITORY.glob(".github/workflows/*.yml")]
    builds = re.findall(
        r"^[^#\n]*mkdocs build.*$", "\n".join(each.read_text(encoding="utf-8") for each in recipes), re.M
    )
    assert len(builds) >= 2
    assert [line for line in builds if "--strict" not in line or re.search(r" -\w*q| --quiet", line)] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted(REPOSITORY.glob("docs/assets/*.css"))], ids=lambda page: page.name)
def test_a_page_fetches_nothing(page):
    assert FETCHED.findall(FENCED.sub("", page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("picture", sorted(REPOSITORY.glob("docs/images/*.svg")), ids=lambda picture: picture.name)
def test_a_picture_fetches_nothing_and_runs_nothing(picture):
    text = picture.read_text(encoding="utf-8")
    assert re.findall(r"<script|<foreignObject|<image|\bon\w+=|@import|url\((?!#)|href=\"(?!#)", text) == []


@pytest.mark.parametrize(
    "fetched",
    [
        "![a badge](https://example.com/badge.svg)",
        '<img alt="a badge" src="https://example.com/badge.svg">',
        "<script src='//example.com/a.js'></script>",
        '<link rel="stylesheet" href="https://example.com/a.css">',
        "@import 'https://example.com/a.css';",
        "a { background: url(//example.com/a.png) }",
    ],
)
def test_what_a_browser_would_fetch_is_found(fetched):
    assert len(FETCHED.findall(f"text\n{fetched}\nmore text")) == 1


def test_links_and_own_images_are_not_fetched():
    assert FETCHED.findall("[a link](https://example.com) ![own](images/a.svg) <https://example.com>") == []
