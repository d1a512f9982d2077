"""Ranks that are killed while a checkpoint is written in the background."""

import pytest

from tests.faults.saves import killed

pytest.importorskip("torch")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_rank_is_killed_during_a_save(tmp_path, ranks):
    tally = killed(1, tmp_path / "run", ranks)
    assert (tally.wrong, tally.tries) == ([], 1)
