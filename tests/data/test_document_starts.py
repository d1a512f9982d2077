"""Where documents begin, from tokens alone."""

import numpy as np
import pytest

from moeport.data.document_starts import document_starts, hidden_share

END = 9
CASES = {
    "none": ([1, 2, 3, 4], [0, 0, 0, 0]),
    "the end of text is the first token of the next document": ([1, END, 3, 4], [0, 1, 1, 1]),
    "a sequence may begin with it": ([END, 2, END, 4], [0, 0, 2, 2]),
    "or end with it": ([1, 2, 3, END], [0, 0, 0, 3]),
    "an empty document is one token": ([1, END, END, 4], [0, 1, 2, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_document_begins_at_each_end_of_text(case):
    tokens, expected = CASES[case]
    found = document_starts(np.array([[1, 2, 3, 4], tokens]), END)
    assert found.tolist() == [[0, 0, 0, 0], expected]


def test_without_an_end_of_text_there_are_no_documents():
    assert document_starts(np.array([[1, END]]), None) is None


@pytest.mark.parametrize("case", CASES)
def test_the_share_of_hidden_pairs_is_counted_over_all_of_them(case):
    start_S = CASES[case][1]
    hidden = [start_S[i] != start_S[j] for i in range(4) for j in range(i + 1)]
    assert hidden_share(np.array([start_S])) == pytest.approx(np.mean(hidden))
