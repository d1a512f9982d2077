import numpy as np
import pytest

from moeport.core.weights import Box, read_part, shape_of


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
