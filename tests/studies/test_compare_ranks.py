"""Runs of a comparison on several ranks: what is started, and what its end means."""

import sys
from pathlib import Path

import pytest
from rich.console import Console

from moeport.config import load_config
from moeport.errors import InterruptedRunError, NonFiniteError, RunError
from moeport.studies.compare.on_ranks import Ranks
from moeport.studies.compare.plan import plan
from tests.studies.test_compare import write_configs

QUIET = Console(quiet=True)


@pytest.fixture
def run(tmp_path):
    return plan(write_configs(tmp_path, {"topk": {}}), tmp_path / "out", ["parallelism.expert=2"]).runs[0]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (Ranks(1, 2), ["launch", "FILE", "--ranks-per-node", "2", "--resume", "--run"]),
        (Ranks(2, 1), ["emulate", "--nodes", "2", "--ranks-per-node", "1", "--", "train", "FILE", "--resume"]),
        (
            Ranks(2, 1, "200mbit"),
            [
                "emulate",
                "--nodes",
                "2",
                "--ranks-per-node",
                "1",
                "--inter",
                "200mbit",
                "--",
                "train",
                "FILE",
                "--resume",
            ],
        ),
    ],
)
def test_the_command(ranks, expected):
    command = ranks._command(Path("FILE"))
    assert command[command.index("moeport") + 1 :] == expected


@pytest.mark.parametrize(
    ("code", "said", "kind", "message"),
    [
        (130, "", InterruptedRunError, "interrupted"),
        (2, "note\nerror: parallelism.expert: 3\nmore", RunError, "exit code 2: parallelism.expert: 3"),
        (1, "error: step 3: the loss is not finite", NonFiniteError, "exit code 1: step 3: the loss is not finite"),
        (1, "a\nb\n", RunError, r"exit code 1: a \| b"),
        (1, "", RunError, "it said nothing"),
    ],
)
def test_what_an_end_means(run, monkeypatch, code, said, kind, message):
    program = [sys.executable, "-c", f"import sys; sys.stderr.write({said!r}); sys.exit({code})"]
    monkeypatch.setattr(Ranks, "_command", lambda ranks, file: program)
    with pytest.raises(kind, match=message):
        Ranks(1, 2)(run, QUIET)
    config = load_config(run.dir.parent / "configs" / "topk.yaml")
    assert (config.parallelism.expert, config.run.dir) == (2, run.dir)
