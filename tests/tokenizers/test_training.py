import json
import random
import re
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from moeport.errors import DataError
from moeport.tokenizers import Choices, train
from moeport.tokenizers.byte_level import from_characters
from moeport.tokenizers.training_choices import VALUES
from tests.tokenizers import reference
from tests.tokenizers.corpora import random_case

pytestmark = pytest.mark.filterwarnings("ignore:vocab_size. .* is out of reach:UserWarning")

# One choice at a time, and words on which it decides the outcome: (tokens wanted, words).
DECIDED = {
    ("pair_ties", "largest"): (257, {b"ab": 1, b"bc": 1}),
    ("pair_ties", "oldest"): (258, {b"ab": 9, b"abc": 2, b"bq": 2}),
    ("pair_ties", "newest"): (258, {b"zy": 9, b"zyc": 2, b"bq": 2}),
    ("pair_ties", "merged"): (260, {b"ab": 9, b"bc": 8, b"abx": 1, b"axx": 1}),
    ("pair_ties", "first"): (257, {b"zz": 1, b"aa": 1}),
    ("pair_ties", "huggingface"): (257, {b" a": 1, b"aa": 1}),
    ("overlaps", "disjoint"): (257, {b"bbb": 3, b"ac": 4}),
    ("min_frequency", 2): (300, {b"abc": 1, b"cd": 2}),
}
# The same for those that need more words: a random corpus.
DECIDED_AT = {
    ("scaffold_ties", "pair"): 828,
    ("scaffold_ties", "rule"): 183,
    ("head", "pairs"): 1368,
    ("scaffold_key", "pushed"): 828,
    ("used_up", "readmitted"): 345,
}


def words_of(text):
    return {word.encode(): count for word, count in Counter(re.findall(r" ?\w+|\s|[^\w\s]+", text)).items()}


def library_text(num_bytes):
    folder = Path(sysconfig.get_paths()["stdlib"])
    return (folder / "argparse.py").read_text()[:num_bytes]


def outcome(vocabulary):
    return [*vocabulary.merges], {*vocabulary.scaffolds}, {*vocabulary.tokens}


def expected(words, vocab_size, algorithm, choices):
    merges, scaffolds, normal = reference.train(words, vocab_size, algorithm, choices)
    return merges, scaffolds, {*normal}


@pytest.mark.parametrize("algorithm", ["bpe", "scaffold_bpe"])
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_merges_and_scaffolds_are_those_of_the_algorithm(algorithm, first):
    for seed in range(first, first + 20):
        words, vocab_size, choices = random_case(seed)
        vocabulary = train(words, vocab_size, algorithm, choices)
        assert outcome(vocabulary) == expected(words, vocab_size, algorithm, choices), seed
        for word in words:
            assert vocabulary.encode_word(word) == reference.encode(word, vocabulary.merges, vocabulary.scaffolds)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["bpe", "scaffold_bpe"])
def test_merges_and_scaffolds_of_many_more_corpora(algorithm):
    for seed in range(60, 1500):
        words, vocab_size, choices = random_case(seed)
        got = outcome(train(words, vocab_size, algorithm, choices))
        assert got == expected(words, vocab_size, algorithm, choices), seed


def test_real_text_trains_as_the_algorithm_says():
    words = words_of(library_text(2500))
    vocabulary = train(words, 330)
    assert outcome(vocabulary) == expected(words, 330, "scaffold_bpe", Choices())
    assert len(vocabulary.tokens) == 330
    assert vocabulary.scaffolds


@pytest.mark.parametrize(("name", "value"), DECIDED)
def test_each_choice_decides_something(name, value):
    vocab_size, words = DECIDED[name, value]
    choices = Choices(**{name: value})
    got = outcome(train(words, vocab_size, "bpe", choices))
    assert got == expected(words, vocab_size, "bpe", choices)
    assert got != outcome(train(words, vocab_size, "bpe"))


