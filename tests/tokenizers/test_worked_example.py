"""The worked example of docs/tokenizers.md gives what the page says."""

import doctest
import re
from pathlib import Path

from moeport.tokenizers import Choices
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.training_choices import VALUES

PAGE = (Path(__file__).parents[2] / "docs/tokenizers.md").read_text(encoding="utf-8")
EXAMPLE = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def test_the_worked_example():
    test = doctest.DocTestParser().get_doctest(EXAMPLE, {}, "docs/tokenizers.md", None, 0)
    assert len(test.examples) >= 12
    output = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=output.append).failed == 0, "".join(output)


def rows(heading):
    """The first two cells of the rows of the table under a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in section.splitlines() if line.startswith("| `")]
    return {re.findall(r"`([^`]+)`", key)[0]: re.findall(r"`([^`]+)`", value) for key, value in cells}


def test_the_page_lists_every_choice_with_its_default_first():
    listed = rows("What the papers leave open")
    assert listed.keys() == Choices.__dataclass_fields__.keys()
    assert {key: tuple(values) for key, values in listed.items() if values} == VALUES
    assert all(getattr(Choices(), key) == values[0] for key, values in VALUES.items())


def test_the_page_lists_every_pattern():
    assert rows("Patterns").keys() == PATTERNS.keys()
