import numpy as np
import pytest

from moeport.core.weights import Box, Weights, read_part, shape_of


def test_a_box_cuts_its_part_out_of_an_array():
    x = np.arange(60).reshape(3, 4, 5)
    box = Box((1, 0, 2), (2, 4, 3))
    assert np.array_equal(x[box.slices], x[1:3, :, 2:5])
    assert box.size == x[box.slices].size
    assert np.array_equal(x[box.rows(1, 1).slices], x[2:3, :, 2:5])
    assert np.array_equal(x[Box.whole(x.shape).slices], x)


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        (Box((0,), (4,)), Box((2,), (4,)), Box((2,), (2,))),
        (Box((0,), (2,)), Box((2,), (2,)), None),
        (Box((0, 0), (2, 4)), Box((1, 2), (5, 5)), Box((1, 2), (1, 2))),
        (Box((0, 0), (2, 0)), Box((0, 0), (2, 4)), None),
        (Box((), ()), Box((), ()), Box((), ())),
    ],
)
def test_intersections(one, other, want):
    assert one.intersection(other) == want == other.intersection(one)


def test_a_box_within_another():
    x = np.arange(60).reshape(3, 4, 5)
    outer, inner = Box((1, 1, 0), (2, 3, 5)), Box((2, 2, 1), (1, 1, 3))
    assert np.array_equal(x[outer.slices][inner.within(outer).slices], x[inner.slices])


def test_parts_of_a_plain_mapping():
    x = np.arange(12).reshape(3, 4)
    assert np.array_equal(read_part({"x": x}, "x", Box((1, 0), (1, 4))), x[1:2])
    assert shape_of({"x": x}, "x") == (3, 4)


@pytest.mark.parametrize("entries", [1, 4, 5, 7, 20, 59, 60, 100])
def test_pieces_make_up_a_part(entries):
    box = Box((1, 0, 2), (3, 4, 5))
    counts = np.zeros((5, 4, 8))
    for piece in box.pieces(entries):
        assert 0 < piece.size <= entries
        counts[piece.slices] += 1
    assert counts[box.slices].min() == 1
    assert counts.sum() == box.size
    assert len(list(box.pieces(entries))) <= 2 * -(-box.size // entries) + 3 * 4


def test_an_empty_part_has_no_pieces():
    assert list(Box((0, 0), (0, 4)).pieces(10)) == []
    assert list(Box((), ()).pieces(10)) == [Box((), ())]


@pytest.mark.parametrize("box", [Box((1,), (5,)), Box((0, 2), (1, 7)), Box((0, 0), (8, 2))])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_make_up_a_part(box, count):
    shares = [box.share(index, count) for index in range(count)]
    assert sum(share.size for share in shares) == box.size
    taken = [share for share in shares if share.size]
    assert not any(a.intersection(b) for i, a in enumerate(taken) for b in taken[:i])
    assert all(share.intersection(box) == share for share in taken)


class Unread(Weights):
    """Arrays that fail when they are read."""

    def shape(self, name):
        return {"a": (2,), "b": (3,)}[name]

    def dtype(self, name):
        return "float32"

    def read(self, name, box):
        raise AssertionError(name)

    @property
    def names(self):
        return "ab"


def test_a_name_is_looked_for_without_reading():
    weights = Unread()
    assert "a" in weights
    assert "c" not in weights
    assert weights.keys() & {"b", "c"} == {"b"}
