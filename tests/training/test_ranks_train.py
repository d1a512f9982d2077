"""`moeport train` on several ranks."""

import os
import signal
import time

import numpy as np
import pytest

from moeport.config import resolved_yaml
from moeport.errors import UserError
from moeport.training.checkpoint import find_checkpoint
from moeport.training.metrics import read_metrics
from moeport.training.ranks import check_ranks
from moeport.training.routing_log import read_routing
from moeport.training.run import train
from moeport.training.run_dir import ROUTING_FILE
from tests.comm.jobs import ROOT, launch, start
from tests.training.ranks import one_process
from tests.training.tiny import tiny_config
from tests.training.whole import load_checkpoint

STEPS = 24
TRAINING = {"steps": STEPS, "batch_size": 4, "evaluation_interval": 8}
CHECKPOINT = {"interval": 3}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Metrics and last checkpoint of one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(one_process(tiny_config(folder, training=TRAINING, checkpoint=CHECKPOINT), 2))
    return result(folder)


def result(folder):
    steps, evaluations = read_metrics(folder / "run" / "metrics.jsonl")
    checkpoint = load_checkpoint(find_checkpoint(folder / "run" / "checkpoints", "latest"))
    return steps, evaluations, checkpoint, read_routing(folder / "run" / ROUTING_FILE)


def job_of(folder, *arguments, starter=start, **environment):
    """`moeport train` on two ranks that share the experts."""
    config = tiny_config(folder, training=TRAINING, checkpoint=CHECKPOINT, parallelism={"expert": 2})
    (folder / "config.yaml").write_text(resolved_yaml(config))
    script, where = str(ROOT / "tests/training/ranks_cli.py"), folder / "job"
    command = [script, str(where), "train", str(folder / "config.yaml"), *arguments]
    return starter("torch", 2, command, where, **environment)


def equal(found, want):
    for steps, expected in zip(found[:2], want[:2], strict=True):
        assert [record.step for record in steps] == [record.step for record in expected]
    np.testing.assert_allclose([r.loss for r in found[0]], [r.loss for r in want[0]], rtol=1e-4)
    np.testing.assert_allclose([r.val_loss for r in found[1]], [r.val_loss for r in want[1]], rtol=1e-4)
    assert found[2].meta.step == want[2].meta.step == STEPS
    assert found[2].model.keys() == want[2].model.keys()
    for name, value in found[2].model.items():
        np.testing.assert_allclose(value, want[2].model[name], atol=2e-3, err_msg=name)
    for ours, alone in zip(found[3].stretches, want[3].stretches, strict=True):
        assert (ours.first, ours.last, ours.steps) == (alone.first, alone.last, alone.steps)
        assert ours.count_LXE.sum(2).tolist() == alone.count_LXE.sum(2).tolist()
        assert np.minimum(ours.count_LXE, alone.count_LXE).sum() >= 0.98 * ours.count_LXE.sum()  # but for near ties


def wait_for(condition, job, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, job.output()[-3000:]
        assert job.launcher.poll() is None, job.output()[-3000:]
        time.sleep(0.05)


def lines(folder):
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_run_on_two_ranks_is_that_of_one_process(tmp_path, alone):
    job = job_of(tmp_path)
    try:
        assert (job.wait(200), job.left()) == (0, []), job.output()[-3000:]
    finally:
        job.end()
    assert "ranks       2 on 1 node: the experts over 2 ranks each, all-to-all flat" in job.output()
    assert job.output().count("validation loss") == 1
    found = result(tmp_path)
    equal(found, alone)
    rows = np.array([record.exchanged_rows_per_layer for record in found[0]])
    assert rows.shape == (STEPS, 2, 2)
    assert (rows[..., 0] > 0).all()
    assert (rows[..., 1] == 0).all()
    assignments = np.array([record.assignments_per_layer for record in found[0]])
    assert (rows.sum(-1) <= 4 * assignments).all(), "there and back, forward and backward; no evaluation among them"


def test_a_job_goes_on_after_a_rank_was_killed(tmp_path, alone):
    """torchrun starts all ranks again, and they go on from the last checkpoint, by whichever algorithm is fastest."""
    settings = ("comm.algorithm=auto", "comm.chunks=auto", "comm.ranks_per_node=1")
    overrides = [word for setting in settings for word in ("--set", setting)]
    job = job_of(tmp_path, "--resume", *overrides, starter=launch, PET_MAX_RESTARTS="1")
    try:
        wait_for(lambda: lines(tmp_path) > 4, job)
        os.kill(job.pids()[1], signal.SIGKILL)
        assert (job.wait(200), job.left()) == (0, []), job.output()[-3000:]
    finally:
        job.end()
    assert "resuming    after step" in job.output()
    assert "ranks       2 on 2 nodes" in job.output()
    assert job.output().count("is fastest: ") == 2
    equal(result(tmp_path), alone)


def test_a_signal_to_one_rank_saves_and_stops_all(tmp_path, alone):
    job = job_of(tmp_path)
    try:
        wait_for(lambda: lines(tmp_path) > 4, job)
        os.kill(job.pids()[1], signal.SIGTERM)
        assert job.wait(60) != 0
        assert job.left() == []
    finally:
        job.end()
    assert "everything is saved" in job.output()
    config = tiny_config(tmp_path, training=TRAINING, checkpoint=CHECKPOINT)
    train(one_process(config, 2), resume=True)
    equal(result(tmp_path), alone)


@pytest.mark.parametrize(
    ("sections", "ranks", "message"),
    [
        ({"parallelism": {"expert": 2}}, 3, "parallelism.expert: 2 does not divide the 3 ranks of this job"),
        ({"parallelism": {"expert": 2, "data": 2}}, 2, "make 4 ranks, and this job has 2; expected 1"),
        ({"training": {"batch_size": 6}}, 4, "6 sequences do not divide among 4 ranks x 1 micro-batches"),
        ({"parallelism": {"expert": 2}}, 1, "does not divide the 1 ranks"),
        ({"comm": {"ranks_per_node": 3}}, 4, "comm.ranks_per_node: 3 does not divide the 4 ranks of this job"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path, sections, ranks, message):
    with pytest.raises(UserError, match=message):
        check_ranks(tiny_config(tmp_path, **sections), ranks)
