"""Compiled code gives the ids of the plain encoder, for every pattern, on texts that are long, odd or no text."""

import random
import sys

import numba
import numpy as np
import pytest

from moeport.errors import DataError
from moeport.tokenizers import compiled, engines, kernel
from moeport.tokenizers.definition import ENCODINGS, Definition
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.programs import program_of
from moeport.tokenizers.streaming import BLOCK
from moeport.tokenizers.words import word_encoder
from tests.tokenizers.brute_force import trained
from tests.tokenizers.test_encoder import WORDS, definition, random_text

MORE_PATTERNS = (
    r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"\p{L}{2,3}\n?|a(?:l|w)?[lo]*l|(?:lo|l)w+\n{2}|=",
    r"\s*\n\t{3,}|\s+ ",
)
"""The first has an end of text, which no program expresses. The last two leave gaps and give characters back."""


@pytest.mark.parametrize("pattern", [*PATTERNS, *MORE_PATTERNS])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_ids_are_those_of_the_plain_encoder(encoding, pattern):
    """Text, then bytes among which few are UTF-8."""
    if pattern == MORE_PATTERNS[0]:
        assert program_of(pattern) is None
        return
    rng = random.Random(5)
    described = definition(encoding, pattern)
    plain, other = Encoder(described, "plain"), Encoder(described, "compiled")
    pieces = [b"\xe4\xb8", b"\xad", b"\xf0\x9f\x98\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"a", b" "]
    data = [random_text(rng, rng.randint(0, 120)) for _ in range(50)]
    data += [b"".join(rng.choices(pieces, k=30)) for _ in range(30)] + [rng.randbytes(50) for _ in range(30)]
    for ids, expected in zip(other.encode_batch(data), plain.encode_batch(data), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_random_vocabularies(encoding):
    """Words of few letters, so that ties, overlaps and runs abound."""
    rng = random.Random(6)
    for seed in range(10):
        words = [bytes(rng.choices(b"aab c", k=rng.randint(2, 12))) for _ in range(12)]
        described = Definition(trained(words, rng.randint(3, 25), 0.3, seed), encoding, "gpt2")
        encoder, encode = Encoder(described, "compiled"), word_encoder(described)
        for _ in range(50):
            word = bytes(rng.choices(b"aabbcd", k=rng.randint(1, 24)))
            assert encoder.encode_bytes(word).tolist() == encode(word)


def test_memory_that_overflows_is_begun_anew(monkeypatch):
    """Nothing else changes."""
    monkeypatch.setattr(compiled, "WORDS", 64)
    rng = random.Random(7)
    described = definition()
    encoder = Encoder(described, "compiled")
    texts = [random_text(rng, 200) for _ in range(20)]
    for ids, expected in zip(encoder.encode_batch(texts), Encoder(described, "plain").encode_batch(texts), strict=True):
        assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("character", ["a", " "])
def test_a_megabyte_of_one_character(encoding, character):
    """One pre-token: it takes time in proportion, and comes back."""
    text = (character * 2**20).encode()
    encoder = Encoder(definition(encoding, "gpt4"), "compiled")
    assert encoder.decode(encoder.encode_bytes(text)) == text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_text_is_encoded_in_parts(pattern, monkeypatch):
    """At the same time; the ids are those of the whole."""
    monkeypatch.setattr("moeport.tokenizers.streaming.BLOCK", 50)
    rng = random.Random(8)
    text = "".join(random_text(rng, 30) + rng.choice(["\n", "  \n", "=\n", "\r\n"]) + "then" for _ in range(300))
    described = definition("merges", pattern)
    whole = Encoder(described, "plain").encode_bytes(text.encode())
    monkeypatch.setattr("moeport.tokenizers.encoder.LONG", 1000)
    for engine in ("plain", "compiled"):
        first, long, last = Encoder(described, engine).encode_batch(["a", text, "b"], workers=3)
        assert long.tolist() == whole.tolist()
        assert (first.tolist(), last.tolist()) == ([97], [98])


def test_many_texts_are_encoded_at_once():
    """In order, whatever the number of workers."""
    encoder = Encoder(definition(), "compiled")
    texts = [f"lower {number} then\n" * 3000 for number in range(60)]
    assert sum(map(len, texts)) > 2 * BLOCK
    one, three = encoder.encode_batch(texts, workers=1), encoder.encode_batch(texts, workers=3)
    assert all((left == right).all() for left, right in zip(one, three, strict=True))
    assert encoder.decode(three[7]) == texts[7].encode()


def test_compiled_code_is_loaded_once_it_is_worth_it(monkeypatch):
    """Texts before and after have the same ids."""
    monkeypatch.setattr(engines, "WORTH_COMPILING", 100)
    encoder = Encoder(definition())
    text = " ".join(word.decode() for word in WORDS)
    results = [encoder.encode_batch([text])[0].tolist() for _ in range(4)]
    assert isinstance(vars(encoder._engine)["_engine"], compiled.CompiledEngine)
    assert results == [results[0]] * 4


def test_code_is_compiled_where_no_folder_can_keep_it():
    """Here because it is in no file."""
    found = {}
    exec("def double(number):\n    return 2 * number", found)
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(found["double"])
    assert kernel.compiled(found["double"])(4) == 8


def test_what_cannot_be_compiled_is_said(monkeypatch):
    """And what to do; the automatic choice goes on without."""
    monkeypatch.setitem(sys.modules, "moeport.tokenizers.compiled", None)
    monkeypatch.setattr(engines, "WORTH_COMPILING", 1)
    with pytest.raises(DataError, match=r"compiled is not possible: .*; choose auto"):
        Encoder(definition(), "compiled")
    expected = Encoder(definition(), "plain").encode_bytes(b"low").tolist()
    encoder = Encoder(definition())
    with pytest.warns(UserWarning, match="encoding is slow: numba is installed, but fails: import of moeport"):
        assert encoder.encode_bytes(b"low").tolist() == expected
    assert encoder.encode_bytes(b"low").tolist() == expected  # without a second warning
    with pytest.raises(DataError, match=r"compiled is not possible: the pattern .* needs a library of regular expr"):
        Encoder(definition(pattern=r"\w+|\W+"), "compiled")
