import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from moeport.errors import DataError
from moeport.training.metrics import (
    EvaluationMetrics,
    MetricsLog,
    iterate_metrics,
    read_metrics,
)
from moeport.training.metrics_table import DERIVED, ROWS, StepMetrics, scalars
from moeport.training.metrics_thinning import Thinning, stride
from moeport.training.run_metrics import RunMetrics
from tests.training.metrics_examples import STEP

RARE = {"profiled", "fill_rate", "save_time", "local_share", "loss_by_objective"}
"""Left out of the file while they have their default."""


def write(run_dir, steps, resume_step=None, **options):
    with MetricsLog(run_dir, resume_step=resume_step) as log:
        for step in steps:
            log.step(replace(STEP, step=step, **options))
            if step % 2 == 0:
                log.evaluation(EvaluationMetrics(step, val_loss=3.0 + step, val_bits_per_byte=1.5))


def test_records_are_read_back_as_written(tmp_path):
    with MetricsLog(tmp_path, resume_step=None) as log:
        log.step(STEP)
        log.step(replace(STEP, step=2, mfu=None))
        log.evaluation(EvaluationMetrics(2, 3.5, 1.7))
    steps, evaluations = read_metrics(tmp_path / "metrics.jsonl")
    assert steps == [STEP, replace(STEP, step=2, mfu=None)]
    assert evaluations == [EvaluationMetrics(2, 3.5, 1.7)]
    assert list(iterate_metrics(tmp_path / "metrics.jsonl")) == steps + evaluations


def test_a_line_has_the_documented_keys(tmp_path):
    write(tmp_path, [1, 2])
    first, _, evaluation = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {name: value for name, value in asdict(STEP).items() if name not in RARE}
    assert list(json.loads(evaluation)) == ["step", "val_loss", "val_bits_per_byte"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_null_in_valid_json(tmp_path, value):
    write(tmp_path, [1], loss=value, expert_load=[[0.5, value]])

    def refuse(name):
        raise AssertionError(name)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is None
    assert record["expert_load"] == [[0.5, None]]
    (step,), _ = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(step.loss)
    assert step.total_loss == STEP.total_loss


def test_each_record_is_in_the_file_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path, resume_step=None)
    log.step(STEP)
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 1
    log.close()


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_partial_last_line_is_not_read(tmp_path, cut):
    write(tmp_path, [1, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -cut - 1])
    steps, _ = read_metrics(path)
    assert [step.step for step in steps] == [1]


def test_a_broken_line_before_the_last_is_an_error_with_its_place(tmp_path):
    write(tmp_path, [1, 3])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{first[:40]}\n{second}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is not a metrics record"):
        read_metrics(path)


def test_a_record_without_a_key_is_an_error_with_its_place(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: has no loss"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_resuming_drops_later_records_and_a_partial_last_line(tmp_path):
    write(tmp_path, range(1, 8))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step":8,"lo')
    write(tmp_path, [5, 6], resume_step=4, loss=1.0)
    steps, evaluations = read_metrics(path)
    assert [(step.step, step.loss) for step in steps] == [(1, 8.3), (2, 8.3), (3, 8.3), (4, 8.3), (5, 1.0), (6, 1.0)]
    assert [evaluation.step for evaluation in evaluations] == [2, 4, 6]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_after_a_record_that_lost_only_its_line_end(tmp_path):
    write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write(tmp_path, [3], resume_step=1)
    assert [step.step for step in read_metrics(path)[0]] == [1, 3]


def test_resuming_without_a_file_starts_one(tmp_path):
    write(tmp_path, [6], resume_step=5)
    assert [step.step for step in read_metrics(tmp_path / "metrics.jsonl")[0]] == [6]


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [1])
    assert [step.step for step in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1]


def test_every_derived_value_has_a_row_and_every_tag_is_used_once():
    properties = {name for name, value in vars(StepMetrics).items() if isinstance(value, property)}
    assert properties == set(DERIVED)
    tags = [row.tag for rows in ROWS.values() for row in rows.values() if row.tag]
    assert len(tags) == len(set(tags))


def test_scalars_leave_out_what_a_run_does_not_have():
    tags = scalars(STEP)
    assert tags["performance/mfu"] == STEP.mfu
    assert not {tag for tag in tags if "capacity" in tag or "communication" in tag or tag.startswith("moe/drop_rate/")}
    assert "performance/mfu" not in scalars(replace(STEP, mfu=None))
    shared = replace(STEP, exchanged_bytes_per_layer=[[1_000_000, 0], [500_000, 2_000_000]])
    sent = {tag: value for tag, value in scalars(shared).items() if tag.startswith("communication/")}
    assert sent == {"communication/inside_nodes_mb": 1.5, "communication/between_nodes_mb": 2.0}


