"""Tokenizers that were trained elsewhere, encoded by LBPE: the same vocabulary and ids, or a refusal by name."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moeport.data.tokenizer import Tokenizer as TextTokenizer
from moeport.errors import DataError
from moeport.tokenizers.byte_level import to_characters
from moeport.tokenizers.definition import Definition, write_definition
from moeport.tokenizers.definition_reading import read_definition
from moeport.tokenizers.elsewhere import longest_first_of
from moeport.tokenizers.encoder import Encoder
from moeport.tokenizers.normalizing import normalizing
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.splitting import splitter
from tests.tokenizers.brute_force import longest_anywhere

TRAINED_ON = ["the cat sat on the mat; the other cats sat there, too: x_1 = 12345. naïve café 日本語の本 " * 20]
TEXTS = ["the cats there 12", "naïve 日本語 \U0001f600", "a<|end|>b<think>", "cafe\u0301 A\u030a \ufb01 \x00 \xff", ""]
END = "<|end|>"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def trained(pre_tokenizer, special, after=(), normalizer=None):
    """As these projects train and save them; `after` are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TRAINED_ON, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([END])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in after])
    return tokenizer


def gpt2():
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), [END]).to_str()


def by_pattern(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def without_order(tokenizer):
    """Merges as files have them that were converted from tiktoken's: whole words first, and several ways to a token."""
    tree = json.loads(tokenizer.to_str())
    merges = tree["model"]["merges"]
    tree["model"] |= {"merges": [*reversed(merges), merges[0]], "ignore_merges": True}
    return json.dumps(tree)


OTHERS = {
    "GPT-2": gpt2,
    "Llama 3": lambda: without_order(trained(by_pattern(LLAMA3), [])),
    "Qwen": lambda: trained(by_pattern(PATTERNS["gpt4"]), [], ["<think>"], normalizers.NFC()).to_str(),
    "ours": lambda: write_definition(Definition(read_definition(gpt2()).vocabulary, "merges", "gpt2", {END: 9000})),
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request):
    return OTHERS[request.param]()


def test_every_token_keeps_its_id(other):
    before, after = json.loads(other), json.loads(longest_first_of(other))
    added = {token["content"] for token in before["added_tokens"]}
    assert after["model"]["vocab"] == {
        token: number for token, number in before["model"]["vocab"].items() if token not in added
    }
    kept = ("added_tokens", "normalizer", "pre_tokenizer", "decoder", "post_processor")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert after["model"]["encoding"] == "longest_first"
    assert longest_first_of(longest_first_of(other)) == longest_first_of(other)


def test_the_longest_token_is_first(other):
    """By the definition, over the pre-tokens that the library cuts."""
    definition = read_definition(longest_first_of(other))
    encoder, split = Encoder(definition), splitter(definition.pattern)
    for text in TEXTS:
        whole = normalizers.NFC().normalize_str(text) if definition.normalizer else text
        tokens = [token for word in split(whole) for token in longest_anywhere(word.encode(), definition.ids.keys())]
        ids = [definition.ids[token] for token in tokens]
        assert encoder.encode_batch([text])[0].tolist() == encoder.encode_bytes(text.encode()).tolist() == ids
        streamed = [number for part in encoder.encode_stream(text) for number in part.tolist()]
        assert streamed == ids
        assert encoder.decode(ids).decode() == whole


def test_ids_of_words_that_are_tokens_are_those_of_the_library():
    """Where a pre-token is one token, both give it."""
    other = OTHERS["Qwen"]()
    library, encoder = Tokenizer.from_str(other), Encoder(read_definition(longest_first_of(other)))
    words = [
        word for word in ("the", " cat", " sat", " cats", "12") if library.token_to_id(to_characters(word.encode()))
    ]
    assert len(words) >= 3
    for word in words:
        assert encoder.encode_batch([word])[0].tolist() == library.encode(word).ids
    mark = [library.token_to_id(END), library.token_to_id("<think>")]
    assert encoder.encode_batch([f"{END}<think>"], special=True)[0].tolist() == mark


def test_offsets_of_a_text_that_is_changed_are_refused():
    encoder = Encoder(read_definition(longest_first_of(OTHERS["Qwen"]())))
    ids, places = encoder.encode_with_offsets("café")
    assert (len(ids), places[-1].tolist()) == (len(places), [3, 4])
    with pytest.raises(DataError, match=r"^the tokenizer changes the text \(NFC\), so its tokens have no places in"):
        encoder.encode_with_offsets("cafe\u0301")


def test_bytes_that_are_no_text_are_not_normalized():
    compose = normalizing("NFC")
    assert compose("e\u0301".encode() + b"\xff" + "e\u0301".encode()) == "é".encode() + b"\xff" + "é".encode()
    assert compose(b"\xff\xfe abc") == b"\xff\xfe abc"
    assert normalizing(None)("e\u0301".encode()) == "e\u0301".encode()


def test_training_text_takes_them(other):
    """As `data.tokenizer: {name: file}` does."""
    tokenizer = TextTokenizer(longest_first_of(other), END)
    for text in TEXTS[:3]:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids


def saved(model, **parts):
    tokenizer = Tokenizer(model)
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer.to_str()


LETTERS = {"<unk>": 0, "\u2581": 1, "a": 2, "b": 3}
BYTES = {to_characters(bytes([byte])): byte for byte in range(256)}
REFUSED = {
    "Unigram": (lambda: saved(models.Unigram([("a", -1.0)])), "the model is 'Unigram', not byte-level BPE"),
    "WordPiece": (
        lambda: saved(models.WordPiece(LETTERS, unk_token="<unk>")),
        "the model is 'WordPiece', not ",
    ),
    "WordLevel": (
        lambda: saved(models.WordLevel(LETTERS, unk_token="<unk>")),
        "the model is 'WordLevel', not ",
    ),
    "SentencePiece": (lambda: saved(models.BPE(LETTERS, [], byte_fallback=True)), "model.byte_fallback is True"),
    "CLIP": (lambda: saved(models.BPE(LETTERS, [], end_of_word_suffix="</w>")), "model.end_of_word_suffix is '</w>'"),
    "characters": (lambda: saved(models.BPE(LETTERS, [])), "'\u2581' has characters that stand for no byte"),
    "lower case": (
        lambda: saved(models.BPE(BYTES, []), normalizer=normalizers.Lowercase(), pre_tokenizer=by_pattern(LLAMA3)),
        r"it has a normalizer (Lowercase) other than NFC",
    ),
    "several patterns": (
        lambda: saved(models.BPE(BYTES, []), pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits()] * 2)),
        "its pre-tokenizer is Digits, Digits; expected Split and ByteLevel",
    ),
    "no bytes": (
        lambda: saved(models.BPE({"a": 0}, []), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "255 tokens have no id",
    ),
    "no JSON": (lambda: "{", "not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name):
    make, message = REFUSED[name]
    with pytest.raises(DataError) as raised:
        longest_first_of(make())
    assert message in str(raised.value)
