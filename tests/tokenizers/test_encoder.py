"""Every encoding against its definition, on texts and on bytes of any kind."""

import pickle
import random
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer

from moeport.errors import DataError
from moeport.tokenizers.definition import ENCODINGS, Definition, numbered, write_definition
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.longest import longest_first
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.splitting import splitter
from moeport.tokenizers.vocabulary import Vocabulary
from moeport.tokenizers.words import word_encoder
from tests.tokenizers.brute_force import longest_anywhere, longest_merge, lowest_rank, trained

WORDS = [b"lower", b" lowest", b" newer", b"wide", b" wider", b"aaaaa", b"aaaa", b" the", b" then", b"\n\n  ", b"==="]
END = "<|endoftext|>"
BRUTE = {
    "merges": lowest_rank,
    "longest_merge": longest_merge,
    "longest_first": lambda word, vocabulary: longest_anywhere(word, vocabulary.tokens),
}


def definition(encoding="merges", pattern="gpt2", scaffolds=0.2, seed=0):
    vocabulary = trained(WORDS, 24, scaffolds, seed)
    return Definition(vocabulary, encoding, pattern, numbered(vocabulary, [END]))


def random_text(rng, length):
    """Characters that patterns tell apart, some that are in no pattern, and some assigned lately or never."""
    common = "aaaalloowwerthn  \n\r\t'sS'tll12½_.,=-\u3000\u4e2d\u6587\u0301\U0001f600\u017f\u00df\x00\x85\x1c\ufffd"
    rare = [0x558, 0x88F, 0x11DE0, 0x323B0, 0x10FFFF, 0xE000, 0x1CCD6, 0x16D40]
    return "".join(
        rng.choice(common) if rng.random() < 0.97 else chr(rng.choice([*rare, rng.randrange(0x20, 0xD800)]))
        for _ in range(length)
    )


@pytest.mark.parametrize("scaffolds", [0.0, 0.4])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_words_are_encoded_as_defined(encoding, scaffolds):
    """Random words of few letters, so that ties, overlaps and runs abound."""
    rng = random.Random(1)
    for seed in range(10):
        words = [bytes(rng.choices(b"aab c", k=rng.randint(2, 12))) for _ in range(12)]
        vocabulary = trained(words, rng.randint(3, 25), scaffolds, seed)
        described = Definition(vocabulary, encoding)
        encode, token = word_encoder(described), {number: token for token, number in described.ids.items()}
        for _ in range(40):
            word = bytes(rng.choices(b"aabb cd", k=rng.randint(1, 24)))
            assert [token[number] for number in encode(word)] == BRUTE[encoding](word, vocabulary)
            if encoding == "merges":
                assert vocabulary.encode_word(word) == lowest_rank(word, vocabulary)


def test_longest_first_takes_a_vocabulary_or_its_tokens():
    """The longest wherever it is, also where no merge leads to it; ties go to the left."""
    tokens = {bytes([byte]) for byte in b"abcd"} | {b"ab", b"bc", b"bcd"}
    assert longest_first(b"abcd", tokens) == [b"a", b"bcd"]
    assert longest_first(b"abc", tokens) == [b"ab", b"c"]
    assert longest_first(b"", tokens) == []
    scaffold = Vocabulary("scaffold_bpe", ((b"a", b"b"), (b"ab", b"c")), frozenset([b"ab"]))
    assert longest_first(b"ababc", scaffold) == [b"a", b"b", b"abc"]
    with pytest.raises(DataError, match=r"no token for the byte b'e'.*a token for each byte"):
        longest_first(b"ae", tokens)


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{Lu}?\p{Ll}+|(\d)(\d)", "aa|x"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_text_and_any_bytes_come_back(encoding, pattern):
    """Whatever the pattern, which may leave gaps; every pre-token is encoded by itself."""
    rng = random.Random(2)
    encoder = Encoder(definition(encoding, pattern))
    for length in (0, 1, 7, 300):
        text = random_text(rng, length)
        (ids,) = encoder.encode_batch([text])
        assert ids.dtype == np.uint32
        assert encoder.decode(ids) == text.encode()
        data = rng.randbytes(length)
        assert encoder.decode(encoder.encode_bytes(data)) == data
        words = [word for piece in splitter(pattern)(text) for word in word_encoder(encoder.definition)(piece.encode())]
        assert ids.tolist() == words


def test_surrogates_that_stand_alone_come_back_as_bytes():
    """They are no UTF-8, but nothing is lost, and other characters are not moved."""
    encoder = Encoder(definition())
    text = "a\ud800\udc00b \udfff"
    ids, spans = encoder.encode_with_offsets(text)
    assert encoder.decode(ids).decode("utf-8", "surrogatepass") == text
    assert spans[[0, -1]].tolist() == [[0, 1], [5, 6]]


