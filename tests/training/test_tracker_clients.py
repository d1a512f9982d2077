"""The real clients of W&B, MLflow and SwanLab, offline: a run, and its continuation. `make test-trackers` has them."""

import json
import shutil
import struct

import pytest

from moeport.training.checkpoint_meta import checkpoint_name
from moeport.training.metrics import iterate_metrics
from moeport.training.metrics_table import scalars
from moeport.training.run import train
from tests.training.tiny import tiny_config

KEPT_STEP, STEPS = 3, 6


@pytest.fixture
def trained(tmp_path, caplog):
    """Train with a tracker, lose the second half, and resume; returns the run folder, the config and the summary."""
    pytest.importorskip("torch")

    def run(name):
        pytest.importorskip(name)
        tracker = {"name": name, "project": "kit", "label": "a label"}
        config = tiny_config(tmp_path, checkpoint={"interval": KEPT_STEP}, metrics={"trackers": [tracker]})
        train(config)
        shutil.rmtree(config.run.dir / "checkpoints" / checkpoint_name(STEPS))
        summary = train(config, resume=True)
        assert not [text for text in caplog.messages if name in text]
        return config.run.dir, config, summary

    return run


def expected(run_dir):
    """Values by tag and step, as metrics.jsonl has them."""
    found = {}
    for record in iterate_metrics(run_dir / "metrics.jsonl"):
        for tag, value in scalars(record).items():
            found.setdefault(tag, {})[record.step] = value
    return found


def leveldb_records(path):
    """The records of a file in LevelDB's log format with a header of 7 bytes, as W&B and SwanLab write it."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def test_mlflow_has_every_value_and_goes_on_with_the_same_run(trained):
    run_dir, config, summary = trained("mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.resolve()}/trackers/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("kit")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("a label", "FINISHED")
    assert run.data.params["model.d_model"] == "16"
    assert run.data.metrics["summary/val_loss"] == summary.val_loss
    for tag in ("train/loss", "validation/loss", "moe/imbalance"):
        history = client.get_metric_history(run.info.run_id, tag)
        assert {metric.step: metric.value for metric in history} == expected(run_dir)[tag]
    repeated = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(repeated) == [1, 2, 3, 4, 4, 5, 5, 6, 6]
    written = json.loads(
        (run_dir / "trackers/mlflow/artifacts" / run.info.run_id / "artifacts/config.json").read_text()
    )
    assert written == config.model_dump(mode="json")


def test_wandb_has_every_value_and_goes_on_with_the_same_run(trained):
    run_dir, config, summary = trained("wandb")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service would live as long as the tests
    files = sorted((run_dir / "trackers/wandb/wandb").glob("offline-run-*/run-*.wandb"))
    records = [[Record.FromString(data) for data in leveldb_records(file)] for file in files]
    starts = [next(each.run for each in some if each.HasField("run")) for some in records]
    assert len({start.run_id for start in starts}) == 1
    assert [(start.project, start.display_name) for start in starts] == [("kit", "a label")] * 2
    sections = {item.key: json.loads(item.value_json) for item in starts[0].config.update}
    assert sections["model"] == config.model_dump(mode="json")["model"]
    steps = []
    for some in records:
        found = {}
        for each in some:
            if each.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in each.history.item}
                for tag, value in row.items():
                    found.setdefault(tag, {})[row["_step"]] = value
        steps.append(sorted(found["train/loss"]))
        for tag in ("train/loss", "moe/imbalance"):
            assert found[tag] == {step: expected(run_dir)[tag][step] for step in steps[-1]}
    assert steps == [[1, 2, 3, 4, 5, 6], [4, 5, 6]]
    updates = [item for each in records[-1] if each.HasField("summary") for item in each.summary.update]
    (told,) = [json.loads(item.value_json) for item in updates if item.key == "summary"]
    assert told["val_loss"] == summary.val_loss
    assert [each.exit.exit_code for each in records[-1] if each.HasField("exit")] == [0]


def test_swanlab_has_every_value_and_goes_on_with_the_same_run(trained):
    run_dir, _, summary = trained("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    files = sorted((run_dir / "trackers/swanlab").glob("run-*/run-*.swanlab"), key=lambda file: file.stat().st_mtime)
    assert len({file.name for file in files}) == 1
    assert len(files) == 2
    for file, first in zip(files, (1, KEPT_STEP + 1), strict=True):
        found = {}
        for data in leveldb_records(file):
            each = Record.FromString(data)
            if each.HasField("scalar"):
                found.setdefault(each.scalar.key, {})[each.scalar.step] = each.scalar.value.number
        assert sorted(found["train/loss"]) == list(range(first, STEPS + 1))
        for tag in ("train/loss", "moe/imbalance"):
            assert found[tag] == {step: expected(run_dir)[tag][step] for step in found[tag]}
    assert found["summary/val_loss"][STEPS] == summary.val_loss
