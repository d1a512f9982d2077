"""A checkpoint of any number of ranks is read by any other, bit for bit."""

import pytest

from moeport.training.checkpoint import verify_checkpoint
from tests.comm.jobs import ROOT, start

pytest.importorskip("torch")


@pytest.mark.parametrize("last", [pytest.param(2, marks=pytest.mark.slow), None])
def test_what_ranks_have_written_other_numbers_of_ranks_read(tmp_path, last):
    """With `last`, also two ranks what four have written."""
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
    job(2, 1, 2)
    job(4, 1, 2, 4)
    main(tmp_path, 1, 2, 4)
    if last:
        job(last, 4)
    wanted = {1: 1, 2: 2, 4: 4}
    for size, files in wanted.items():
        checkpoint = verify_checkpoint(path_of(tmp_path, size))
        assert len(list(checkpoint.path.glob("model-*"))) == files
