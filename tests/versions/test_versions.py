"""What `make versions` does around pip and pytest, and what the record promises."""

import json
import re
import shutil
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.versions import environments
from tests.versions.__main__ import RECORD, commit, git, merged
from tests.versions.combinations import BESIDE, CHECKS, COMBINATIONS, ROOT, Combination
from tests.versions.environments import interpreter, reason_of, resolve, run

CONFLICT = """\
ERROR: Cannot install numba==0.63 and numpy==2.5.5 because these package versions have conflicting dependencies.

The conflict is caused by:
    The user requested numpy==2.5.5
    numba 0.63 depends on numpy<2.5 and >=1.22
    numba 0.63 depends on numpy<2.5 and >=1.22
"""
NOTHING = """\
ERROR: Could not find a version that satisfies the requirement numpy==1.26.* (from versions: 2.1.0, 2.1.1)
ERROR: No matching distribution found for numpy==1.26.*
"""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        (NOTHING, "No matching distribution found for numpy==1.26.*"),
        (CONFLICT, "conflict: The user requested numpy==2.5.5; numba 0.63 depends on numpy<2.5 and >=1.22"),
        ("WARNING: slow\nERROR: no route to host (from https://host)\n", "no route to host"),
        ("", "no reason given"),
    ],
)
def test_the_reason_of_pip_is_one_line(errors, reason):
    assert reason_of(errors) == reason


def test_pip_is_asked_and_its_reason_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    combination = Combination("3.11", "2.13", "2")
    assert resolve(combination, sys.executable) == ({}, "No matching distribution found for numpy==2.*")


def test_only_an_interpreter_of_the_series_is_taken():
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert interpreter(own, ["/no/python", sys.executable]) == sys.executable
    assert interpreter("2.0", [sys.executable]) is None


def test_an_interpreter_without_pip_is_passed_over(tmp_path):
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    venv.create(tmp_path, symlinks=True)
    assert interpreter(own, [tmp_path / "bin" / "python", sys.executable]) == sys.executable


def test_where_no_series_is_found_this_interpreter_answers(monkeypatch):
    monkeypatch.setattr(environments, "PYTHONS", ("2.0",))
    assert environments.newest.__wrapped__() == sys.executable


def test_a_run_is_counted(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    found = run(Path(sys.prefix), [str(tmp_path / "test_it.py"), f"--rootdir={tmp_path}"])
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["test_it::test_b"]}


def test_a_run_that_ends_before_its_tests_is_a_failure(tmp_path):
    (tmp_path / "test_it.py").write_text("import os\ndef test_a(): os._exit(7)\n")
    found = run(Path(sys.prefix), [str(tmp_path / "test_it.py"), f"--rootdir={tmp_path}"])
    assert (found["passed"], found["failed"]) == (0, 1)
    assert found["failures"][0].startswith("pytest ended with 7: ")


def test_a_resolution_does_not_replace_a_run():
    first, second = list(COMBINATIONS)[:2]
    ran, found, refused = {"checks": "quick", "reason": ""}, {"reason": ""}, {"reason": "nothing"}
    assert merged({second: ran}, second, found) == {second: ran}
    assert merged({second: ran}, second, refused) == {second: refused}
    assert list(merged({second: ran}, first, found)) == [first, second]


def test_a_commit_says_whether_the_sources_differ_from_it(tmp_path):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    (tmp_path / "docs").mkdir()
    (tmp_path / "source.py").write_text("")
    for words in ("init", "add .", "-c user.name=A -c user.email=a@b.example commit -m One"):
        git(*words.split(), folder=tmp_path)
    head = git("rev-parse", "--short", "HEAD", folder=tmp_path)
    (tmp_path / "docs/versions.json").write_text("{}")
    assert commit(tmp_path) == head
    (tmp_path / "new.py").write_text("")
    assert commit(tmp_path) == f"{head} with changes"


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_names_files_that_exist(name):
    assert all((ROOT / each).exists() for each in CHECKS[name].arguments if each.startswith("tests/"))
    assert not any(each.startswith(("triton", "moeport")) for each in CHECKS[name].requirements("2"))


def test_what_goes_with_the_older_numpy_is_what_the_extra_asks_for():
    asked = [each.partition(";")[0] for each in PROJECT["optional-dependencies"]["mindspore"]]
    assert set(BESIDE["1.26"]) < set(asked)
    assert set(BESIDE["1.26"]) < set(CHECKS["check"].requirements("1.26"))


def test_what_the_package_promises_was_run():
    """Of every Python among its classifiers, a run of the record has passed, and so has its oldest PyTorch."""
    record = json.loads(RECORD.read_text())
    assert record.keys() <= COMBINATIONS.keys()
    passed = [entry for entry in record.values() if entry.get("passed") and not entry["failed"]]
    promised = {found for each in PROJECT["classifiers"] if (found := re.search(r":: (3\.\d+)$", each))}
    assert {found[1] for found in promised} == {entry["python"] for entry in passed}
    assert PROJECT["optional-dependencies"]["torch"] == [f"torch>={_oldest(passed)}"]


def _oldest(entries):
    series = [entry["torch"] for entry in entries if entry["torch"]]
    return min(series, key=lambda name: [int(part) for part in name.split(".")])