def test_metrics_need_no_framework():
    code = "import sys; import moeport.training.metrics; assert not {'torch', 'tensorboard'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("step", "numbers", "expected"),
    [
        (1_000_000, 1, 1),
        (2000, 24, 1),
        (43_690, 24, 1),
        (43_691, 24, 2),
        (67, 61 * 256, 1),
        (68, 61 * 256, 2),
        (1_000_000, 61 * 256, 16_384),
    ],
)
def test_the_stride_doubles_when_there_are_too_many_numbers(step, numbers, expected):
    assert stride(step, numbers) == expected


def thinned(path, steps, resume_step=None, interval=None):
    """The lines of a file of a model of 2 x 8 experts, whose last step is 200."""
    with MetricsLog(path, resume_step, Thinning(interval, last_step=200)) as log:
        for step in steps:
            log.step(replace(STEP, step=step, expert_load=[[0.125] * 8] * 2))
    return (path / "metrics.jsonl").read_text().splitlines()


def test_long_runs_keep_all_numbers_and_ever_fewer_lists(tmp_path, monkeypatch):
    monkeypatch.setattr("moeport.training.metrics_thinning.NUMBERS", 320)  # the loads of 20 steps
    (tmp_path / "whole").mkdir()
    whole = thinned(tmp_path / "whole", range(1, 201))
    steps, _ = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [step.loss for step in steps] == [STEP.loss] * 200
    loads = [step.step for step in steps if step.expert_load]
    assert loads == [*range(1, 21), *range(22, 42, 2), *range(44, 84, 4), *range(88, 168, 8), *range(176, 201, 16), 200]
    layers = [step.step for step in steps if step.drop_rate_per_layer]
    assert set(loads) <= set(layers)
    assert len(loads) < len(layers) < 200
    (tmp_path / "parted").mkdir()
    thinned(tmp_path / "parted", range(1, 91))
    assert thinned(tmp_path / "parted", range(61, 201), resume_step=60) == whole


def test_loads_are_written_as_often_as_asked(tmp_path):
    thinned(tmp_path, range(1, 201), interval=50)
    steps, _ = read_metrics(tmp_path / "metrics.jsonl")
    assert [step.step for step in steps if step.expert_load] == [1, 50, 100, 150, 200]
    assert all(step.drop_rate_per_layer for step in steps)


def test_a_file_of_an_older_version_is_read(tmp_path):
    new = {"dead_experts", "load_entropy", "imbalance_per_layer", "dead_experts_per_layer", "load_entropy_per_layer"}
    old = {name: value for name, value in asdict(STEP).items() if name not in {*new, *RARE}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    ((step,), _) = read_metrics(tmp_path / "metrics.jsonl")
    assert (step.expert_load, step.profiled) == (STEP.expert_load, 0)
    assert math.isnan(step.dead_experts)


@pytest.mark.slow
def test_a_long_run_of_many_experts_takes_a_bounded_file(tmp_path):
    """Of 20,000 steps of 61 x 256 experts, less than 5 kB a step."""
    many = replace(STEP, expert_load=[[0.003906] * 256] * 61, drop_rate_per_layer=[0.012345] * 61)
    with MetricsLog(tmp_path, None, Thinning(last_step=20_000)) as log:
        for step in range(1, 20_001):
            log.step(replace(many, step=step))
    assert (tmp_path / "metrics.jsonl").stat().st_size < 20_000 * 5_000


def test_a_record_of_another_model_is_said(tmp_path):
    write(tmp_path, [1])
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.step(replace(STEP, step=2, expert_load=[[0.25] * 4] * 2))
    with pytest.raises(DataError, match=r"the record of step 2 does not fit: step 2 has 9 values, expected 5"):
        RunMetrics.read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": 10**400}, "loss is 1000"),
        ({"expert_load": [1]}, r"expert_load is \[1\], expected a list of lists of numbers"),
        ({"capacity_per_layer": [None]}, r"capacity_per_layer is \[null\], expected a list of integers"),
        ({"drop_rate_per_layer": [[1]]}, r"drop_rate_per_layer is \[\[1\]\], expected a list of numbers"),
    ],
)
def test_values_of_another_form_are_refused(tmp_path, values, message):
    write(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | values) + "\n")
    with pytest.raises(DataError, match=message):
        read_metrics(path)
