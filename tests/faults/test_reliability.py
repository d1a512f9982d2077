"""A few of the faults of docs/reliability.md in every test run; `python -m tests.faults` is the long form."""

import pytest

from tests.faults import damages, disks, strikes, together
from tests.faults.__main__ import IN_CACHE, KILLS, PARTS
from tests.faults.outcome import Reference

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("reference"))


def right(tally, tries):
    assert (tally.wrong, tally.tries) == ([], tries)


def test_kills_before_file_operations(tmp_path, reference):
    places = [20, 70]
    right(strikes.at_operations("", "SIGKILL", places, tmp_path, reference, strikes.KILLED), 2)


def test_writes_that_fail(tmp_path, reference):
    places = [IN_CACHE + 5]
    right(strikes.at_operations("", "ENOSPC", places, tmp_path, reference, strikes.REFUSED), 1)


def test_a_full_disk(tmp_path, reference):
    if not disks.can_make_disks(tmp_path / "trial"):
        pytest.skip("this user may not mount a disk")
    right(disks.of_sizes([40_000], tmp_path, reference), 1)


def test_damaged_files(tmp_path, reference):
    right(damages.of_every_kind(3, tmp_path, reference), 3)


def test_two_processes_in_one_folder(tmp_path, reference):
    right(together.in_one_folder(1, tmp_path, reference), 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PARTS)
def test_the_long_form(tmp_path, reference, name):
    tally = PARTS[name](tmp_path, reference)
    assert tally.wrong == []
    assert name != "kills" or tally.tries > KILLS // 2
