import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from moeport.training.metrics import EvaluationMetrics
from moeport.training.progress import Progress
from tests.training.metrics_examples import STEP

EXAMPLE = replace(
    STEP,
    step=100,
    loss=3.21009,
    lr=3e-3,
    grad_norm=0.912,
    tokens_per_second=12345.4,
    step_time=130 / 900,
    mfu=0.3119,
    imbalance=1.2345,
    drop_rate=0.0,
)


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def printed(console) -> str:
    return console.file.getvalue()


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def lines(console):
    return printed(console).splitlines()


def test_a_plain_line():
    console = plain_console()
    with Progress(1000, 0, 10, console) as progress:
        progress.step(EXAMPLE)
    assert lines(console) == [
        "step: 100/1000  loss: 3.2101  lr: 3.00e-03  grad_norm: 0.91  tps: 12,345  mfu: 31.2%  "
        "imbalance: 1.23  dropped: 0.0%  left: 2m10s"
    ]


def test_an_unknown_mfu_is_left_out_and_nan_is_shown():
    console = plain_console()
    with Progress(100, 0, 10, console) as progress:
        progress.step(replace(EXAMPLE, mfu=None, loss=math.nan))
    assert lines(console) == [
        "step: 100/100  loss: nan  lr: 3.00e-03  grad_norm: 0.91  tps: 12,345  imbalance: 1.23  dropped: 0.0%  left: 0s"
    ]


def test_plain_lines_come_at_the_interval_and_at_both_ends():
    console = plain_console()
    with Progress(26, 3, 10, console) as progress:
        for step in range(4, 27):
            progress.step(replace(EXAMPLE, step=step))
    assert [line.split()[1] for line in lines(console)] == ["4/26", "10/26", "20/26", "26/26"]


def test_evaluations_and_messages_in_plain_output():
    console = plain_console()
    with Progress(1000, 0, 10, console) as progress:
        progress.evaluation(EvaluationMetrics(200, 3.14159, 1.61803))
        progress.say("wrote [bold]runs/a[/bold] " + "x" * 100)
    assert lines(console) == [
        "step: 200/1000  val_loss: 3.1416  val_bits_per_byte: 1.6180",
        "wrote [bold]runs/a[/bold] " + "x" * 100,
    ]


def test_time_left_follows_recent_steps():
    console = plain_console()
    with Progress(1000, 0, 1, console) as progress:
        progress.step(replace(EXAMPLE, step=1, step_time=100.0))
        for step in range(2, 102):
            progress.step(replace(EXAMPLE, step=step, step_time=1.0))
    assert lines(console)[-1].endswith("left: 14m59s")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_console_stays_so(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, quiet=True)
    with Progress(1000, 0, 10, console) as progress:
        progress.step(EXAMPLE)
        progress.evaluation(EvaluationMetrics(100, 3.0, 1.5))
        progress.say("hello")
    assert printed(console) == ""


def test_a_terminal_gets_a_live_line_with_messages_above():
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    with Progress(1000, 99, 10, console) as progress:
        progress.say("evaluating")
        progress.step(EXAMPLE)
    output = printed(console)
    assert "evaluating" in output
    (last,) = (line for line in output.splitlines() if "100/1000" in line)
    for part in ("100/1000", "left 2m10s", "loss 3.2101", "lr 3.00e-03", "grad_norm 0.91", "tps 12,345", "mfu 31.2%"):
        assert part in last
    assert "imbalance 1.23" in last
    assert "dropped 0.0%" in last


def test_the_live_line_stays_one_line_on_a_narrow_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with Progress(1000, 0, 10, console) as progress:
        progress.step(EXAMPLE)
    last = re.split(r"\x1b\[2K", printed(console))[-1]
    assert re.fullmatch(r"\S+ +100/1000 +left 2m10s  loss 3.2101 .*…\n\x1b\[\?25h", last)
    assert len(last.splitlines()[0]) <= 60


def test_the_terminal_is_restored_after_an_error():
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError, match="out of memory"), Progress(1000, 0, 10, console):
        raise RuntimeError("out of memory")
    hide, show = "\x1b[?25l", "\x1b[?25h"
    output = printed(console)
    assert output.rfind(show) > output.rfind(hide)
