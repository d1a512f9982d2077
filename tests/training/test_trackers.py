"""The seam to experiment trackers: what they are given, and that neither their failures nor their speed matter."""

import json
import sys
import threading
import time
from dataclasses import replace

import pytest

from moeport.config import load_config
from moeport.errors import ConfigError, InterruptedRunError, UserError
from moeport.training.metrics import EvaluationMetrics, MetricsLog, read_metrics
from moeport.training.run import train
from moeport.training.trackers import feed as feeds
from moeport.training.trackers.feed import Feed
from moeport.training.trackers.mlflow import MLflow
from moeport.training.trackers.tracker import Ending, Row, Start, Tracker, flat, numbers
from moeport.training.trackers.tracking import Trackers, _wanted, check_trackers, open_trackers
from tests.training.metrics_examples import STEP
from tests.training.tiny import tiny_config


def events_of(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def text_of(events, tag):
    """The JSON of a text."""
    (event,) = (
        events.Tensors(f"{tag}/text_summary")
        if f"{tag}/text_summary" in events.Tags()["tensors"]
        else (events.Tensors(tag))
    )
    return json.loads(event.tensor_proto.string_val[0].decode().removeprefix("```json").removesuffix("```"))


def write(tmp_path, steps, done=0, **values):
    """Records by the trackers of a config, as a run writes them."""
    config = tiny_config(tmp_path, metrics={"tensorboard": True})
    with (
        open_trackers(tmp_path, config, done) as trackers,
        MetricsLog(tmp_path, done or None, trackers=trackers) as log,
    ):
        for step in steps:
            log.step(replace(STEP, step=step, **values))
    return config


class Recorder(Tracker):
    """Keeps what it is given."""

    def __init__(self):
        self.rows, self.summaries, self.ending = [], [], None

    def log(self, rows):
        self.rows += rows

    def summary(self, values):
        self.summaries.append(values)

    def close(self, ending):
        self.ending = ending


def test_a_tracker_is_made_from_its_own_start_however_late_its_thread_begins(tmp_path):
    pytest.importorskip("tensorboard")
    config = tiny_config(tmp_path, metrics={"tensorboard": True, "trackers": [{"name": "wandb"}]})
    made = dict(list(_wanted(tmp_path, config, 0)))["tensorboard"]()
    made.log([Row(1, time.time(), {"train/loss": 2.0})])
    made.close(Ending.FINISHED)
    assert [event.value for event in events_of(tmp_path).Scalars("train/loss")] == [2.0]


def test_tensorboard_events_are_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    config = tiny_config(tmp_path, metrics={"tensorboard": True})
    with open_trackers(tmp_path, config, 0) as trackers, MetricsLog(tmp_path, None, trackers=trackers) as log:
        log.step(STEP)
        log.step(replace(STEP, step=2, loss=7.0, mfu=None))
        log.evaluation(EvaluationMetrics(2, 3.5, 1.75))
        trackers.summary({"val_loss": 3.5, "versions": {"python": "3"}})
    events = events_of(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, pytest.approx(8.3)), (2, 7.0)]
    assert [event.step for event in events.Scalars("performance/mfu")] == [1]
    assert [event.value for event in events.Scalars("validation/bits_per_byte")] == [1.75]
    assert events.Scalars("moe/imbalance")[0].value == pytest.approx(1.23)
    assert text_of(events, "config") == config.model_dump(mode="json")
    assert text_of(events, "summary") == {"val_loss": 3.5, "versions": {"python": "3"}}


def test_resuming_replaces_tensorboard_events_of_later_steps(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, range(1, 7), loss=8.0)
    write(tmp_path, range(4, 6), done=3, loss=2.0)
    values = [(event.step, event.value) for event in events_of(tmp_path).Scalars("train/loss")]
    assert values == [(1, 8.0), (2, 8.0), (3, 8.0), (4, 2.0), (5, 2.0)]


def test_missing_tensorboard_is_said_once_and_metrics_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    write(tmp_path, [1, 2])
    assert caplog.messages == ["tensorboard is not installed: pip install 'moeport[tensorboard]'"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 2


def test_a_broken_tensorboard_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "tensorboard.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    write(tmp_path, [1])
    (message,) = caplog.messages
    assert message == (
        "tensorboard gets no more metrics: ModuleNotFoundError: No module named 'no_such_dependency'; "
        "metrics.jsonl has all"
    )
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 1


def test_a_run_trains_to_its_end_where_a_tracker_cannot_write(tmp_path, caplog):
    pytest.importorskip("torch")
    pytest.importorskip("tensorboard")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("a file in the place of the folder")
    summary = train(tiny_config(tmp_path, metrics={"tensorboard": True}))
    assert summary.steps == 6
    (message,) = [text for text in caplog.messages if "tensorboard" in text]
    assert message.startswith("tensorboard gets no more metrics: FileExistsError: ")


def test_a_failure_on_the_way_is_said_once_and_the_others_go_on(caplog):
    class Failing(Recorder):
        def log(self, rows):
            super().log(rows)
            if rows[-1].step >= 2:
                raise ConnectionError("the service\nis away")

    failing, healthy = Failing(), Recorder()
    with Trackers([Feed("first", lambda: failing), Feed("second", lambda: healthy)]) as trackers:
        for step in range(1, 100):
            trackers.log(step, {"loss": 1.0 / step})
        trackers.summary({"val_loss": 1.0})
    assert caplog.messages == [
        "first gets no more metrics: ConnectionError: the service is away; metrics.jsonl has all"
    ]
    assert [(row.step, row.values) for row in healthy.rows] == [(s, {"loss": 1.0 / s}) for s in range(1, 100)]
    assert (healthy.summaries, healthy.ending) == ([{"val_loss": 1.0}], Ending.FINISHED)
    assert failing.ending is None


@pytest.mark.parametrize("name", ["what?x=1", "100%"])
def test_a_folder_that_mlflow_would_take_for_another_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"its database cannot be in .*: a path with . or %; choose another run\.dir"):
        MLflow(Start(tmp_path / name, {}))


