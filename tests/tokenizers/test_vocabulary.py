import pickle

import pytest

from moeport.errors import DataError
from moeport.tokenizers.vocabulary import BYTES, Vocabulary

# "abcd" is built over scaffolds; "cd" became one before "abcd" was made.
MERGES = ((b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"abcd", b"a"))


def test_normal_tokens_are_numbered_without_scaffolds():
    vocabulary = Vocabulary("scaffold_bpe", MERGES, frozenset({b"ab", b"abcd"}))
    assert vocabulary.tokens == (*BYTES, b"cd", b"abcda")
    assert vocabulary.expanded == (*BYTES, b"ab", b"cd", b"abcd", b"abcda")
    assert pickle.loads(pickle.dumps(vocabulary)) == vocabulary


def test_scaffolds_are_split_as_they_were_merged():
    vocabulary = Vocabulary("scaffold_bpe", MERGES, frozenset({b"ab", b"abcd"}))
    assert vocabulary.demolished == {b"ab": (b"a", b"b"), b"abcd": (b"a", b"b", b"cd")}
    assert vocabulary.encode_word(b"xabcdabcdaabcd") == [b"x", b"a", b"b", b"cd", b"abcda", b"a", b"b", b"cd"]


@pytest.mark.parametrize(
    ("word", "parts"),
    [(b"", []), (b"aaaaa", [b"aa", b"aa", b"a"]), (b"baab", [b"b", b"aab"]), (b"\xff\x00", [b"\xff", b"\x00"])],
)
def test_lowest_rank_merges_first_and_from_the_left(word, parts):
    assert Vocabulary("bpe", ((b"a", b"a"), (b"aa", b"b"))).encode_word(word) == parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scaffold",), "got 'scaffold'; expected one of bpe, scaffold_bpe"),
        (("bpe", ((b"ab", b"c"),)), "merge 0 joins b'ab' and b'c'"),
        (("bpe", MERGES, frozenset({b"a"})), "b'a' is made by no merge"),
        (("bpe", (), frozenset(), BYTES[:9]), "expected the 256 single bytes in byte order, got 9"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        Vocabulary(*arguments)
