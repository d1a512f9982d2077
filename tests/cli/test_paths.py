"""Paths on the command line that no shell has expanded, as in --output=~/x or in a quoted word."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moeport.cli.main import app, main
from moeport.cli.options import expands_paths


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "$x"))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$x").mkdir()


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["moeport", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def every_command(typer_app, prefix=()):
    for info in typer_app.registered_commands:
        yield (*prefix, info.name or info.callback.__name__), info.callback
    for group in typer_app.registered_groups:
        yield from every_command(group.typer_instance, (*prefix, group.typer_instance.info.name))


def test_every_command_expands_its_paths():
    code = expands_paths(lambda: None).__code__
    assert {name for name, callback in every_command(app) if callback.__code__ is not code} == set()


def test_each_path_is_expanded_once():
    seen = {}

    def command(one: Path, many: list[Path], text: str = "~", none: Path | None = None):
        seen.update(one=one, many=many, text=text, none=none)

    own = typer.Typer()
    own.command()(expands_paths(command))
    assert CliRunner().invoke(own, ["$PLACE/a", "~/b", "$$PLACE"]).exit_code == 0
    home = Path.home()
    assert seen == {"one": home / "$x/a", "many": [home / "b", Path("$PLACE")], "text": "~", "none": None}


def test_files_are_read_and_written_where_the_path_leads(monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("run: {dir: x}\n")
    assert run(monkeypatch, "config", "check", "~/c.yaml") == 0
    assert run(monkeypatch, "config", "schema", "--output=$PLACE/schema.json") == 0
    assert (tmp_path / "$x" / "schema.json").is_file()
    assert not list(tmp_path.glob("*PLACE*")) + list(tmp_path.glob("~*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "check", "$UNSET/c.yaml"),
        ("config", "schema", "-o", "${UNSET}/s.json"),
        ("generate", "$UNSET", "--prompt", "x"),
        ("parity", "compare", "a", "$UNSET/b"),
        ("parity", "compare", "a", "b", "--json", "$UNSET/b.json"),
        ("capacity", "$UNSET"),
        ("compare", "a.yaml", "$UNSET/b.yaml"),
        ("plan", "c.yaml", "--from", "$UNSET/x.json"),
    ],
)
def test_a_variable_that_is_not_set_is_named(monkeypatch, capsys, arguments, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "the environment variable UNSET is not set" in error
    assert error.strip().count("\n") == 0
    assert sorted(tmp_path.rglob("*")) == before
