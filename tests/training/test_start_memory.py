"""No rank takes the memory of a whole model: not to start, not to give out its part, not to resume."""

import json

import pytest

from tests.comm.jobs import ROOT, Job, start

MARGIN = 16 * 2**20
"""Bytes of a piece that is being filled and of a block that is being drawn, 4 MiB each, and of PyTorch's own."""


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_memory_falls_as_the_number_of_ranks(tmp_path, ranks):
    pytest.importorskip("torch")
    folder = tmp_path / "job"
    job = start("torch", ranks, [str(ROOT / "tests/training/start_memory.py"), str(folder)], folder)
    try:
        assert (job.wait(120), job.left()) == (0, []), Job.output_of(folder)[-4000:]
    finally:
        job.end()
    written = {"1": 0, "2": 0}
    for rank in range(ranks):
        for experts, found in json.loads((folder / f"{rank}.json").read_text()).items():
            share = found["whole"] / ranks
            assert found["whole"] > share + MARGIN, "a whole copy would pass"
            assert found["started"] < share + MARGIN, (rank, experts, found)
            assert found["given out"] < share + MARGIN, (rank, experts, found)
            assert found["resumed"] < 3 * share + MARGIN, (rank, experts, found)
            written[experts] += found["written"]
    assert set(written.values()) == {3 * found["whole"]}
