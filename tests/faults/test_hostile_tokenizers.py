"""Tokenizers whose patterns fail or do not end, and whose ids no embedding can have."""

import json
import os
import time

import pytest

from moeport.data import guarded
from moeport.data.tokenizer import Tokenizer
from moeport.errors import DataError
from tests.faults.hostile import tokenizer_json


def definition(**model):
    tree = tokenizer_json()
    tree["model"] |= model
    return json.dumps(tree)


def with_pattern(pattern):
    tree = tokenizer_json()
    tree["pre_tokenizer"]["pattern"]["Regex"] = pattern
    return json.dumps(tree)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$"])
def test_a_pattern_that_panics(pattern, capfd):
    tokenizer = Tokenizer(with_pattern(pattern))
    with pytest.raises(DataError, match=r"^the tokenizers library gave up \(Onig: .*\); fix the tokenizer\.json, or"):
        tokenizer.encode_batch(["a" * 40 + "!"])
    assert capfd.readouterr().err == ""
    assert tokenizer.encode_batch(["aab"])[0].tolist()


@pytest.mark.parametrize("pattern", ["(", "[z-a]", r"\p{Nope}", "a{9999999999}"])
def test_a_pattern_that_is_none(pattern):
    with pytest.raises(DataError, match=r"^JSON, but not a tokenizer\.json of Hugging Face tokenizers"):
        Tokenizer(with_pattern(pattern))


def test_what_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(guarded, "BASE_SECONDS", 0.05)

    def busy():
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass

    with pytest.raises(DataError, match=r"^the tokenizer took more than 0\.1 s of processor time for 0 characters; a"):
        guarded.guarded(busy, 0)


def test_what_the_library_prints_is_passed_on(capfd):
    guarded.guarded(lambda: os.write(2, b"a warning\n"), 0)
    assert capfd.readouterr().err == "a warning\n"


@pytest.mark.parametrize(
    ("vocabulary", "wrong"),
    [
        ({"a": 0, "u": 2**31, "b": 1, "ab": 2}, "token '.*' has the id 2,147,48.*, but there are only 5 tokens"),
        ({"a": 0, "u": 2**32 - 1, "b": 1, "ab": 2}, "token '.*' has the id 4,294,967,295|JSON, but not|the tokenizers"),
        ({"a": 0, "u": 10**6, "b": 1, "ab": 2}, "token '.*' has the id 1,000,000, but there are only 5 tokens"),
        ({"a": 0, "u": 1, "b": 1, "ab": 2}, "tokens '.*' and '.*' share the id 1; expected an id for each"),
        ({"a": 0, "u": -1, "b": 1, "ab": 2}, "JSON, but not a tokenizer.json"),
        ({"a": 0, "u": 2**40, "b": 1, "ab": 2}, "JSON, but not a tokenizer.json"),
        ({"a": 0.5, "u": 1, "b": 1, "ab": 2}, "JSON, but not a tokenizer.json"),
        ([], "JSON, but not a tokenizer.json"),
    ],
)
def test_ids_that_cannot_be_used(vocabulary, wrong):
    with pytest.raises(DataError, match=f"^(?:{wrong})"):
        Tokenizer(definition(vocab=vocabulary))


def test_a_vocabulary_with_holes():
    tokenizer = Tokenizer(definition(vocab={"a": 0, "b": 70, "ab": 300, "u": 4, "<|endoftext|>": 8}))
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (301, 8)
    assert tokenizer.encode_batch(["ab"])[0].tolist() == [0, 70]
    assert tokenizer.decode([5, 0]) == "a"


def test_an_empty_vocabulary():
    tree = tokenizer_json()
    tree["added_tokens"] = []
    tree["model"] |= {"vocab": {}, "merges": [], "unk_token": None}
    with pytest.raises(DataError, match=r"^the vocabulary is empty;"):
        Tokenizer(json.dumps(tree))