def test_a_client_that_exits_ends_only_its_thread(caplog):
    def exits():
        sys.exit("log in first")

    with Trackers([Feed("first", exits)]) as trackers:
        trackers.log(1, {"loss": 1.0})
    assert caplog.messages == ["first gets no more metrics: SystemExit: log in first; metrics.jsonl has all"]


def test_a_tracker_that_hangs_holds_nobody_up_and_loses_rows(caplog, monkeypatch):
    monkeypatch.setattr(feeds, "MOST_WAITING", 8)
    monkeypatch.setattr(feeds, "FINISH_SECONDS", 0.3)
    released = threading.Event()

    class Hanging(Recorder):
        def log(self, rows):
            released.wait(60)

    try:
        with Trackers([Feed("slow", Hanging)]) as trackers:
            for step in range(1, 1000):
                trackers.log(step, {"loss": 1.0})
        assert caplog.messages == [
            "slow is 8 rows behind; it loses rows, and metrics.jsonl has all",
            "slow has not taken everything in 0 s; metrics.jsonl has all",
        ]
    finally:
        released.set()


def test_a_slow_tracker_gets_everything_before_the_run_ends():
    class Slow(Recorder):
        def log(self, rows):
            time.sleep(0.05)
            super().log(rows)

    slow = Slow()
    with Trackers([Feed("slow", lambda: slow)]) as trackers:
        for step in range(1, 1001):
            trackers.log(step, {"loss": 1.0})
    assert [row.step for row in slow.rows] == list(range(1, 1001))
    assert slow.ending is Ending.FINISHED


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (InterruptedRunError("stopped"), Ending.INTERRUPTED),
        (KeyboardInterrupt(), Ending.INTERRUPTED),
        (UserError("wrong"), Ending.FAILED),
    ],
)
def test_trackers_are_told_how_a_run_ends(error, ending):
    recorder = Recorder()

    def stopped():
        with Trackers([Feed("one", lambda: recorder)]) as trackers:
            trackers.log(1, {"loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        stopped()
    assert ([row.step for row in recorder.rows], recorder.ending) == ([1], ending)


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = tiny_config(tmp_path, metrics={"trackers": [{"name": "mlflow"}]})
    with pytest.raises(UserError) as error:
        check_trackers(config)
    assert str(error.value) == (
        "metrics.trackers[0].name: mlflow is not installed; install it with pip install 'moeport[mlflow]', or leave "
        "this tracker out"
    )
    with pytest.raises(UserError, match="mlflow is not installed"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_faults_in_the_list_are_named_with_file_and_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "metrics:\n"
        "  trackers:\n"
        "    - name: wanb\n"
        "    - name: mlflow\n"
        "      mode: of\n"
        "    - name: swanlab\n"
        "      projct: mine\n"
        "      label: ''\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(file)
    lines = str(error.value).splitlines()
    assert [line.removeprefix(f"{file}:") for line in lines] == [
        "3:13 metrics.trackers[0].name: is not a choice (got wanb); expected one of wandb, mlflow, swanlab; "
        "did you mean wandb?",
        "5:13 metrics.trackers[1].mode: is not a choice (got of); expected one of offline, online",
        "7:7 metrics.trackers[2].projct: unknown key; expected one of name, mode, project, label",
        "8:14 metrics.trackers[2].label: is empty (got ''); expected a string or null",
    ]
    with pytest.raises(ConfigError, match=r"metrics\.trackers: has a tracker twice"):
        load_config(None, ["metrics.trackers=[{name: wandb}, {name: wandb, project: other}]"])


def test_nested_values_become_flat():
    values = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None, "f": True, "g": 0.5}
    assert flat(values) == {"a.b.c": 1, "a.d": [1, 2], "e": None, "f": True, "g": 0.5}
    assert numbers(values) == {"a.b.c": 1, "g": 0.5}


def test_rows_carry_when_they_were_recorded():
    recorder, before = Recorder(), time.time()
    with Trackers([Feed("one", lambda: recorder)]) as trackers:
        trackers.log(7, {"loss": 1.0})
    (row,) = recorder.rows
    assert row == Row(7, row.time, {"loss": 1.0})
    assert before <= row.time <= time.time()
