"""Folders of our tokenizers in transformers: through the class that lies beside them, and without it."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import tokenizers
import transformers
from transformers import dynamic_module_utils

from moeport.data.tokenizer import train_bpe
from moeport.tokenizers.definition import Definition, numbered, write_definition
from moeport.tokenizers.definition_reading import read_definition
from moeport.tokenizers.elsewhere import longest_first_of
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.folder import write_tokenizer
from moeport.tokenizers.splitting import splitter
from tests.support import rng
from tests.tokenizers.brute_force import trained

END = "<|endoftext|>"
TRAINED_ON = [
    "the cat sat on the mat; the other cats sat there, too. " * 20,
    "def other(x_1, y):\n    return x_1 + 12345 * y  # naïve café\n" * 20,
    "日本語のテキスト、日本の本。 " * 20,
]
TEXTS = [
    "",
    " ",
    "the cat's mats\n\n\tsat 2025 there  ",
    "naïve café — 日本語テキスト \U0001f600 e\u0301\u202e\ufeff",
    "".join(map(chr, range(300))),
    f"a{END}b {END}",
    "thethethethere" * 40,
]


def random_texts(number=40):
    """Words, parts of words, and characters of all kinds, in a random order."""
    draw = rng(5)
    parts = [*"".join(TRAINED_ON).split(), " ", "\n", "  ", "é", "\U0001f600", "\x00", "\u017f", "1", "'s", "語"]
    return ["".join(draw.choice(parts, draw.integers(1, 30))) for _ in range(number)]


def of_other():
    """As GPT-2's and Qwen's: its own ids, an added token in the vocabulary, and ordinary added tokens."""
    tree = json.loads(train_bpe(TRAINED_ON, 320).definition)
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 320, "content": "<think>", "special": False})
    return longest_first_of(json.dumps(tree))


def definition(encoding, pattern="digits", scaffolds=0.2):
    words = {word.encode() for text in TRAINED_ON for word in splitter(pattern)(text)}
    vocabulary = trained(sorted(words), 70, scaffolds)
    return write_definition(Definition(vocabulary, encoding, pattern, numbered(vocabulary, [END, "<pad>"])))


KINDS = {
    "Scaffold-BPE": lambda: definition("merges"),
    "LBPE": lambda: definition("longest_first", "gpt2", 0.0),
    "LBPE over Scaffold-BPE": lambda: definition("longest_first", "moeport"),
    "LBPE by merges": lambda: definition("longest_merge", "gpt4"),
    "LBPE over another tokenizer": of_other,
}


@pytest.fixture(autouse=True, scope="module")
def no_modules_in_the_home(tmp_path_factory):
    """transformers copies the code of a folder before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made, KINDS[request.param](), END)
    return made


@pytest.fixture(scope="module")
def whole(folder):
    return load(folder)


@pytest.fixture
def loaded(whole):
    return copy.deepcopy(whole)


