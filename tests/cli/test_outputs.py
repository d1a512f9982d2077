"""Every option that names a file to write is checked before the command starts, in the same way."""

import os
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from moeport.cli.main import app, main
from tests.cli.test_commands import commands

FLAGS = {"--json", "--csv", "--plot", "--html", "--markdown", "--output", "--output-dir", "--slurm"}


def outputs():
    """Each option of each command that names a file to write, as (names of the command, flag, command)."""
    root: Any = get_command(app)
    for names in commands(root):
        command = root
        for name in names:
            command = command.commands[name]
        for option in command.params:
            if not getattr(option, "is_flag", True):
                yield from ((names, flag, command) for flag in FLAGS.intersection(option.opts))


ALL = list(outputs())


def arguments(command):
    """Those that a command needs, with files that are not there."""
    needed = [each for each in command.params if each.required and each.opts[0] not in FLAGS | {"-o"}]
    return [word for each in needed for word in ((each.opts[0], "1") if each.opts[0][0] == "-" else ("nowhere",))]


def said(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["moeport", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, " ".join(capsys.readouterr().err.split())


def test_all_are_found():
    assert len(ALL) >= 15
    assert {("config", "schema"), ("bench", "comm"), ("parity", "record"), ("plan",)} <= {names for names, _, _ in ALL}


@pytest.mark.parametrize(("names", "flag", "command"), ALL, ids=[" ".join((*names, flag)) for names, flag, _ in ALL])
def test_what_cannot_be_written_is_refused_first(names, flag, command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    suffix = ".png" if flag == "--plot" else ".html"
    for place in (f"file/a{suffix}", f"{'n' * 300}{suffix}"):
        code, error = said(monkeypatch, capsys, *names, *arguments(command), flag, place)
        assert (code, f"error: {place}: cannot be written: " in error) == (2, True), error
    assert os.listdir() == ["file"]


def test_two_options_do_not_write_one_file(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, error = said(monkeypatch, capsys, "bench", "comm", "--json", "a", "--csv", tmp_path / "a")
    assert (code, "two options name it" in error) == (2, True)


def test_a_plot_of_no_image_type_is_refused_first(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, error = said(monkeypatch, capsys, "bench", "comm", "--plot", tmp_path / "a.txt")
    assert (code, "expected one that ends in .png" in error) == (2, True)
