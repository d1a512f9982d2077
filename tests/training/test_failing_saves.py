"""Jobs in which a rank cannot write its part of a checkpoint end with the cause, and lose no checkpoint before it."""

import pytest

from moeport.config import resolved_yaml
from moeport.training.checkpoint import list_checkpoints, verify_checkpoint
from tests.comm.jobs import ROOT, start
from tests.training.tiny import tiny_config

pytest.importorskip("torch")

SECONDS = 200


def job(folder, failing, how, asynchronous, **sections):
    """The config, the exit code and what was said of a run of 2 ranks that is to fail."""
    config = tiny_config(
        folder,
        training={"steps": 12, "evaluation_interval": 0},
        checkpoint={"interval": 2, "asynchronous": asynchronous},
        backend={"compile": False},
        **sections,
    )
    (folder / "config.yaml").write_text(resolved_yaml(config))
    script = str(ROOT / "tests/training/ranks_failing_save.py")
    place = folder / "job"
    ranks = start("torch", 2, [script, str(place), str(failing), how, str(folder / "config.yaml")], place)
    try:
        code = ranks.wait(SECONDS)
        assert ranks.left() == []
        return config, code, ranks.output()
    finally:
        ranks.end()


def check_left(config):
    """The first checkpoint is complete, and nothing is left of the second."""
    checkpoints = config.run.dir / "checkpoints"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-000002"]
    verify_checkpoint(checkpoints / "step-000002")
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]


@pytest.mark.parametrize(
    ("failing", "asynchronous"),
    [(1, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, True), (1, False), (0, False)))],
)
def test_the_disk_of_one_rank_is_full(tmp_path, failing, asynchronous):
    config, code, said = job(tmp_path, failing, "full", asynchronous)
    assert code == 2, said[-3000:]
    assert "step-000004: cannot be written: the file would be larger than allowed; raise the limit" in said
    assert "Traceback" not in said
    check_left(config)


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_rank_is_killed_while_it_writes(tmp_path, asynchronous):
    config, code, said = job(tmp_path, 1, "killed", asynchronous)
    assert code != 0
    assert "rank 1 of 2" in said
    assert "died" in said
    check_left(config)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_not_finite_on_one_rank_is_named_by_all(tmp_path, asynchronous):
    config, code, said = job(tmp_path, 1, "diverged", asynchronous)
    assert code == 1, said[-3000:]
    assert "step 4: embedding.weight is not finite, and nothing of this step was saved" in said
    assert "continue from step-000002, the last good checkpoint" in said
    assert "Traceback" not in said
    check_left(config)


def test_a_run_folder_that_not_all_ranks_see_is_refused(tmp_path):
    _, code, said = job(tmp_path, 0, "elsewhere", True, run={"dir": "run"})
    assert code == 2, said[-3000:]
    assert "whether run.dir has what the first rank writes there: true on rank 0, false on rank 1" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "job").rglob("*.tmp"))
