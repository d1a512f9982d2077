"""Help texts, their examples, and completion."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moeport.cli.main import COMMANDS, main, whole_command
from moeport.routers import BY_NAME

ROOT = Path(__file__).parents[2]


def every_command(command=None, path=()):
    """Each command that does something, by its path."""
    command = command or whole_command()
    below = getattr(command, "commands", {})
    if not below:
        yield path, command
    for name, each in below.items():
        yield from every_command(each, (*path, name))


HELP = {path: command.help or "" for path, command in every_command()}
EXAMPLES = {
    path: shlex.split(found.group(1))
    for path, text in HELP.items()
    if (found := re.search(r"Example: moeport (.*)", " ".join(text.split())))
}


def moeport(monkeypatch, capsys, *arguments):
    """Exit code and output of a command that runs from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["moeport", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return exit_.value.code, captured.out + captured.err


@pytest.mark.parametrize("path", HELP, ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_every_command(monkeypatch, capsys, path, flag):
    code, out = moeport(monkeypatch, capsys, *path, flag)
    assert (code, "Usage: moeport" in out) == (0, True)
    assert not re.search(r"bool", out, re.IGNORECASE)


@pytest.mark.parametrize("path", EXAMPLES, ids=" ".join)
def test_every_example_is_a_line_that_the_command_takes(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    command = whole_command()
    assert EXAMPLES[path][: len(path)] == list(path)
    context = command.context_class(command, **command.context_settings)
    for name in path:
        command = command.commands[name]
    command.make_context(path[-1], EXAMPLES[path][len(path) :], parent=context)


@pytest.mark.parametrize("path", [("plan",), ("launch",)], ids=" ".join)
def test_examples_run(monkeypatch, capsys, path):
    code, out = moeport(monkeypatch, capsys, *EXAMPLES[path])
    assert code == 0, out


def test_names_of_routers_are_whole_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    _, out = moeport(monkeypatch, capsys, "routers")
    words = set(re.split(r"[^\w]+", re.sub(r"\x1b\[[0-9;]*m", "", out)))
    assert set(BY_NAME) <= words
    assert {option for router in BY_NAME.values() for option in router.config_class.model_fields} - {"name"} <= words


def test_the_shell_completes_commands():
    environment = os.environ | {"_MOEPORT_COMPLETE": "complete_bash", "COMP_WORDS": "moeport ", "COMP_CWORD": "1"}
    result = subprocess.run(
        [Path(sys.executable).with_name("moeport")], env=environment, capture_output=True, text=True, check=False
    )
    assert set(COMMANDS) <= set(result.stdout.split())
