"""Tokenizers measured side by side: counts, folds, differences, and what is written."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from moeport.data.tokenizer import ByteTokenizer
from moeport.errors import DataError, UserError
from moeport.studies.tokenizers.evaluate import FIGURES, evaluate
from moeport.studies.tokenizers.export import to_json
from moeport.studies.tokenizers.page import write_page
from moeport.studies.tokenizers.pieces import PIECE, Folds, pieces
from moeport.studies.tokenizers.subject import open_subjects
from moeport.studies.tokenizers.table import markdown, tables
from moeport.tokenizers import train
from moeport.tokenizers.definition import Definition, numbered, write_definition
from moeport.tokenizers.measures import entropy

WORDS = {b"abc": 9, b"ab": 1, b"bcd": 7, b"cd": 2, b"xyz": 5, b"yz": 1, b"x": 3}
TEXT = "abc bcd\nxyz abc\n" * 40 + "ab cd é\n"


def saved(folder, name, vocabulary, encoding="merges"):
    path = folder / f"{name}.json"
    path.write_text(write_definition(Definition(vocabulary, encoding, "digits", numbered(vocabulary, ["<end>"]))))
    return path


@pytest.fixture
def three(tmp_path):
    """BPE, Scaffold-BPE of the same size, and LBPE over it."""
    scaffold = train(WORDS, 260)
    assert scaffold.scaffolds
    return [
        saved(tmp_path, "bpe", train(WORDS, 260, "bpe")),
        saved(tmp_path, "scaffold", scaffold),
        saved(tmp_path, "both", scaffold, "longest_first"),
    ]


def measured(paths, documents=(TEXT,), folds=1):
    return evaluate(open_subjects([str(path) for path in paths]), documents, folds)


def test_counts_are_those_of_every_word(three):
    bpe, scaffold, _ = measured(three)
    for found, algorithm in ((bpe, "bpe"), (scaffold, "scaffold_bpe")):
        vocabulary = train(WORDS, 260, algorithm)
        expected = Counter()
        for word in re.findall(r" ?\w+|\n", TEXT):
            expected.update(vocabulary.encode_word(word.encode()))
        counted = dict(zip(found.subject.tokens, found.counts.tolist(), strict=True))
        assert {token: count for token, count in counted.items() if count} == expected
        assert found.figures["bytes_per_token"] == len(TEXT.encode()) / expected.total()
        assert found.figures["entropy"] == pytest.approx(entropy(np.array(list(expected.values()))))


def test_what_replaces_scaffolds_is_counted_against_bpe_of_the_same_training(three):
    bpe, scaffold, _ = measured(three)
    assert bpe.replaced() is None
    old, new = set(bpe.subject.tokens), set(scaffold.subject.tokens)
    found = scaffold.replaced()
    assert found.number == len(old - new) == len(new - old) > 0
    counts = [dict(zip(each.subject.tokens, each.counts.tolist(), strict=True)) for each in (bpe, scaffold)]
    assert found.frequency == np.mean([counts[0][token] for token in old - new])
    assert found.new_frequency == np.mean([counts[1][token] for token in new - old])


def test_folds_add_up_to_the_text_and_have_equal_size():
    documents = [str(number) * 1000 + "\n" for number in range(50)]
    folds = Folds(4)
    batches = list(folds.batches(documents))
    assert [text for batch in batches for text in batch.texts] == documents
    assert sum(folds.bytes_F) == sum(map(len, documents))
    assert max(folds.bytes_F) - min(folds.bytes_F) <= 2001


def test_long_documents_are_cut_behind_line_ends_and_nothing_is_lost():
    lines = "".join(f"{number} {'x' * (number % 300)}\n" for number in range(1000))
    for document in (lines, "y" * (2 * PIECE + 5), "", "a\n"):
        cut = list(pieces(document))
        assert "".join(cut) == document
        assert all(0 < len(each) <= PIECE for each in cut)
    assert all(each.endswith("\n") for each in pieces(lines))


def test_folds_are_counted_apart(three):
    (found,) = measured(three[:1], ["abc\n", "é\n"], folds=2)
    alone = [measured(three[:1], [text])[0].figures for text in ("abc\n", "é\n")]
    for name in FIGURES:
        assert found.folds(name) == [each[name] for each in alone]
    assert found.counts.tolist() == found.counts_FV.sum(0).tolist()


def test_less_text_than_folds_is_refused(three):
    with pytest.raises(DataError, match=r"fills 1 of 5 folds.*--folds 1"):
        measured(three, ["abc"], folds=5)


def test_names(three, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(three[1].read_bytes())
    names = [each.name for each in open_subjects([str(three[0]), str(folder), f"x={three[2]}"])]
    assert names == ["bpe", "folder", "x"]
    with pytest.raises(UserError, match="two tokenizers are called 'bpe'"):
        open_subjects([str(three[0]), f"bpe={three[1]}"])


def test_tokenizers_that_only_the_library_knows_are_measured_by_it(tmp_path):
    ByteTokenizer().save(tmp_path / "byte.json")
    found = measured([tmp_path / "byte.json"])[0]
    assert (found.figures["bytes_per_token"], found.subject.scaffolds) == (1.0, 0)
    words = {"type": "WordLevel", "vocab": {"abc": 0, "bcd": 1, "?": 2}, "unk_token": "?"}
    split = {"type": "Whitespace"}
    (tmp_path / "words.json").write_text(json.dumps({"version": "1.0", "model": words, "pre_tokenizer": split}))
    found = measured([tmp_path / "words.json"])[0]
    assert (found.counts.tolist(), found.subject.lengths) == ([80, 40, 43], None)
    page = tmp_path / "page.html"
    write_page(page, [found])
    assert page.is_file()


def test_special_tokens_spelled_out_and_unknown_characters_are_counted_too(tmp_path):
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0], ["b", -1.0]]}
    added = [{"id": number, "content": token, **special} for number, token in enumerate(["<unk>", "</s>"])]
    (tmp_path / "unigram.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": added}))
    found = measured([tmp_path / "unigram.json"], ["ab</s>b"])[0]
    assert found.counts.tolist() == [1, 1, 2]  # one unknown stretch, a, b
    (tmp_path / "unigram.json").write_text(
        json.dumps({"version": "1.0", "model": {**model, "vocab": [["<unk>", 0.0]]}})
    )
    with pytest.raises(DataError, match="besides special ones: 1;"):
        open_subjects([str(tmp_path / "unigram.json")])


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"model": {"type": "moeport/BytePairs", "format": 99}}'])
def test_what_is_no_tokenizer_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "wrong.json"))):
        open_subjects([str(tmp_path / "wrong.json")])


def test_what_is_written(three, tmp_path):
    found = measured(three, [TEXT, TEXT[::-1], TEXT.upper()], folds=3)
    values = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert [each["name"] for each in values["tokenizers"]] == ["bpe", "scaffold", "both"]
    ratio = values["tokenizers"][1]["to_first"]["bytes_per_token"]
    folds = [each["figures"]["bytes_per_token"]["folds"] for each in values["tokenizers"][:2]]
    assert ratio["mean"] == pytest.approx(np.mean(np.divide(folds[1], folds[0]) - 1))
    assert sum(values["tokenizers"][0]["frequencies"]) == values["tokenizers"][0]["vocabulary"] == 260
    assert values["tokenizers"][0]["to_first"] == {}
    write_page(tmp_path / "page.html", found)
    page = (tmp_path / "page.html").read_text()
    for cell in (cell for table in tables(found) for row in table.rows for cell in row):
        assert cell in page
        assert cell in markdown(found)
    assert "src=" not in page
    assert "http" not in page.partition("</style>")[2]


def test_the_plot_is_an_image(three, tmp_path):
    from moeport.studies.tokenizers.plot import write_plot

    write_plot(tmp_path / "plot.png", measured(three))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
