import sys
from types import SimpleNamespace

import pytest

from moeport.cli.main import main


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs `moeport bench ARGUMENTS` as a process of a job with these settings; its exit code and stderr."""

    def run(*arguments, **settings):
        for name in ("RANK", "LOCAL_RANK", "MS_ROLE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"MASTER_ADDR": "127.0.0.1", "COLUMNS": "200", **settings}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["moeport", "bench", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return SimpleNamespace(returncode=exit_.value.code, stderr=capsys.readouterr().err)

    return run
