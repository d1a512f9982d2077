"""`moeport compare`: exit codes, files and messages."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeport.cli.main import main
from tests.training.tiny import tiny_values

pytest.importorskip("torch")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `moeport compare` in a folder with three configs; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name, moe in (("topk", {}), ("switch", {"router": {"name": "switch"}}), ("broken", {"router_z_loss": 1e30})):
        values = tiny_values(tmp_path, model={"moe": moe}, training={"evaluation_interval": 0})
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values))

    def run_command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeport", "compare", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run_command


def test_it_trains_prints_and_writes(run):
    command = ("topk.yaml", "switch.yaml", "--output-dir", "out", "--steps", "2", "--ranks", "2")
    code, out, err = run(*command, "--json", "new/c.json", "--markdown", "c.md")
    assert (code, err) == (0, "")
    assert "run 2 of 2: switch, seed 0, about" in out
    assert out.splitlines()[-1] == "page: out/compare.html"
    figures = json.loads(Path("new/c.json").read_text())["configs"][1]["mean"]
    assert f"{figures['val_loss']:.4f}" in out
    assert "N = 2 ranks" in Path("c.md").read_text()
    assert len(Path("out/topk/metrics.jsonl").read_text().splitlines()) == 3
    code, out, _ = run(*command)
    assert code == 0
    assert "2 runs, 2 of them already finished" in out
    assert "run 1 of" not in out


def test_a_failing_run_gives_exit_code_1_after_the_table(run):
    code, out, err = run("topk.yaml", "broken.yaml", "--output-dir", "out", "--steps", "2")
    assert code == 1
    assert "broken: NonFiniteError: step 1: " in out
    assert out.splitlines()[-1] == "page: out/compare.html"
    assert err.startswith("error:\n1 of 2 runs failed:\n  out/broken: NonFiniteError")


def test_what_the_user_can_mend_gives_exit_code_2_and_trains_nothing(run):
    code, _, err = run("topk.yaml", "switch.yaml", "--seeds", "1,x")
    assert code == 2
    assert err == "error: --seeds 1,x: not a list of seeds; expected whole numbers from 0, as in --seeds 0,1,2\n"
    values = yaml.safe_load(Path("switch.yaml").read_text())
    values["training"]["seed"] = 3
    Path("switch.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run("topk.yaml", "switch.yaml", "--output-dir", "out")
    assert code == 2
    assert "  switch: training.seed is 3, but 0 in topk\n" in err
    assert not Path("out").exists()
