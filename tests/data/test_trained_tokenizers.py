"""Scaffold-BPE and LBPE by name in a config: trained, cached, encoded by processes, and read back."""

import json
import pickle

import numpy as np
import pytest

from moeport.config import config_from_dict
from moeport.config.data import DataConfig, FilesSource, known_vocab_size
from moeport.data import inspect, prepare_data
from moeport.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from moeport.data.trained_tokenizer import training_key
from moeport.errors import ConfigError, DataError
from moeport.tokenizers import train
from moeport.tokenizers.definition import Definition, numbered
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.folder import write_tokenizer
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.pretokens import count_words

TRAIN = "def other(x_1, y):\n    return x_1 + 12345 * y  # naïve café\nthe cats sat, the other cat too 日本語\n" * 9
HELD_OUT = "the cat sat 2025 日本\n" * 9
SIZE = 270
CONFIGS = {
    "scaffold_bpe": {"name": "scaffold_bpe", "vocab_size": SIZE},
    "lbpe": {"name": "lbpe", "vocab_size": SIZE, "pattern": "gpt2"},
    "lbpe over scaffold_bpe": {"name": "lbpe", "vocab_size": SIZE, "base": "scaffold_bpe", "pattern": r"\w+|\W"},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TRAIN)
    (folder / "b.txt").write_text(HELD_OUT)
    return folder


def config_of(texts, tokenizer, cache):
    source = FilesSource(paths=(str(texts / "a.txt"),), validation_paths=(str(texts / "b.txt"),))
    return DataConfig(source=source, tokenizer=tokenizer, sequence_length=16, cache_dir=texts / cache)


def prepare(texts, tokenizer, cache="cache", **options):
    lines = []
    return prepare_data(config_of(texts, tokenizer, cache), report=lines.append, **options), lines


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def prepared(texts, name):
    return prepare(texts, CONFIGS[name])


def as_the_config_says(options):
    """The encoder, by hand."""
    pattern = options.get("pattern", "moeport")
    algorithm = options.get("base", "bpe" if options["name"] == "lbpe" else "scaffold_bpe")
    vocabulary = train(count_words([TRAIN], pattern), SIZE - 1, algorithm)
    encoding = "longest_first" if options["name"] == "lbpe" else "merges"
    return Encoder(Definition(vocabulary, encoding, pattern, numbered(vocabulary, [END_OF_TEXT])))


def test_training_gives_the_ids_of_the_encoder(prepared, name):
    data, lines = prepared
    label = "a Scaffold-BPE" if name == "scaffold_bpe" else "an LBPE"
    assert lines[0].startswith(f"training {label} tokenizer of 270 tokens on 1 document (0.0 MB)")
    tokenizer = data.tokenizer
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (SIZE, SIZE - 1)
    ids = as_the_config_says(CONFIGS[name]).encode_batch([TRAIN])[0].tolist()
    inputs = data.train.batch(np.arange(data.train.num_sequences))[0].reshape(-1)
    assert inputs.tolist() == [SIZE - 1, *ids][: inputs.size]
    assert tokenizer.decode(ids) == TRAIN


def test_it_is_trained_once(prepared, texts, name):
    again, lines = prepare(texts, CONFIGS[name])
    assert [line.split()[0] for line in lines] == ["using"]
    assert again.tokenizer.fingerprint == prepared[0].tokenizer.fingerprint
    described = inspect.described(config_of(texts, CONFIGS[name], "cache"))
    assert sum("vocabulary of 270" in line for line in described) == 2


@pytest.mark.slow
def test_processes_encode_alike(prepared, texts, name):
    other, _ = prepare(texts, CONFIGS[name], cache="other", workers=2)
    assert other.train.metadata == prepared[0].train.metadata


def test_copies_encode_alike(prepared):
    tokenizer = prepared[0].tokenizer
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in (TRAIN, HELD_OUT, "", f"a{END_OF_TEXT}b \U0001f600"):
        (ids,), (same,) = tokenizer.encode_batch([text]), copy.encode_batch([text])
        np.testing.assert_array_equal(ids, same)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("4", 4), ("0", None), ("", None)])
