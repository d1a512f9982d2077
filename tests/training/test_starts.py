"""Starts of a run: what is recorded, and what the report says of them."""

import json
import platform

from moeport.training import starts as module
from moeport.training.report import write_report
from moeport.training.starts import STARTS_FILE, read_starts, record_start
from tests.training.metrics_examples import write_run

DATA = "text        12 documents, 0.1 MB, 3,456 tokens; 2 documents held out"


def test_each_start_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/moeport", "train", "a b.yaml", "--resume"])
    for step in (0, 20):
        record_start(tmp_path, step, 4, DATA)
    starts = read_starts(tmp_path)
    assert [(start.step, start.ranks) for start in starts] == [(0, 4), (20, 4)]
    assert {start.command for start in starts} == {"moeport train 'a b.yaml' --resume"}
    assert {start.host for start in starts} == {platform.node()}
    assert len((tmp_path / STARTS_FILE).read_text().splitlines()) == 2


def test_python_m_is_named_as_its_module(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/lib/python3/site-packages/moeport/__main__.py", "train", "c.yaml"])
    record_start(tmp_path, 0, 1, DATA)
    assert [start.command for start in read_starts(tmp_path)] == ["moeport train c.yaml"]


def test_damaged_lines_neither_stop_a_start_nor_a_report(tmp_path):
    write_run(tmp_path, steps=30)
    record_start(tmp_path, 0, 1, DATA)
    good = (tmp_path / STARTS_FILE).read_text()
    wrong = json.loads(good) | {"step": "many"}
    for text in ("", "{", "[" * 10_000, "[]", "null", json.dumps(wrong), '{"step": 1}', "\x00\xff"):
        (tmp_path / STARTS_FILE).write_text(good + text + "\n", encoding="latin-1")
        assert [start.step for start in read_starts(tmp_path)] == [0]
        write_report(tmp_path)
    record_start(tmp_path, 10, 1, DATA)
    assert [start.step for start in read_starts(tmp_path)] == [0, 10]


def test_the_report_says_when_where_and_how_and_marks_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moeport", "train", "c.yaml"])
    write_run(tmp_path, steps=30)
    for step in (0, 12, 1000):  # the last is after a step that the metrics do not have
        record_start(tmp_path, step, 2, DATA)
    page = write_report(tmp_path).read_text()
    first = read_starts(tmp_path)[0]
    for text in (f"{first.time} UTC", "moeport train c.yaml", platform.node(), "12 documents, 0.1 MB, 3,456 tokens"):
        assert text in page
    assert "resumed 12<" in page
    assert "resumed 1,000<" not in page


def test_a_start_has_the_commit_and_those_of_older_versions_had_none(tmp_path, monkeypatch):
    write_run(tmp_path, steps=3)
    monkeypatch.setattr(module, "commit", lambda: None)
    record_start(tmp_path, 0, 1, DATA)
    older = {
        name: value for name, value in json.loads((tmp_path / STARTS_FILE).read_text()).items() if name != "commit"
    }
    (tmp_path / STARTS_FILE).write_text(json.dumps(older) + "\n")
    assert "<dt>commit</dt>" not in write_report(tmp_path).read_text()
    monkeypatch.setattr(module, "commit", lambda: "0123456789abcdef-dirty")
    record_start(tmp_path, 2, 1, DATA)
    assert [start.commit for start in read_starts(tmp_path)] == ["", "0123456789abcdef-dirty"]
    assert "<dt>commit</dt><dd>0123456789abcdef-dirty</dd>" in "".join(write_report(tmp_path).read_text().split())


def test_a_run_without_the_file_has_a_report(tmp_path):
    write_run(tmp_path, steps=3)
    assert "resumed" not in write_report(tmp_path).read_text()
