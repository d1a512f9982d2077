"""Parts of `moeport kit` on the real front end: its results say themselves that there was no CANN."""

import json

from moeport.kit import kit
from moeport.kit.checks import device, kernels
from moeport.kit.result import Outcome
from moeport.kit.task import EVENTS_FILE, Task


def task(folder, part, dtypes=()):
    return Task(part, 0, "torch", "npu", dtypes, 1, 1, True, str(folder))


def test_results_say_that_there_is_no_real_cann(tmp_path):
    found = device.work(task(tmp_path, "device"))
    result = device.judge([Outcome(found)])
    assert result.verdict == "pass", result.summary
    machine = kit._machine(found)
    assert machine["device"].startswith("npu (")
    assert (machine["CANN"], machine["Ascend driver"]) == ("a folder without a version", "none found")
    assert "torch_npu" in machine["versions"]


def test_fused_kernels_are_compared_and_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "REPETITIONS", 1)
    value = kernels.work(task(tmp_path, "kernels", ("float32",)))
    events = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    result = kernels.judge([Outcome(value, events)])
    assert result.verdict == "pass", result.summary
    fused = {event["kernel"] for event in events if "default_s" in event}
    assert fused == {"rms_norm", "rope", "attention", "swiglu", "grouped_mlp", "permute", "unpermute"}
    assert "are fused" in result.summary
