"""Every planted fault is named in the first line of the report, or warned of with a reason; none passes."""

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from moeport.parity.run import compare_subjects
from tests.faults.flips import with_other_kernels
from tests.faults.planted import PLANTED
from tests.faults.planting import DTYPES, NONE, STEPS, Garden, is_found

GROUPS = {
    "weights",
    "norms",
    "rope",
    "masks",
    "gates",
    "losses",
    "dispatch",
    "optimiser",
    "dtype",
    "data",
    "ranks",
    "NaN",
}
CASES = [(dtype, flip) for flip in (False, True) for dtype in DTYPES]


def label(planted):
    return f"{planted.group}: {planted.name}"


@pytest.fixture(scope="module")
def garden(tmp_path_factory):
    return Garden(tmp_path_factory.mktemp("planted"))


def test_the_table_is_broad():
    assert len({label(planted) for planted in PLANTED}) == len(PLANTED) >= 40
    assert {planted.group for planted in PLANTED} >= GROUPS


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_fault_both_sides_are_equal(garden, dtype):
    found = garden.compare(NONE, dtype, flip=False)
    assert found.equal
    assert found.headline.startswith("PASS "), found.headline


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flip_alone_is_no_fault(garden, dtype):
    """A tie that other kernels decide otherwise passes; with the same kernels, something must have caused it."""
    found = garden.compare(NONE, dtype, flip=True)
    assert found.headline.startswith("WARN faulty against "), found.headline
    assert "bit-identical" in found.headline
    flip, sound = garden._flip(dtype), garden._subject(dtype, ())
    a, b = flip.prepare(sound), with_other_kernels(flip.turn(flip.prepare(sound)))
    (found,) = compare_subjects((a, replace(b, name="other")), STEPS).comparisons
    assert found.headline.startswith("PASS "), found.headline
    assert "1 of 128 choices differ, all near ties" in found.headline


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=[label(planted) for planted in PLANTED])
def test_a_fault_is_found(garden, number):
    """Each in one of the four cases, in turn; the slow test has all."""
    dtype, flip = CASES[number % len(CASES)]
    found = garden.compare(PLANTED[number], dtype, flip)
    assert is_found(PLANTED[number], found), (dtype, flip, found.headline)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "flip"), CASES)
@pytest.mark.parametrize("planted", PLANTED, ids=label)
def test_a_fault_is_found_in_every_case(garden, planted, dtype, flip):
    found = garden.compare(planted, dtype, flip)
    assert is_found(planted, found), found.headline
