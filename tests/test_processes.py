"""Where a process finds packages, how it ended and what it said last."""

import os
import signal
import sys

from moeport.processes import ending_of, last_line, python_path


def test_endings_in_words():
    assert [*map(ending_of, (0, -signal.SIGKILL, -70))] == ["exit code 0", "SIGKILL", "signal 70"]


def test_the_last_line_that_is_not_blank():
    assert [*map(last_line, ("a\n b \n\n \n", "\n", ""))] == ["b", "", ""]


def test_relative_paths_become_absolute(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "x", "/y"])
    assert python_path().split(os.pathsep) == [os.getcwd(), os.path.join(os.getcwd(), "x"), "/y"]