@pytest.mark.parametrize(("name", "value"), DECIDED_AT)
def test_each_choice_about_scaffolds_decides_something(name, value):
    words, vocab_size, _ = random_case(DECIDED_AT[name, value])
    usual = Choices(scaffold_ties="pair" if name == "scaffold_key" else "scaffold")
    choices = replace(usual, **{name: value})
    got = outcome(train(words, vocab_size, choices=choices))
    assert got == expected(words, vocab_size, "scaffold_bpe", choices)
    assert got != outcome(train(words, vocab_size, choices=usual))


def test_every_value_is_held_by_a_case():
    others = {(name, value) for name, values in VALUES.items() for value in values[1:]}
    assert others - {("unreachable", "error")} == {*DECIDED, *DECIDED_AT} - {("min_frequency", 2)}


def test_a_scaffold_can_become_normal_again():
    # "ab" occurs 3 times, then "abe" takes 2 of them: the 1 left is less than the 2 of "cd", and is next after it.
    words = {b"abe": 2, b"ab": 1, b"cd": 2}
    steps = [train(words, size) for size in (257, 258, 259)]
    assert [vocabulary.tokens[256:] for vocabulary in steps] == [(b"ab",), (b"abe", b"cd"), (b"ab", b"abe", b"cd")]
    assert [vocabulary.scaffolds for vocabulary in steps] == [set(), {b"ab"}, set()]
    assert steps[1].encode_word(b"abeab") == [b"abe", b"a", b"b"]


@pytest.mark.parametrize("algorithm", ["bpe", "scaffold_bpe"])
def test_the_order_of_the_words_does_not_matter(algorithm):
    items = [*words_of(library_text(20_000)).items()]
    first = train(dict(items), 500, algorithm)
    random.Random(0).shuffle(items)
    assert train(dict(items), 500, algorithm) == first


def test_bpe_is_that_of_the_tokenizers_library():
    text = library_text(60_000) + "aaaa aaaaaaa aaa\u00e9\u00e9\u00e9\u00e9 " * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    words = Counter(text[start:end] for _, (start, end) in cut)
    ours = train({word.encode(): count for word, count in words.items()}, 900, "bpe", Choices(pair_ties="huggingface"))
    theirs = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    assert [from_characters(token) for token in theirs[256:]] == [*ours.tokens[256:]]
    for word in [*words][::7]:
        assert [from_characters(token) for token in tokenizer.encode(word).tokens] == ours.encode_word(word.encode())


@pytest.mark.parametrize("words", [{}, {b"a": 3}, {b"": 2, b"ab": 0}])
def test_words_without_pairs_give_the_bytes(words):
    with pytest.warns(UserWarning, match="300 is out of reach; the words yield 256 tokens"):
        assert train(words, 300).merges == ()


def test_a_size_out_of_reach_says_so():
    with pytest.warns(UserWarning, match=r"300 is out of reach; the words yield 258 tokens.*ask for at most 258"):
        assert len(train({b"abc": 5}, 300, "bpe").tokens) == 258
    with pytest.raises(DataError, match="out of reach"):
        train({b"abc": 5}, 300, choices=Choices(unreachable="error"))


def test_progress_is_told():
    told = []
    train(words_of(library_text(20_000)), 500, progress=told.append)
    assert told[-1] > 400
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train({}, 255), "vocab_size: got 255; expected at least 256"),
        (lambda: train({}, 300, "scaffold"), "algorithm: got 'scaffold'; expected one of bpe, scaffold_bpe"),
        (lambda: train(json.loads('{"ab": 1}'), 300), "words: got 'ab'; expected pre-tokens as bytes"),
        (lambda: train({b"ab": -1}, 300), "b'ab' occurs -1 times; expected counts of 0 or more"),
        (
            lambda: Choices(pair_ties="small"),
            "pair_ties: got 'small'; expected one of smallest, .*did you mean smallest",
        ),
        (lambda: Choices(min_frequency=0), "min_frequency: got 0; expected 1 or more"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(DataError, match=message):
        call()