@pytest.fixture
def small_blocks(monkeypatch):
    """Streams are encoded in blocks of a few bytes."""
    monkeypatch.setattr("moeport.tokenizers.streaming.BLOCK", 100)
    monkeypatch.setattr("moeport.tokenizers.encoder.BLOCK", 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stream_may_be_cut_anywhere(pattern):
    """Blocks of a few bytes, cut within characters, runs of white space and contractions."""
    rng = random.Random(3)
    encoder = Encoder(definition("longest_first", pattern))
    for _ in range(5):
        data = (random_text(rng, 400) + rng.choice(["", " " * 300, "a" * 300, "\n" * 200 + " x"])).encode()
        data += random_text(rng, 300).encode() + rng.randbytes(5)
        cuts = sorted(rng.choices(range(len(data)), k=rng.randint(0, 60)))
        chunks = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        streamed = list(encoder.encode_stream(chunks))
        assert np.concatenate(streamed).tolist() == encoder.encode_bytes(data).tolist()
        assert len(streamed) > 1


@pytest.mark.usefixtures("small_blocks")
def test_a_stream_holds_little():
    """Ids come out while text goes in."""
    held = 0

    def chunks():
        nonlocal held
        for number in range(300):
            chunk = "lower then\n" * (number % 3) + " " * (number % 7)
            held += len(chunk)
            yield chunk

    encoder = Encoder(definition())
    for ids in encoder.encode_stream(chunks()):
        held -= len(encoder.decode(ids))
        assert held < 500
    assert held == 0


def test_special_tokens_are_text_unless_asked_for():
    """Spelled out, they are ordinary text; asked for, the longest of those that fit."""
    vocabulary = trained(WORDS, 5)
    encoder = Encoder(Definition(vocabulary, "merges", "gpt2", numbered(vocabulary, ["<s>", "<s><t>", END])))
    text = f"a<s><t>b{END}<s>"
    (ordinary,) = encoder.encode_batch([text])
    (special,) = encoder.encode_batch([text], special=True)
    assert ordinary.max() < len(vocabulary.tokens)
    first = len(vocabulary.tokens)
    assert special.tolist() == [97, first + 1, 98, first + 2, first]
    assert encoder.decode(special) == encoder.decode(ordinary) == text.encode()


def test_offsets_are_places_of_characters():
    """Tokens with a part of a character span the whole of it."""
    encoder = Encoder(definition(scaffolds=0.0))
    text = "the \u4e2d\u6587 lower"
    ids, spans = encoder.encode_with_offsets(text)
    whole = {token: text[start:end] for token, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True)}
    assert all(encoder.decode([token]) in text.encode() for token in ids.tolist())
    assert {"\u4e2d", "\u6587"} <= set(whole.values())
    assert (spans[0, 0], spans[-1, 1]) == (0, len(text))
    assert all(
        encoder.decode([token]).decode(errors="ignore") in (text[start:end], "")
        for token, (start, end) in zip(ids.tolist(), spans.tolist(), strict=True)
    )


def test_ids_are_those_of_the_tokenizers_library():
    """Plain BPE, written as an ordinary tokenizer.json; also for characters that few libraries know."""
    rng = random.Random(4)
    for pattern in PATTERNS:
        described = definition("merges", pattern, scaffolds=0.0)
        theirs = HFTokenizer.from_str(write_definition(described))
        texts = [random_text(rng, 200) for _ in range(10)]
        for text, ids in zip(texts, Encoder(described).encode_batch(texts), strict=True):
            assert theirs.encode(text, add_special_tokens=False).ids == ids.tolist()
            assert theirs.decode(ids.tolist(), skip_special_tokens=False) == text


def test_decoding_forgives_ids_without_a_token():
    """Rows of an embedding that no token has; a negative id is a mistake."""
    encoder = Encoder(definition())
    assert encoder.decode([97, encoder.vocab_size, 2**31, 98]) == b"ab"
    assert encoder.decode([]) == b""
    with pytest.raises(DataError, match=r"the id -1 is negative; expected ids from 0 to"):
        encoder.decode([97, -1])


def test_an_encoder_can_be_pickled():
    """As data loaders do."""
    encoder = Encoder(definition("longest_first"))
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.definition == encoder.definition
    assert copy.encode_bytes(b"lower then").tolist() == encoder.encode_bytes(b"lower then").tolist()


def test_without_a_library_of_expressions_ids_are_the_same(monkeypatch):
    """The tokenizers library cuts then, which is always there."""
    rng = random.Random(6)
    texts = [random_text(rng, 100) for _ in range(5)] + ["\ud800 a\udfff", ""]
    for pattern in PATTERNS:
        expected = [ids.tolist() for ids in Encoder(definition(pattern=pattern)).encode_batch(texts)]
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "regex", None)
            encoder = Encoder(definition(pattern=pattern), "plain")
            assert [ids.tolist() for ids in encoder.encode_batch(texts)] == expected
            with pytest.raises(DataError, match="expected a regular expression"):
                Encoder(definition(pattern="("), "plain")


def test_unknown_choices_are_named():
    """With what was expected."""
    with pytest.raises(DataError, match=r"engine: got 'fast'; expected one of auto, plain, compiled"):
        Encoder(definition(), "fast")
    with pytest.raises(DataError, match=r"pattern '\(': .*; expected a regular expression"):
        Encoder(definition(pattern="("))
