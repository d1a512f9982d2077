import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from moeport.data.tokenizer import SPLIT_PATTERN, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from moeport.errors import DataError

TEXTS = [
    "",
    "def add(a, b):\n    return a + b\n\n\n\tx_1 = 12345  # sum\r\n",
    "naïve café — 日本語 \U0001f600 e\u0301 \u202e \ufeff",
    "".join(map(chr, range(256))),
    " \n \t\n   leading, trailing   ",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS * 3, 400)


@pytest.fixture(params=["byte", "bpe", "saved bpe"])
def tokenizer(request, bpe, tmp_path):
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "bpe":
        return bpe
    bpe.save(tmp_path / "tokenizer.json")
    return load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_and_holds_no_end_of_text(tokenizer, text):
    (ids,) = tokenizer.encode_batch([text])
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert ids.max(initial=0) < tokenizer.vocab_size


def test_batches_keep_the_order(tokenizer):
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS


def test_end_of_text_is_written_out(tokenizer):
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode())


def test_saved_byte_tokenizer_gives_the_same_ids(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    for ours, theirs in zip(tokenizer.encode_batch(TEXTS), loaded.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_saved_file_is_a_tokenizer_json(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    text = TEXTS[1]
    ids = HFTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    np.testing.assert_array_equal(bpe.encode_batch([text])[0], ids)
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == bpe.fingerprint


def test_bpe_has_as_many_tokens_as_asked_for_where_the_text_allows(bpe):
    assert bpe.vocab_size == 400
    assert train_bpe(["ab"], 400).vocab_size == 258


@pytest.mark.parametrize("piece", ["a", " ", "\n", "!", "é1", "! ", "\r\n"])
def test_long_runs_are_cut_into_short_pieces(piece):
    split = Regex(SPLIT_PATTERN)
    pieces = [text for text, _ in pre_tokenizers.Split(split, "isolated").pre_tokenize_str(piece * 2000)]
    assert "".join(pieces) == piece * 2000
    assert max(map(len, pieces)) <= 400


def test_bpe_is_the_same_in_a_fresh_process(bpe):
    code = f"from moeport.data.tokenizer import train_bpe\nprint(train_bpe({TEXTS!a} * 3, 400).fingerprint)"
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == bpe.fingerprint


def test_settings_of_a_given_tokenizer_that_change_the_text_are_off(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    given = HFTokenizer.from_file(str(path))
    given.enable_truncation(2)
    given.enable_padding(length=50)
    given.save(str(path))
    (ids,) = load_tokenizer(path).encode_batch([TEXTS[1]])
    np.testing.assert_array_equal(ids, bpe.encode_batch([TEXTS[1]])[0])


def test_end_of_text_is_part_of_the_fingerprint(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json", "a").fingerprint != bpe.fingerprint


def refused(path, message, end_of_text="<|endoftext|>"):
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}"):
        load_tokenizer(path, end_of_text)


def test_missing_file(tmp_path):
    refused(tmp_path / "tokenizer.json", "cannot read the tokenizer: No such file or directory")
    refused(tmp_path, "cannot read the tokenizer: it is a folder, not a file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02model", "not UTF-8 at byte 0; expected a tokenizer.json"),
        (b'{"model": ', "not JSON: Expecting value at line 1 column 11; expected a tokenizer.json"),
        (b'{"hello": 1}', "JSON, but not a tokenizer.json of Hugging Face tokenizers ("),
        (b"[]", "JSON, but not a tokenizer.json of Hugging Face tokenizers ("),
    ],
)
def test_file_that_is_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    refused(path, message)


def test_unknown_end_of_text(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    refused(
        path,
        "the vocabulary has no token '<eot>'; did you mean '<|endoftext|>'? special tokens: <|endoftext|>; "
        "set data.tokenizer.end_of_text",
        "<eot>",
    )
    definition = json.loads(path.read_text())
    definition["added_tokens"] = []
    del definition["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(DataError, match=r"^the vocabulary has no token '</s>'; special tokens: none"):
        Tokenizer(json.dumps(definition), "</s>")
