"""The site works without a network: no page, style or setting of it names something that a browser would fetch.

And what the hooks and the theme add to its pages.
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
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


@pytest.mark.parametrize("page", [*PAGES, *sorted(REPOSITORY.glob("examples/**/*.md"))], ids=lambda page: page.name)
def test_a_page_has_one_title_and_no_heading_skips_a_level(page):
    marks = re.findall(r"^(#+) ", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    levels = [len(each) for each in marks]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


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


def test_the_scheme_follows_the_device_until_a_reader_chooses():
    """The first of the palettes is that of a first visit, and Material remembers it."""
    assert [each["media"] for each in CONFIG["theme"]["palette"]] == [
        "(prefers-color-scheme)",
        "(prefers-color-scheme: light)",
        "(prefers-color-scheme: dark)",
    ]
    assert all(each["toggle"].keys() == {"icon", "name"} for each in CONFIG["theme"]["palette"])


class Tags(HTMLParser):
    """Every start tag of a page with its attributes, and the text of the title."""

    def __init__(self, path):
        super().__init__()
        self.found, self.title, self.last = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.last = tag
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.title += data if self.last == "title" else ""
        self.last = ""

    def description(self):
        return [attrs["content"] for tag, attrs in self.found if tag == "meta" and attrs.get("name") == "description"]

    def hidden(self, name):
        (attrs,) = (attrs for _, attrs in self.found if attrs.get("data-md-type") == name)
        return "hidden" in attrs


INDEX = """# Home

In short: [this page](page.md), [this page](page.md), [this page](page.md), [this page](page.md).

Run <b>all</b> of it with `--dry-run=no --ranks-per-node 8`: "quoted" words, a < b, and more words that search engines
would no longer show, so that the description ends before them, between two words.
"""
PAGE = """# A page

Short.

```console
$ moeport --version
```

| Name | Meaning | Number |
|---|---|---:|
| `a` | a sentence that is too long for a column of a phone | 12345678901234567890123456789012345678901234567890 |
| [a link of few words](index.md) | `a` | 2 |
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A site of two pages with the theme and the hooks of this one."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    (folder / "pages").mkdir()
    (folder / "pages" / "index.md").write_text(INDEX)
    (folder / "pages" / "page.md").write_text(PAGE)
    theme = {**CONFIG["theme"], "custom_dir": str(REPOSITORY / CONFIG["theme"]["custom_dir"])}
    config = {
        "site_name": "two pages",
        "site_description": "of all",
        "docs_dir": "pages",
        "theme": theme,
        "hooks": [str(REPOSITORY / "docs" / "hooks.py")],
        "plugins": [],
        "markdown_extensions": [
            each
            for each in CONFIG["markdown_extensions"]
            if each in ("tables", "pymdownx.superfences") or "arithmatex" in str(each)
        ],
    }
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config))
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_a_page_is_described_by_its_first_sentences(built):
    (text,) = Tags(built / "index.html").description()
    assert text.startswith('Run all of it with --dry-run=no --ranks-per-node 8: "quoted" words, a < b, and')
    assert INDEX.replace("\n", " ").count(text.removesuffix(" ...").rpartition("< b")[2] + " ") == 1
    assert text.endswith(" ...")
    assert len(text) <= 164


def test_a_page_without_a_sentence_is_described_as_the_site_is(built):
    assert Tags(built / "page" / "index.html").description() == ["of all"]


def test_an_option_stays_in_one_line(built):
    options = re.findall(r'<span class="option">(.*?)</span>', (built / "index.html").read_text(encoding="utf-8"))
    assert options == ["--dry-run", "--ranks-per-node"]
    assert "option" not in (built / "page" / "index.html").read_text(encoding="utf-8").partition("<article")[2]


def test_prose_in_a_table_has_room(built):
    cells = [attrs for tag, attrs in Tags(built / "page" / "index.html").found if tag == "td"]
    number = {"style": "text-align: right;"}
    assert cells == [{}, {"class": "prose"}, number, {}, {}, number]


def test_only_the_home_page_shows_no_list_of_pages(built):
    assert Tags(built / "index.html").hidden("navigation")
    assert not Tags(built / "page" / "index.html").hidden("navigation")


def test_a_missing_page_says_so_and_leads_home(built):
    page = Tags(built / "404.html")
    assert page.title == "Page not found - two pages"
    assert ("a", {"href": "/."}) in page.found
    assert not (built / "theme").exists()
