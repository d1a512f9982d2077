import random
import unicodedata
from collections import Counter

import pytest
from tokenizers import Regex, pre_tokenizers

from moeport.errors import DataError
from moeport.tokenizers import pretokens
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.pretokens import count_words, cut
from moeport.tokenizers.splitting import splitter

PIECES = [
    *("don't", "'ll", "a", "Word", " ", "  ", "\n", "\n\n  ", "\t", "\r\n", "_x", "12345", "3.14", "\u00b2", "e\u0301"),
    *("\u4e2d\u6587", "\uff0c", "\u3002", "\u3000", ";\n    ", "()", "!?", "\U0001f600", "\U00020000", "\u00a0"),
    "x" * 200,
]


def random_text(seed, count=300):
    draw = random.Random(seed)
    return "".join(draw.choice(PIECES) for _ in range(count))


def plain_counts(texts, pattern):
    split = splitter(pattern)
    return Counter(word.encode() for text in texts for word in split(text))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parts_of_a_long_text_have_the_pre_tokens_of_the_whole(pattern):
    split = splitter(pattern)
    for seed in range(12):
        text = random_text(seed)
        data = text.encode()
        draw = random.Random(seed)
        ends = sorted(draw.sample(range(len(data)), 30))
        chunks = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
        parts = [*cut(chunks, pattern, draw.choice([1, 20, 100]))]
        assert len(parts) > 5
        assert [word for part in parts for word in split(part)] == split(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_character_is_cut_as_the_tokenizers_library_does(pattern):
    isolate = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    split = splitter(pattern)
    codes = [code for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs")]  # in any version
    some = [code for code in codes if code < 0x3100 or code % 37 == 0]
    random.Random(0).shuffle(some)
    around = ("", " ", "a", "1", ".", "\n")
    text = "".join(chr(code) + around[place % len(around)] for place, code in enumerate(some))
    assert split(text) == [word for word, _ in isolate.pre_tokenize_str(text)]
    short = "".join(map(random_text, range(3)))
    assert split(short) == [word for word, _ in isolate.pre_tokenize_str(short)]


def test_a_text_without_a_place_to_cut_is_one_part():
    assert [*cut(["ab" * 50] * 10, size=7)] == ["ab" * 500]
    assert [*cut([b"\xff\xe4\xb8", b"\xad. \xff"], size=1)] == ["\udcff\u4e2d", ". \udcff"]


@pytest.mark.parametrize("pattern", ["digits", r"\w+|\W"])
def test_counts_are_the_same_with_any_number_of_processes(pattern, monkeypatch, capfd):
    monkeypatch.setattr(pretokens, "BATCH", 1500)
    texts = [random_text(seed, 1000) + "\n" for seed in range(6)]
    told = []
    one, three = count_words(texts, pattern, 1), count_words(texts, pattern, 3, told.append)
    assert [*one.items()] == [*three.items()]
    assert capfd.readouterr() == ("", "")
    assert sum(told) == sum(map(len, texts))
    assert len(told) > 6
    if pattern in PATTERNS:
        assert one == plain_counts(texts, pattern)


def test_bytes_that_are_no_text_are_counted():
    words = count_words([b"a\xff\xfe b", "a\ud800"])
    assert words == {b"a": 2, b"\xff\xfe": 1, b" b": 1, b"\xed\xa0\x80": 1}


def test_a_fault_in_the_pattern_is_named():
    with pytest.raises(DataError, match=r"pattern '\('"):
        count_words(["a"], "(")


@pytest.mark.parametrize("text", ["a b", b"a b"])
def test_a_text_in_place_of_texts_is_refused(text):
    with pytest.raises(DataError, match="got a single text; expected several: put it in a list"):
        count_words(text)
