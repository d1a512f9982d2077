"""The session on a GPU: parts, their time, what is written when, verdicts. A slow test runs its parts whole."""

import json
import sys
import zipfile

import pytest

pytest.importorskip("torch")

import gpu_session
from contest.targets import verdicts
from gpu_session import Part, run_parts, unpack


def python(code):
    return [sys.executable, "-c", code]


def test_every_part_gets_its_time_and_what_is_cut_off_loses_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "GRACE_S", 0.5)
    chosen = [
        Part("fails", 0.2, [python("print('a | b'); 1 / 0")]),
        Part(
            "hangs", 0.2, [python("print('begun', flush=True); import time; time.sleep(60)"), python("print('later')")]
        ),
        Part("ends", 0.6, [[*python(f"import sys; open(r'{tmp_path}/left', 'w').write(sys.argv[1])"), "{seconds}"]]),
    ]
    session = run_parts(chosen, tmp_path, 6 / 60)
    ended = {name: part["ended"] for name, part in session["parts"].items()}
    assert ended == {"fails": ["exit code 1"], "hangs": ["ended: out of time", "no time left"], "ends": ["done"]}
    assert session["parts"]["hangs"]["last"] == "begun"
    assert 0 < int((tmp_path / "left").read_text()) <= 6
    assert json.loads((tmp_path / "session.json").read_text()) == session
    assert "a / b" not in (tmp_path / "session.md").read_text()
    assert "ZeroDivisionError" in (tmp_path / "session.md").read_text()


def row(group, times, **more):
    return {"group": group, "forward_ms": [], "both_ms": times, **more}


def test_verdicts_are_those_of_the_files(tmp_path):
    shape = {"name": "s", "tokens": 64, "width": 32, "experts": 4, "top_k": 2, "hidden": 16, "zipf": 0.0}
    least = 2 * (64 * 32 + 2 * 128 * 16) + 8 * 128
    even = {
        "dense MLP": row("limit", [9.0, 9.0, 9.0]),
        "moeport": row("ours", [10.0, 10.0, 10.0], held=1.5 * least, waits=0),
        "slow": row("peer", [13.0, 13.0, 13.0]),
        "fast": row("peer", [10.2, 10.2, 10.2]),
        "broken": row("peer", [1.0, 1.0, 1.0], reason="fails"),
    }
    skewed = {"moeport": row("ours", [12.0, 12.0, 12.0])}
    cells = [{"shape": shape, "rows": even}, {"shape": shape | {"zipf": 1.0}, "rows": skewed}]
    step = {"cells": [{"name": "844m", "rows": {"moeport": {"mfu": 0.41}}}]}
    for path, found in (
        ("layer/layer.json", {"cells": cells, "terms": {"dtype": "bfloat16"}}),
        ("step/step.json", step),
        ("quickstart/run/summary.json", {"tokens_per_second": 175_000.0}),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(found))
    assert [(each.target, each.measured, each.word) for each in verdicts(tmp_path)] == [
        ("s: of the dense MLP's rate", "0.90", "MET"),
        ("s: times the best peer (fast)", "1.02", "MISSED"),
        ("s: held over the least", "1.50", "MISSED"),
        ("s: waits of the host", "0", "MET"),
        ("s Zipf(1): time over even loads", "1.20", "MISSED"),
        ("844m: MFU", "41.0%", "MET"),
        ("quickstart, a step: tokens/s", "-", "NOT MEASURED"),
        ("quickstart, moeport train: tokens/s", "175,000", "MET"),
    ]


def test_without_files_nothing_is_met(tmp_path):
    assert {each.word for each in verdicts(tmp_path)} == {"NOT MEASURED"}


def test_wheels_are_unpacked_without_an_installer(tmp_path):
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "NUMBER = 3\n")
    assert unpack(tmp_path, tmp_path / "site") == 1
    assert (tmp_path / "site" / "some" / "__init__.py").read_text() == "NUMBER = 3\n"


def test_what_is_missing_is_named_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_session, "NEEDED", ("numpy", "no_such_module"))
    assert gpu_session.main([str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "not importable: no_such_module; put their wheels into a folder" in capsys.readouterr().out
    assert not (tmp_path / "out" / "session.json").exists()


def test_an_unknown_part_is_refused(tmp_path, capsys):
    assert gpu_session.main([str(tmp_path), "--only=steps", "--device=cpu"]) == 2
    assert "--only: steps: unknown; expected some of tests, trials, layer" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_session_runs_small_on_the_cpu(tmp_path):
    out = tmp_path / "out"
    assert gpu_session.main([str(out), "--device", "cpu", "--tiny", "--minutes", "5"]) == 1
    session = json.loads((out / "session.json").read_text())
    assert list(session["parts"]) == ["tests", "trials", "layer", "step", "quickstart"]
    assert {how for part in session["parts"].values() for how in part["ended"]} == {"done"}
    assert session["verdicts"][0]["word"] == "MET"
    assert [each["target"] for each in session["verdicts"] if each["word"] == "NOT MEASURED"] == []
