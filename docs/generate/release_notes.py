"""Print the section of CHANGELOG.md that describes a tag, as GitHub shows it on the page of a release.

    python docs/generate/release_notes.py v0.1.0 https://github.com/OWNER/NAME

GitHub keeps line breaks within a paragraph there, and relative links do not work. So each paragraph becomes one line,
and each link to a file of the repository points to that file at the tag.
"""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def section(changelog: str, tag: str) -> str:
    """What stands below the heading of a tag's version; ends the program if that is missing or has no date."""
    version = tag.removeprefix("v")
    found = re.search(rf"^## \[{re.escape(version)}\](.*)\n((?:(?!## \[).*\n)*)", changelog, re.MULTILINE)
    if not found:
        sys.exit(f"CHANGELOG.md: no section {version}; expected a heading such as: ## [{version}] - 2026-12-31")
    if not re.fullmatch(r" - \d{4}-\d\d-\d\d", found[1]):
        sys.exit(f"CHANGELOG.md: got ## [{version}]{found[1]}; expected a date: ## [{version}] - 2026-12-31")
    return found[2]


def as_page(text: str, files: str) -> str:
    """The text with a line for each paragraph or item, and with links to files of the repository below `files`."""
    joined = re.sub(r"(?<=\S)\n *(?![\s#]|[*-] )", " ", text.strip())
    return re.sub(r"\]\((?![a-z]+:|#)", f"]({files}/", joined) + "\n"


def main(tag: str, repository: str) -> None:
    """Print it.

    Args:
        repository: its address.
    """
    print(as_page(section(CHANGELOG.read_text(encoding="utf-8"), tag), f"{repository}/blob/{tag}"), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
