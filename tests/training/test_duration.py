import io
from dataclasses import replace

import pytest
from rich.console import Console

from moeport.training.duration import duration
from moeport.training.report import write_report
from moeport.training.summary import DryRun, RunSummary
from tests.training.metrics_examples import SUMMARY, write_run


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (130, "2m10s"),
        (3599.6, "1h00m"),
        (11100, "3h05m"),
        (86399, "1d00h"),
        (187200, "2d04h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def printed(value):
    text = io.StringIO()
    Console(file=text, width=120, force_terminal=False).print(value)
    return text.getvalue()


def test_wall_time_reads_alike_wherever_it_is_shown(tmp_path):
    """3 h 5 min 33 s, on the closing panel, in the plan of a dry run and in the report."""
    seconds = 11133.0
    summary = replace(RunSummary(**SUMMARY), wall_time=seconds, compilations=2, compile_seconds=seconds)
    assert f"{duration(seconds)}, at most" in printed(summary)
    assert f"2 graphs in {duration(seconds)}" in printed(summary)
    dry = DryRun(1, 1, 1, 1, steps=1000, epochs=1.0, seconds_per_step=seconds / 1000, device="cpu", dtype="float32")
    assert f"about {duration(seconds)} in total" in printed(dry)
    write_run(tmp_path, 3, summary=SUMMARY | {"wall_time": seconds})
    assert f"<strong>{duration(seconds)}</strong>" in write_report(tmp_path).read_text()
    assert duration(seconds) == "3h06m"
