"""What a run leaves, as far as it does not depend on time: two runs of a config leave the same."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tests.faults.runs import NOTHING, Try, config, litter

SMALL: dict[str, Any] = {
    "model": {"num_layers": 1},
    "training": {"steps": 4, "evaluation_interval": 2},
    "checkpoint": {"interval": 1, "keep_last": 2},
    "metrics": {"report": True},
    "backend": {"dtype": "float32"},
}
"""A run that writes every kind of file in a few steps."""
TIMED = {"wall_time", "tokens_per_second", "peak_memory", "compile_seconds", "compilations"}
"""Entries of the summary that depend on the machine's load."""


def outcome(run_dir):
    """By name: bytes of checkpoints, each value of metrics and summary, the curves of the report."""
    run_dir = Path(run_dir)
    found: dict[str, Any] = {}
    for file in sorted(run_dir.glob("checkpoints/*/*.safetensors")):
        found[f"{file.parent.name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(run_dir.glob("checkpoints/*/meta.json")):
        meta = json.loads(file.read_text())
        found[file.parent.name] = [meta["step"], meta["tokens"], meta["val_loss"]]
    for number, line in enumerate((run_dir / "metrics.jsonl").read_text().splitlines()):
        found |= {f"line {number}: {key}": value for key, value in json.loads(line).items()}
    summary = json.loads((run_dir / "summary.json").read_text())
    found |= {f"summary: {key}": value for key, value in summary.items() if key not in TIMED}
    report = (run_dir / "report.html").read_text()
    found |= {f"report: {curve}": True for curve in re.findall(r'(?:points|d)="([^"]+)"', report)}
    found["report"] = report.rstrip().endswith("</html>")
    return found


class Reference:
    """What an uninterrupted run leaves: the values in which two such runs agree."""

    def __init__(self, folder):
        found = []
        for name in ("first", "second"):
            place = folder / name
            place.mkdir(parents=True)
            run = Try(NOTHING, ["train", config(place, **SMALL)], place / "log")
            assert run.wait() == 0, run.said()
            found.append(outcome(place / "run"))
        one, other = found
        self.values = {name: value for name, value in one.items() if other.get(name) == value}
        assert any("model-00000-of-00001.safetensors" in name for name in self.values)
        self.lines = sum(name.endswith(": step") for name in self.values)

    def differences(self, folder):
        """How the run in `folder` differs; empty if it does not."""
        try:
            found = outcome(folder / "run")
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        wrong = [name for name, value in self.values.items() if found.get(name) != value]
        lines = sum(name.endswith(": step") for name in found)
        if lines != self.lines:
            wrong.append(f"{lines} records, expected {self.lines}")
        return "; ".join([*wrong[:4], *litter(folder)])
