"""Data-parallel layers on two ranks agree with each other and with one process."""

from tests.comm.jobs import ROOT, start
from tests.torch_moe.ranks import CASES


def test_two_ranks_are_one_process_with_the_joined_batch(tmp_path):
    folder = tmp_path / "job"
    job = start("torch", 2, [str(ROOT / "tests/torch_moe/ranks.py"), str(folder)], folder)
    try:
        code = job.wait(300)
    finally:
        job.end()
    wanted = [f"{case.__name__} {name}" for case, name in CASES]
    for rank in (0, 1):
        assert (folder / f"done.{rank}").read_text().splitlines() == wanted, job.output()
    assert code == 0
