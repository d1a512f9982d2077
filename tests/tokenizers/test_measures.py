"""Measures of a tokenizer against values worked out by hand."""

import math

import numpy as np
import pytest

from moeport.tokenizers.measures import LONGEST, by_length, entropy, frequency_histogram, redundancy, replaced


def test_entropy_and_redundancy() -> None:
    counts_V = np.array([4, 2, 1, 1, 0, 0, 0, 0])
    assert entropy(counts_V) == 0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3
    assert redundancy(counts_V) == 1 - 1.75 / 3


@pytest.mark.parametrize(("counts", "expected"), [([5, 5, 5, 5], 0.0), ([7, 0, 0, 0], 1.0), ([0, 0, 0, 0], 1.0)])
def test_redundancy_lies_between_even_and_a_single_token(counts: list[int], expected: float) -> None:
    assert redundancy(np.array(counts)) == expected


def test_frequencies_fall_into_powers_of_two() -> None:
    counts_V = np.array([0, 0, 1, 2, 3, 4, 7, 8, 2**40, 2**40 - 1])
    histogram = frequency_histogram(counts_V)
    assert histogram.tolist() == [2, 1, 2, 2, 1, *[0] * 35, 1, 1]


def test_lengths_are_shares_of_tokens_and_long_ones_count_together() -> None:
    shares = by_length(np.array([6, 2, 1, 1]), np.array([1, 3, LONGEST, LONGEST + 9]))
    assert shares.tolist() == [0.6, 0.0, 0.2, *[0.0] * (LONGEST - 4), 0.2]


def test_tokens_that_only_one_vocabulary_has_are_compared() -> None:
    found = replaced({b"a": 100, b"ab": 10, b"c": 2}, {b"a": 90, b"abc": 9, b"d": 12})
    assert (found.number, found.frequency, found.new_frequency, found.gain) == (2, 6.0, 10.5, 0.75)


def test_gain_over_tokens_that_never_occur_is_not_a_number() -> None:
    assert math.isnan(replaced({b"a": 0}, {b"b": 3}).gain)
    assert replaced({b"a": 1}, {b"a": 2}).number == 0
