"""A checkpoint of any number of ranks is read by any other, bit for bit."""

import pytest

from moeport.training.checkpoint import verify_checkpoint
from tests.comm.jobs import ROOT, start

pytest.importorskip("torch")


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_what_ranks_have_written_other_numbers_of_ranks_read(tmp_path, sizes):
    """Each number of ranks writes, and reads what it and all smaller ones have written; then 1 and 2 read the rest."""
    from tests.training.ranks_reshard import main, path_of

    def job(size, *sources):
        place = tmp_path / f"job-{size}-{len(sources)}"
        arguments = [str(ROOT / "tests/training/ranks_reshard.py"), str(tmp_path), *map(str, sources)]
        ranks = start("torch", size, arguments, place)
        try:
            assert ranks.wait(200) == 0, ranks.output()[-3000:]
        finally:
            ranks.end()

    main(tmp_path, 1)
    for last, size in enumerate(sizes[1:], 2):
        job(size, *sizes[:last])
    main(tmp_path, *sizes)
    if sizes[-1] > 2:
        job(2, sizes[-1])
    for size in sizes:
        checkpoint = verify_checkpoint(path_of(tmp_path, size))
        assert len(list(checkpoint.path.glob("model-*"))) == size
