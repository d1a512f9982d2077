"""`moeport report`: of runs that train, and what it refuses."""

import sys

import pytest

from moeport.cli.main import main
from tests.training.metrics_examples import write_run


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; returns exit code, stdout and stderr."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["moeport", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return run_command


@pytest.fixture
def unfinished(tmp_path):
    """A run that is in the middle of writing a line."""
    folder = tmp_path / "mine"
    write_run(folder, 12, summary=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step":13,"lo')
    return folder


def test_the_report_of_a_run_that_trains_changes_nothing_else_in_its_folder(run, unfinished):
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    assert run(unfinished) == (0, f"report: {unfinished}/report.html\n", "")
    page = (unfinished / "report.html").read_text()
    assert "This run is not finished: 12" in page
    after = {path.name: path.read_bytes() for path in unfinished.iterdir() if path.name != "report.html"}
    assert after == before


def test_a_report_elsewhere_leaves_the_folder_as_it_is(run, unfinished, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.iterdir()}
    page = tmp_path / "pages" / "mine.html"
    assert run(unfinished, "-o", page)[:2] == (0, f"report: {page}\n")
    assert "<h1>mine</h1>" in page.read_text()
    assert {path.name: path.stat().st_mtime_ns for path in unfinished.iterdir()} == before


def test_what_is_no_run_or_no_page_is_refused(run, unfinished, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "none"], f"{tmp_path}/none: no such folder; expected a run folder"),
        ([unfinished / "config.yaml"], f"{unfinished}/config.yaml: is not a folder; expected a run folder"),
        ([tmp_path / "empty"], f"{tmp_path}/empty/metrics.jsonl: no such file; expected the metrics of a run folder"),
        ([unfinished, "-o", "page.txt"], "--output page.txt: expected a name that ends in .html"),
    ):
        code, _, error = run(*arguments)
        assert (code, message in error.replace("\n", " ")) == (2, True), error