def load(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def encoder(folder):
    return Encoder(read_definition((folder / "tokenizer.json").read_text()))


def test_ids_and_offsets_are_those_of_moeport(folder, loaded):
    texts, ours = [*TEXTS, *random_texts()], encoder(folder)
    found = loaded(texts, return_offsets_mapping=True)
    for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"], strict=True):
        own_ids, own_offsets = ours.encode_with_offsets(text, special=True)
        assert ids == own_ids.tolist()
        assert offsets == [tuple(pair) for pair in own_offsets.tolist()]
        assert loaded.decode(ids) == text == ours.decode(ids).decode()


def test_it_has_the_vocabulary_of_normal_tokens_alone(folder, loaded):
    found = read_definition((folder / "tokenizer.json").read_text())
    assert len(loaded) == found.size == len(found.ids) + len(found.special_tokens)
    assert loaded.eos_token_id == found.special_tokens[END]
    assert loaded.is_fast
    assert {*loaded.get_vocab().values()} == {*found.ids.values(), *found.special_tokens.values()}


def test_padding_truncation_and_pairs_are_those_of_the_library(folder, loaded):
    """As an ordinary tokenizer pads, cuts and joins the ids that ours gives."""
    loaded.pad_token = END
    ids = [loaded(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, ids))
    found = loaded(TEXTS, padding=True, return_tensors="np")
    for row, mask, own in zip(found["input_ids"], found["attention_mask"], ids, strict=True):
        assert row.tolist() == own + [loaded.pad_token_id] * (longest - len(own))
        assert mask.tolist() == [1] * len(own) + [0] * (longest - len(own))
    loaded.padding_side = loaded.truncation_side = "left"
    found = loaded(TEXTS[2:4], padding="max_length", truncation=True, max_length=8, pad_to_multiple_of=4)
    assert found["input_ids"] == [own[-8:] for own in ids[2:4]]
    loaded.truncation_side = "right"
    parts = loaded(TEXTS[2], truncation=True, max_length=6, stride=2, return_overflowing_tokens=True)
    assert parts["input_ids"][:2] == [ids[2][:6], ids[2][4:10]]
    assert loaded(TEXTS[2], TEXTS[3])["input_ids"] == ids[2] + ids[3]
    words = loaded(["the cat", " sat"], is_split_into_words=True)
    assert words["input_ids"] == loaded("the cat")["input_ids"] + loaded(" sat")["input_ids"]
    assert {*words.word_ids()} == {0, 1}


def test_words_are_pre_tokens(loaded):
    found = loaded("the cats there")
    assert [*dict.fromkeys(found.word_ids())] == [0, 1, 2]
    assert found.char_to_token(0) == 0
    assert found.tokens() == loaded.tokenize("the cats there") == loaded.convert_ids_to_tokens(found["input_ids"])
    assert loaded.convert_tokens_to_ids(found.tokens()) == found["input_ids"]
    assert loaded.convert_tokens_to_string(found.tokens()) == "the cats there"


def test_special_tokens(loaded):
    ids = loaded(f"the{END}cat")["input_ids"]
    assert loaded.decode(ids, skip_special_tokens=True) == "thecat"
    assert loaded.get_special_tokens_mask(ids, already_has_special_tokens=True) == [
        int(token == loaded.eos_token_id) for token in ids
    ]
    assert (
        loaded._encode_without_added_tokens(f"the{END}") == loaded(f"the{END}", split_special_tokens=True)["input_ids"]
    )


def equal(one, other):
    texts = [*TEXTS, "<extra>the <new>cat"]
    assert len(one) == len(other)
    assert one(texts)["input_ids"] == other(texts)["input_ids"]
    assert one(texts[2], return_offsets_mapping=True) == other(texts[2], return_offsets_mapping=True)
    assert one.special_tokens_map == other.special_tokens_map
    assert one.decode(one(texts[-1])["input_ids"]).endswith(texts[-1])


def test_added_tokens_are_saved_loaded_copied_and_pickled(folder, loaded, tmp_path):
    before = len(loaded)
    assert loaded.add_tokens(["<new>"]) + loaded.add_special_tokens({"bos_token": "<extra>"}) == 2
    loaded.add_bos_token = True
    assert loaded("<new>")["input_ids"] == [before + 1, before]
    names = {file.rpartition("/")[2] for file in map(str, loaded.save_pretrained(tmp_path / "saved"))}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    shutil.copytree(tmp_path / "saved", tmp_path / "copied")  # as a push to the hub and a download would
    shutil.rmtree(tmp_path / "saved")
    for other in (load(tmp_path / "copied"), pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        equal(loaded, other)
    load(tmp_path / "copied").save_pretrained(tmp_path / "copied")
    equal(loaded, load(tmp_path / "copied"))
    ours, end = encoder(tmp_path / "copied"), encoder(folder)
    assert ours.encode_batch(TEXTS)[3].tolist() == end.encode_batch(TEXTS)[3].tolist()


READERS = {
    "tokenizers": lambda folder: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    "a file": lambda folder: transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
    "AutoTokenizer": lambda folder: transformers.AutoTokenizer.from_pretrained(folder),
    "no code": lambda folder: transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    "PreTrainedTokenizerFast": lambda folder: transformers.PreTrainedTokenizerFast.from_pretrained(folder),
    "GPT2Tokenizer": lambda folder: transformers.GPT2Tokenizer.from_pretrained(folder),
    "Qwen2Tokenizer": lambda folder: transformers.Qwen2Tokenizer.from_pretrained(folder),
    "LlamaTokenizer": lambda folder: transformers.LlamaTokenizer.from_pretrained(folder),
}
REFUSALS = "did not match any variant|contains custom code|requires you to execute custom code"


@pytest.fixture(scope="module")
def scaffold(tmp_path_factory):
    made = tmp_path_factory.mktemp("scaffold")
    write_tokenizer(made, KINDS["Scaffold-BPE"](), END)
    return made


@pytest.mark.parametrize("reader", READERS)
def test_readers_without_the_class_fail(scaffold, reader, monkeypatch):
    """None of them emits ids that mean something else to the model."""
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)
    with pytest.raises(Exception, match=REFUSALS):
        READERS[reader](scaffold)


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_beside_a_model(scaffold, model, tmp_path, monkeypatch):
    """transformers knows tokenizers of these models, some of which it prefers to what a folder says."""
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0)
    here = shutil.copytree(scaffold, tmp_path / "here")
    (here / "config.json").write_text(json.dumps({"model_type": model}))
    for reader in ("AutoTokenizer", "no code"):
        with pytest.raises(Exception, match=REFUSALS):
            READERS[reader](here)
    beside = load(here)
    assert type(beside).__name__ == "MoeportTokenizer"
    assert beside(TEXTS)["input_ids"] == load(scaffold)(TEXTS)["input_ids"]


def test_a_later_format_is_refused(scaffold, tmp_path):
    here = shutil.copytree(scaffold, tmp_path / "here")
    tree = json.loads((here / "tokenizer.json").read_text())
    tree["model"]["format"] = 99
    (here / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"in format 99; expected 'moeport/BytePairs' up to format 1: use the token"):
        load(here)


def test_plain_bpe_needs_no_code(tmp_path):
    text = definition("merges", scaffolds=0.0)
    write_tokenizer(tmp_path, text, END)
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for each, ids in zip(TEXTS, Encoder(read_definition(text)).encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(loaded(each, split_special_tokens=True)["input_ids"], ids)
        assert loaded.decode(ids) == each
