"""examples/README.md and examples/models/README.md name every example, with commands and options that exist."""

import shlex
from pathlib import Path

import pytest

from tests.docs.blocks import blocks, commands
from tests.docs.lines import faults
from tests.examples.test_scripts import load

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGES = sorted(EXAMPLES.rglob("*.md"))


def lines(page):
    for block in blocks(page.name, page.read_text(encoding="utf-8")):
        if block.language == "console":
            yield from (command.line for command in commands(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(EXAMPLES).as_posix())
def test_every_command_and_option_of_moeport_exists(page):
    assert [(line, fault) for line in lines(page) for fault in faults(line, is_run=False)] == []


@pytest.mark.parametrize("name", ["pytorch_model", "swap_into_transformers"])
def test_every_option_of_a_script_that_is_shown_exists(name):
    pytest.importorskip("transformers")
    script = load(name)
    shown = [*lines(EXAMPLES / "README.md"), *(line.strip() for line in script.__doc__.splitlines())]
    calls = [line for line in shown if line.startswith(f"python examples/{name}.py")]
    assert calls
    for call in calls:
        script.parser().parse_args(shlex.split(call)[2:])


def test_every_example_is_in_the_tables():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [path for path in EXAMPLES.rglob("*") if path.suffix in {".ipynb", ".py", ".sh", ".yaml"}]
    assert len(files) > 8
    assert [path.name for path in files if f"{path.name}`](" not in text and path.name != "execute.py"] == []
