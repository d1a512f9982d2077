"""The table of commands, the help, and what docs/commands.md lists."""

import re
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from moeport.cli.main import COMMANDS, app

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `moeport ([^`]+)`", PAGE, re.MULTILINE)


def commands(command, names: tuple[str, ...] = ()):
    """Every command below one, by its names from the first on; a group that does something by itself is one too."""
    if isinstance(command, TyperGroup):
        if command.invoke_without_command:
            yield names
        for name, inner in command.commands.items():
            if not inner.hidden:
                yield from commands(inner, (*names, name))
    else:
        yield names


def listed(row: str):
    """The commands of a row of docs/commands.md; `run\\|record` are two."""
    first, *rest = row.replace("\\|", "|").split()
    names = rest[0].split("|") if rest and re.fullmatch(r"[a-z][a-z|-]*", rest[0]) else [""]
    return [tuple(filter(None, (first, name))) for name in names]


def test_every_command_of_the_table_is_registered():
    assert {names[0] for names in commands(get_command(app))} == set(COMMANDS)


def test_the_page_lists_every_command():
    everything = list(commands(get_command(app)))
    assert sorted(name for row in ROWS for name in listed(row)) == sorted(everything)


def test_the_help_of_every_command_is_shown():
    for name in commands(get_command(app)):
        done = CliRunner().invoke(app, [*name, "--help"])
        assert (done.exit_code, "Usage:" in done.output) == (0, True), name