def test_threads_are_limited_as_those_of_the_library(prepared, limit, threads, monkeypatch):
    """In each of several processes that encode, one thread works."""
    monkeypatch.setenv("RAYON_NUM_THREADS", limit)
    monkeypatch.setattr(Encoder, "encode_batch", lambda encoder, texts, workers: workers)
    assert prepared[0].tokenizer.encode_batch(["a"]) == threads


def test_text_comes_back_in_parts(prepared):
    tokenizer = prepared[0].tokenizer
    (ids,) = tokenizer.encode_batch(["the cats 日本語 \U0001f600"])
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == f"the cats 日本語 \U0001f600{END_OF_TEXT}"
    assert tokenizer.decode(ids[:-1]) == "the cats 日本語 \ufffd"
    assert tokenizer.continuation(ids.tolist(), len(ids) - 4) == "\U0001f600"


def test_a_folder_of_ours_is_a_tokenizer_by_file(prepared, texts, name, tmp_path):
    tokenizer = prepared[0].tokenizer
    write_tokenizer(tmp_path / "folder", tokenizer.definition, END_OF_TEXT)
    assert load_tokenizer(tmp_path / "folder/tokenizer.json").fingerprint == tokenizer.fingerprint
    if name == "scaffold_bpe":
        data, _ = prepare(texts, {"name": "file", "path": str(tmp_path / "folder")})
        assert data.train.metadata == prepared[0].train.metadata


def test_damaged_files_of_ours_are_refused(prepared, tmp_path):
    definition, path = prepared[0].tokenizer.definition, tmp_path / "tokenizer.json"
    path.write_text(definition)
    with pytest.raises(DataError, match=r"the vocabulary has no token '</s>'; special tokens: <\|endoftext\|>; set"):
        load_tokenizer(path, "</s>")
    for change, message in (
        ({"format": 99}, "in format 99; this version of moeport reads"),
        ({"scaffolds": [10**6]}, "scaffold 1000000 is not a merge"),
        ({"merges": None}, "an entry is missing or malformed"),
    ):
        tree = json.loads(definition)
        tree["model"] |= change
        path.write_text(json.dumps(tree))
        with pytest.raises(DataError, match=f"^{path}: .*{message}"):
            load_tokenizer(path)


def test_other_options_train_another_tokenizer(texts):
    options = [
        {"name": "bpe"},
        {"name": "scaffold_bpe"},
        {"name": "scaffold_bpe", "pattern": "digits"},
        {"name": "lbpe"},
        {"name": "lbpe", "base": "scaffold_bpe"},
        {"name": "lbpe", "vocab_size": 5000},
    ]
    keys = {json.dumps(training_key(config_of(texts, each, "cache").tokenizer)) for each in options}
    assert len(keys) == len(options)


def test_little_text_yields_fewer_tokens_and_says_so(texts):
    data, lines = prepare(texts, {"name": "scaffold_bpe", "vocab_size": 5000})
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning == f"warning: the text yields a vocabulary of {data.tokenizer.vocab_size:,} tokens only"
    assert data.tokenizer.vocab_size < 1000


def test_plain_bpe_is_an_ordinary_file_under_the_same_name_in_the_cache():
    assert json.loads(train_bpe([TRAIN], SIZE).definition)["model"]["type"] == "BPE"
    assert training_key(DataConfig().tokenizer) == [{"name": "bpe", "vocab_size": 4096}, PATTERNS["moeport"]]


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W+", " ?x"])
def test_patterns(pattern):
    config = config_from_dict({"data": {"tokenizer": {"name": "lbpe", "pattern": pattern}}})
    assert config.data.tokenizer.pattern == pattern
    assert known_vocab_size(config.data) == 4096


@pytest.mark.parametrize("pattern", ["gtp2", "", "(", "moe-port"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.pattern: is neither the name of a pattern nor a regular"):
        config_from_dict({"data": {"tokenizer": {"name": "scaffold_bpe", "pattern": pattern}}})
