"""CONTRIBUTING.md says where things are: each named file defines each named thing."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| (.+\?) \| (.+) \|$", TEXT.partition("## Where to find what")[2].partition("\n## ")[0], re.MULTILINE
)


def test_there_are_at_least_twenty_questions():
    assert len({question for question, _ in ROWS}) == len(ROWS) >= 20


@pytest.mark.parametrize(("question", "answer"), ROWS, ids=[question for question, _ in ROWS])
def test_the_answer_is_where_the_table_says(question, answer):
    for place in answer.split("; "):
        path, *names = re.findall(r"`([^`]+)`", place)
        source = (REPOSITORY / path).read_text(encoding="utf-8")
        for name in names:
            assert re.search(rf"^\s*(def {name}\(|class {name}\b|{name}\b.*=)", source, re.MULTILINE), (path, name)
