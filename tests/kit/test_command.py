"""`moeport kit` on the command line."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from moeport.cli.main import app
from moeport.errors import UserError
from moeport.kit import kit
from moeport.kit.pack import Contents, PartRecord, write_kit
from moeport.kit.private import Scrubber
from moeport.kit.read import read_kit
from moeport.kit.result import Result


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The options that the kit is run with, in a folder of its own."""
    seen = []
    monkeypatch.chdir(tmp_path)

    def run_kit(options, say):
        seen.append(options)
        return 1

    monkeypatch.setattr(kit, "run_kit", run_kit)
    return seen


def invoke(*arguments):
    return CliRunner().invoke(app, ["kit", *arguments])


def test_options_reach_the_kit_and_its_exit_code_comes_back(asked):
    arguments = [
        "--backend",
        "mindspore",
        "--device",
        "cpu",
        "--ranks",
        "3",
        "--skip",
        "comm",
        "--quick",
        "-o",
        "x.zip",
    ]
    assert invoke(*arguments).exit_code == 1
    (options,) = asked
    assert (options.backend, options.device, options.ranks, options.quick) == ("mindspore", "cpu", 3, True)
    assert "comm" not in options.parts
    assert options.output.name == "x.zip"


@pytest.mark.parametrize("options", [["--quick"], ["--ranks", "2"], ["--output", "x.zip"]], ids=" ".join)
def test_options_of_the_checks_are_refused_where_nothing_is_checked(asked, options):
    done = invoke(*options, "show", "kit.zip")
    assert done.exit_code == 2
    assert f"{options[0]} says what to check; moeport kit show checks nothing" in " ".join(done.output.split())


def test_the_file_is_named_after_the_day(asked):
    invoke()
    assert asked[0].output.name == f"moeport-kit-{datetime.now(UTC):%Y-%m-%d}.zip"


def test_an_older_file_is_kept_unless_told_otherwise(asked, tmp_path):
    (tmp_path / "x.zip").write_text("older")
    done = invoke("-o", "x.zip")
    assert isinstance(done.exception, UserError)
    assert "x.zip: already exists; name another file with -o, or replace it with --overwrite" in str(done.exception)
    assert not asked
    assert invoke("-o", "x.zip", "--overwrite").exit_code == 1


@pytest.mark.parametrize("place", ["missing.zip/x.zip", "."])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(asked, tmp_path, place):
    (tmp_path / "missing.zip").write_text("a file")
    assert isinstance(invoke("-o", place).exception, UserError)
    assert not asked


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "kit.zip"
    contents = Contents({"backend": "torch"}, {"device": "cpu"}, "2026-11-28 12:00 UTC")
    contents.parts.append(PartRecord("probe", "collectives", Result("pass", "every value is right"), 1.0))
    write_kit(path, contents, Scrubber({}))
    return path


def test_show_prints_a_file_and_writes_a_page(written, tmp_path):
    page = tmp_path / "page.html"
    done = invoke("show", str(written), "-o", str(page))
    assert done.exit_code == 0
    assert "every value is right" in done.output
    assert "every value is right" in page.read_text()


def test_show_refuses_what_is_no_file_of_the_kit(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK")
    done = invoke("show", str(path))
    assert isinstance(done.exception, UserError)
    assert done.exception.exit_code == 2


def run_whole(folder, *arguments, **environment):
    command = [sys.executable, "-m", "moeport", "kit", "-o", "kit.zip", *arguments]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 1500}
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **environment}, **options)
    return done, read_kit(folder / "kit.zip")


@pytest.mark.ranks
def test_a_part_runs_in_a_process_of_its_own(tmp_path):
    pytest.importorskip("torch")
    done, found = run_whole(tmp_path, "--parts", "device", "--backend", "torch", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [part["verdict"] for part in found.results["parts"]] == ["pass"]
    assert "pass in" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["kit.zip"]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_the_whole_kit(tmp_path, backend):
    pytest.importorskip(backend)
    planted = {"PLANTED_TOKEN": "planted-secret-42", "HOME": str(tmp_path)}
    done, found = run_whole(tmp_path, "--quick", "--backend", backend, "--device", "cpu", "--ranks", "3", **planted)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {part["verdict"] for part in found.results["parts"]} == {"pass"}
    everything = json.dumps(found.results) + "".join(found.files.values())
    for secret in ("planted-secret-42", str(tmp_path)):
        assert secret not in everything
