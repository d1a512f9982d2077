"""The table of commands, the help, and what README.md lists."""

import re
from pathlib import Path

import click
import typer
from typer.testing import CliRunner

from moeport.cli.main import COMMANDS, app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `moeport ([^`]+)`", README, re.MULTILINE)


def commands(group: click.Group, before: tuple[str, ...] = ()):
    """Every command with the names before it, in the order of the help."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name)


def listed(row: str):
    """The commands of a row of README.md; `run\\|record` are two."""
    first, *rest = row.replace("\\|", "|").split()
    names = rest[0].split("|") if rest and re.fullmatch(r"[a-z|]+", rest[0]) else [""]
    return [tuple(filter(None, (first, name))) for name in names]


def test_every_command_of_the_table_is_registered():
    registered = list(typer.main.get_command(app).commands)
    assert sorted(registered) == sorted(COMMANDS)


def test_readme_lists_every_command():
    everything = list(commands(typer.main.get_command(app)))
    assert sorted(name for row in ROWS for name in listed(row)) == sorted(everything)


def test_the_help_of_every_command_is_shown():
    for name in commands(typer.main.get_command(app)):
        done = CliRunner().invoke(app, [*name, "--help"])
        assert (done.exit_code, "Usage:" in done.output) == (0, True), name
