"""A tokenizer on disk: what it says, what other readers make of it, and what is refused."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer as HFTokenizer

from moeport.errors import DataError
from moeport.tokenizers.definition import ENCODINGS, Definition, numbered, write_definition
from moeport.tokenizers.definition_reading import is_ours, read_definition
from moeport.tokenizers.patterns import PATTERNS
from tests.tokenizers.brute_force import trained

VOCABULARY = trained([b"lower", b" lowest", b"\xe4\xb8\xad", b" newer"], 9)
SCAFFOLDED = replace(VOCABULARY, algorithm="scaffold_bpe", scaffolds=frozenset(VOCABULARY.expanded[257:260:2]))


def described(vocabulary=VOCABULARY, **changes):
    return Definition(vocabulary, special_tokens=numbered(vocabulary, ["<|endoftext|>", "<pad>"]), **changes)


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, SCAFFOLDED], ids=["bpe", "scaffold_bpe"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_written_is_read(vocabulary, encoding, pattern):
    """And written again as the same text."""
    definition = described(vocabulary, encoding=encoding, pattern=pattern, training={"vocab_size": 270})
    text = write_definition(definition)
    assert read_definition(text) == definition
    assert write_definition(read_definition(text)) == text


def test_plain_bpe_is_an_ordinary_file_and_all_else_fails_elsewhere():
    """No reader gives scaffold ids, or ids by merges where the longest token was meant."""
    text = write_definition(described())
    assert not is_ours(json.loads(text))
    assert HFTokenizer.from_str(text).token_to_id("<pad>") == len(VOCABULARY.tokens) + 1
    for definition in (described(SCAFFOLDED), described(encoding="longest_first"), described(encoding="longest_merge")):
        text = write_definition(definition)
        assert is_ours(json.loads(text))
        with pytest.raises(Exception, match="did not match any variant"):
            HFTokenizer.from_str(text)


def test_a_vocabulary_from_elsewhere_keeps_its_ids():
    """Special tokens first, tokens that no merge makes: the longest token first needs only the tokens."""
    tree = json.loads(write_definition(described()))
    vocab = {token: number + 2 for token, number in tree["model"]["vocab"].items()}
    tree["model"]["vocab"] = {"<s>": 0, "</s>": 1, **vocab, "wholeword": 300}
    tree["added_tokens"] = [{"id": number, "content": token} for number, token in enumerate(["<s>", "</s>"])]
    definition = read_definition(json.dumps(tree), "longest_first")
    assert (definition.ids[b"\x00"], definition.ids[b"wholeword"], definition.size) == (2, 300, 301)
    assert definition.special_tokens == {"<s>": 0, "</s>": 1}
    assert read_definition(write_definition(definition)) == definition
    tree["model"]["merges"] = [" ".join(merge) for merge in tree["model"]["merges"]]  # as before version 0.20
    assert read_definition(json.dumps(tree), "longest_first") == definition


def changed(path, value):
    tree = json.loads(write_definition(described(SCAFFOLDED)))
    place = tree
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON: .*; expected a tokenizer.json of `moeport tokenizer train`, or of byte-level BPE"),
        ("[]", "JSON without an object `model`"),
        (changed(["model", "format"], 2), "in format 2; this version of moeport reads .* up to format 1: install a"),
        (changed(["model", "type"], "WordPiece"), "the model is 'WordPiece', not byte-level BPE"),
        (changed(["model", "merges"], None), "an entry is missing or malformed .*merges"),
        (changed(["model", "merges"], [["a", "\u4e2d"]]), "'\u4e2d' has characters that stand for no byte"),
        (changed(["model", "merges", 0], ["a", "bc"]), r"merge 0 joins b'a' and b'bc'"),
        (changed(["model", "scaffolds"], [99]), "scaffold 99 is not a merge; expected numbers from 0 to 8"),
        (changed(["model", "encoding"], "longest"), "encoding: got 'longest'; expected one of merges, longest_first"),
        (changed(["model", "vocab", "a"], 5), r"has the id 5, which is that of b'\\x05' as well|has the id 5, which"),
        (changed(["model", "vocab", "a"], None), "1 tokens have no id, the first is b'a'; expected an id for every"),
        (changed(["pre_tokenizer", "type"], "Whitespace"), "its pre-tokenizer is Whitespace; expected Split and Byte"),
    ],
)
def test_what_is_wrong_is_said(text, says):
    """And what was expected."""
    with pytest.raises(DataError, match=says):
        read_definition(text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"ignore_merges": True}}, r"takes whole words before merging \(ignore_merges\).*longest_first"),
        ({"model": {"byte_fallback": True}}, "model.byte_fallback is True; expected"),
        ({"normalizer": {"type": "NFKC"}}, r"it has a normalizer \(NFKC\) other than NFC"),
    ],
)
def test_ordinary_files_that_do_more_are_refused(changes, says):
    """Rather than encoded otherwise."""
    tree = json.loads(write_definition(described()))
    for key, value in changes.items():
        tree[key] = {**(tree[key] or {}), **value}
    with pytest.raises(DataError, match=says):
        read_definition(json.dumps(tree))
