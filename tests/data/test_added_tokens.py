"""Added tokens that are written out in a text are ordinary text, whatever model the tokenizer.json has."""

import json

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from moeport.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe

END, SPECIAL, PLAIN = "</s>", "<|im_start|>", "<|im_end|>"
MARKERS = (END, SPECIAL, PLAIN)
TEXT = f"a{END}b {SPECIAL}user\n{PLAIN} {END}{END}"
LETTERS = sorted(set("".join(MARKERS) + "ab user\n\u2581"))


def added(number, content, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": number, "content": content, "special": special, **flags}


def definition(model, *tokens, first, pre_tokenizer=None, decoder=None):
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [added(first + i, *token) for i, token in enumerate(tokens)],
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        }
    )


MARKS = ((END, True), (SPECIAL, True), (PLAIN, False))


def ids_of(words):
    return {word: number for number, word in enumerate(words)}


def merges_for(word):
    """Merges that build a word from left to right, and the pieces they make."""
    return [[word[:i], word[i]] for i in range(1, len(word))], [word[:i] for i in range(2, len(word))]


def bpe(**options):
    return {"type": "BPE", "vocab": ids_of(LETTERS), "merges": [], **options}


def bpe_that_merges_the_end():
    merges, pieces = merges_for(END)
    return {"type": "BPE", "vocab": ids_of([*LETTERS, *pieces, END]), "merges": merges}


def bpe_with_bytes():
    vocab = ids_of(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", *MARKERS])
    return {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": True}


def unigram():
    pieces = [["<unk>", 0.0], *([marker, 0.0] for marker in MARKERS), *([letter, -3.0] for letter in LETTERS)]
    return {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}


def word_level():
    vocab = ids_of(["<unk>", "a", "b", *MARKERS])
    return {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}


def word_piece():
    words = ["[UNK]", *MARKERS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {
        "type": "WordPiece",
        "vocab": ids_of(words),
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }


SPACES = {"type": "WhitespaceSplit"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
MODELS = {
    "bpe": (bpe(), None),
    "bpe with whole words": (bpe(vocab=ids_of([*LETTERS, *MARKERS]), ignore_merges=True), SPACES),
    "bpe with merges for the end": (bpe_that_merges_the_end(), None),
    "bpe with bytes": (bpe_with_bytes(), None),
    "unigram": (unigram(), None),
    "words": (word_level(), SPACES),
    "word pieces": (word_piece(), SPACES),
}


@pytest.fixture(params=[*MODELS, "byte", "trained", "byte level"])
def tokenizer(request):
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "trained":
        return train_bpe([TEXT, "<|endoftext|>"] * 9, 300)
    if request.param == "byte level":
        tree = json.loads(train_bpe([TEXT] * 9, 300)._definition)
        tree["added_tokens"] += [added(300 + i, *mark) for i, mark in enumerate(MARKS)]
        return Tokenizer(json.dumps(tree))
    model, pre_tokenizer = MODELS[request.param]
    return Tokenizer(definition(model, *MARKS, first=len(model["vocab"]), pre_tokenizer=pre_tokenizer), END)


def marker_ids(tokenizer):
    added_tokens = json.loads(tokenizer._definition)["added_tokens"]
    return {tokenizer._codec.vocabulary[token["content"]] for token in added_tokens}


def test_no_added_token_comes_out_of_text(tokenizer):
    text = TEXT + "<|endoftext|>"
    (ids,) = tokenizer.encode_batch([text])
    assert not set(ids.tolist()) & {*marker_ids(tokenizer), tokenizer.end_of_text}
    assert ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize("name", ["byte", "trained", "byte level", "bpe with bytes", "bpe with merges for the end"])
def test_the_text_comes_back(name, request):
    if name in MODELS:
        tokenizer = Tokenizer(
            definition(
                MODELS[name][0],
                *MARKS,
                first=len(MODELS[name][0]["vocab"]),
                decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            ),
            END,
        )
    elif name == "byte":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = train_bpe([TEXT] * 9, 300)
    (ids,) = tokenizer.encode_batch([TEXT])
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([tokenizer.end_of_text]) in (END, "<|endoftext|>")


def test_ids_are_those_of_the_file():
    """Hiding a token moves no other one, neither in the model nor among the added ones."""
    tokens = ((SPECIAL, True), ("  ", False), (PLAIN, False), ("\n\n", False), (END, True))
    tokenizer = Tokenizer(definition(bpe(), *tokens, first=len(LETTERS)), END)
    ids = ids_of(LETTERS)
    first = len(LETTERS)
    assert tokenizer.end_of_text == first + 4
    assert tokenizer.encode_batch(["a  b\n\na"])[0].tolist() == [ids["a"], first + 1, ids["b"], first + 3, ids["a"]]


def test_an_end_of_text_of_white_space_does_not_come_out_of_text():
    tokenizer = Tokenizer(definition(bpe(), ("\n\n", False), first=len(LETTERS)), "\n\n")
    assert tokenizer.end_of_text not in tokenizer.encode_batch(["a\n\nb"])[0]


def test_a_single_character_that_was_added_is_text():
    tokenizer = Tokenizer(definition(bpe(), ("\u4f60", False), (END, True), first=len(LETTERS)), END)
    assert tokenizer.encode_batch(["\u4f60"])[0].tolist() == [len(LETTERS)]


def test_random_merges_are_off():
    merges, pieces = merges_for("user")
    model = bpe(vocab=ids_of([*LETTERS, *pieces, "user"]), merges=merges, dropout=0.5)
    tokenizer = Tokenizer(definition(model, (END, True), first=len(model["vocab"])), END)
    assert len({tuple(tokenizer.encode_batch(["user"])[0].tolist()) for _ in range(30)}) == 1


@pytest.mark.parametrize(
    ("decoder", "pieces"),
    [
        ({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}, ["\u2581hello", "\u2581world"]),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            ["\u2581hello", "\u2581world"],
        ),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, ["hello", "world"]),
        (None, ["hello", "world"]),
    ],
)
def test_a_continuation_keeps_its_space(decoder, pieces):
    model = {"type": "WordLevel", "vocab": ids_of([*pieces, END]), "unk_token": END}
    tokenizer = Tokenizer(definition(model, (END, True), first=3, decoder=decoder), END)
    assert "hello" + tokenizer.continuation([0, 1], 1) == "hello world"
    assert tokenizer.continuation([0, 1], 0) == "hello world"


@pytest.mark.parametrize(("scheme", "first"), [("never", " hello"), ("always", "hello")])
def test_a_text_without_a_prompt_keeps_the_space_that_it_begins_with(scheme, first):
    """Metaspace as a decoder drops the first space, also of a tokenizer that adds none."""
    vocabulary = {"\u2581hello": 0, "hello": 1, "\u2581world": 2, END: 3}
    hugging_face = HFTokenizer(models.WordLevel(vocabulary, unk_token=END))
    hugging_face.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    hugging_face.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = Tokenizer(hugging_face.to_str(), END)
    assert tokenizer.continuation([0, 2], 0) == f"{first} world"
    assert tokenizer.continuation([1, 2], 0) == "hello world"
    assert tokenizer.continuation([1, 2], 1) == " world"
    assert tokenizer.continuation([], 0) == ""
