"""The messages that docs/ascend.md explains are those that moeport says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
SOURCE = " ".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in (ROOT / "moeport").rglob("*.py")
)
"""Every module, with the parts of a text on several lines joined."""


@pytest.mark.parametrize(
    "words",
    [
        "is installed, but CANN is not in effect",
        "does not work beside torch",
        "is for torch",
        "is not usable",
        "it sees no accelerator",
        "finds no Ascend runtime",
        "the system lists none",
        "this machine has",
    ],
)
def test_a_message_that_is_explained_exists(words):
    assert words in PAGE.partition("## Troubleshooting")[2]
    assert words in SOURCE


def test_folders_of_the_page_are_those_that_are_searched():
    from moeport.ascend.table import CANN_FOLDERS, CPU_INDEX

    assert CANN_FOLDERS[0] in PAGE
    assert CANN_FOLDERS[1].removesuffix("/latest") in PAGE
    assert f"--index-url {CPU_INDEX}" in PAGE
