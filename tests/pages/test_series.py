import numpy as np
import pytest

from moeport.pages.series import BinnedSeries


def filled(values, bins=4):
    series = BinnedSeries(2, bins)
    for step, value in enumerate(values, 1):
        series.add(step, np.array([step, value]))
    return series


def test_few_steps_are_kept_as_they_are():
    series = filled([3.0, 1.0, 2.0])
    assert series.width == 1
    np.testing.assert_array_equal(series.mean, [[1, 3], [2, 1], [3, 2]])
    np.testing.assert_array_equal(series.low, series.mean)
    np.testing.assert_array_equal(series.high, series.mean)


def test_many_steps_become_equal_ranges():
    series = filled([1.0, 3.0, 5.0, 5.0, 7.0, 1.0, 4.0])
    assert series.width == 2
    np.testing.assert_array_equal(series.mean, [[1.5, 2.0], [3.5, 5.0], [5.5, 4.0], [7.0, 4.0]])
    np.testing.assert_array_equal(series.low, [[1, 1], [3, 5], [5, 1], [7, 4]])
    np.testing.assert_array_equal(series.high, [[2, 3], [4, 5], [6, 7], [7, 4]])


@pytest.mark.parametrize("steps", [1, 399, 400, 401, 12345])
def test_ranges_stay_within_the_limit_and_lose_no_step(steps):
    series = BinnedSeries(1, 400)
    for step in range(1, steps + 1):
        series.add(step, np.array([step]))
    assert min(steps, 200) <= len(series.mean) <= 400
    assert series.low[0, 0] == 1
    assert series.high[-1, 0] == steps
    np.testing.assert_array_equal(series.low[1:, 0], series.high[:-1, 0] + 1)


def test_values_that_are_not_finite_are_left_out():
    series = filled([1.0, np.nan, np.inf, 3.0, 2.0, 2.0, np.nan, np.nan])
    np.testing.assert_array_equal(series.mean[:, 1], [1, 3, 2, np.nan])


def test_a_run_may_begin_late():
    series = BinnedSeries(1, 4)
    series.add(1001, np.array([5.0]))
    assert series.mean.tolist() == [[5.0]]
