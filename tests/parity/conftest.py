"""Fixtures of the tests of parity."""

import sys
from typing import Any

import pytest

from moeport.cli.main import main


@pytest.fixture
def parity(monkeypatch, capsys, tmp_path):
    """Run `moeport parity` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeport", "parity", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run_command
