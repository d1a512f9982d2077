"""`moeport tokenizer` from text to ids and back, and what it refuses."""

import gzip
import json
import sys

import numpy as np
import pytest

from moeport.cli.main import main

SYLLABLES = ("ka", "to", "ri", "ne", "mus")
TEXT = "the cat sat on the mat\nthe 2024 cats: naïve 漢字\n" * 30 + "\n".join(
    a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES
)


@pytest.fixture
def run(monkeypatch, capfdbinary, tmp_path):
    """Runs a command in a folder of its own; gives the exit code, the output and the errors."""
    monkeypatch.chdir(tmp_path)

    def moeport(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["moeport", "tokenizer", *map(str, arguments)])
        if stdin is not None:
            (tmp_path / "stdin").write_bytes(stdin)
            monkeypatch.setattr(sys, "stdin", (tmp_path / "stdin").open())
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfdbinary.readouterr()
        return exit_.value.code, out, err.decode()

    return moeport


@pytest.fixture
def trained(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    code, out, err = run("train", "--text", "text.txt", "--vocab-size", 290, "-o", "own.json")
    assert (code, err) == (0, "")
    assert b"own.json: scaffold_bpe, encoding merges, 290 ids (289 tokens, 1 special)" in out
    return run


def test_strings_and_streams_there_and_back(trained):
    code, out, _ = trained("encode", "own.json", "the cat", "naïve")
    assert code == 0
    first, second = out.decode().splitlines()
    assert trained("decode", "own.json", *first.split())[1] == b"the cat\n"
    assert trained("decode", "own.json", *second.split())[1] == "naïve\n".encode()
    data = TEXT.encode() + b"\xff\xfe no UTF-8"
    ids = trained("encode", "own.json", "-", stdin=data)[1]
    assert trained("decode", "own.json", "-", stdin=ids)[1] == data


def test_special_tokens_count_only_where_asked(trained):
    plain, special = (trained("encode", "own.json", "<|endoftext|>", *more)[1] for more in ((), ("--special",)))
    assert special == b"289\n"
    assert len(plain.split()) > 1


@pytest.mark.parametrize("suffix", [".jsonl", ".bin"])
def test_files_there_and_back(trained, tmp_path, suffix):
    with gzip.open("packed.txt.gz", "wt", encoding="utf-8") as file:
        file.write("a second document")
    files = ("--text", "text.txt", "--text", "packed.txt.gz")
    assert trained("encode", "own.json", *files, "-o", f"ids{suffix}")[0] == 0
    code, out, _ = trained("decode", "own.json", "--ids", f"ids{suffix}")
    end = "<|endoftext|>" if suffix == ".bin" else ""
    assert (code, out.decode()) == (0, f"a second document{end}{TEXT}{end}")
    if suffix == ".jsonl":
        rows = trained("encode", "own.json", *files)[1]
        assert rows == (tmp_path / "ids.jsonl").read_bytes()
        assert [json.loads(row)["name"] for row in rows.splitlines()] == ["packed.txt.gz", "text.txt"]
    else:
        assert np.fromfile("ids.bin", "<u4").max() == 289
    assert trained("decode", "own.json", "--ids", f"ids{suffix}", "-o", "back")[0] == 0
    assert (tmp_path / "back").read_bytes() == out


def test_the_same_text_gives_the_same_tokenizer(run, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} {TEXT}", encoding="utf-8")
    for name, files, workers in (("x", "ab", 1), ("y", "ba", 2)):
        given = [word for file in files for word in ("--text", f"{file}.txt")]
        assert run("train", *given, "--vocab-size", 280, "--workers", workers, "-o", f"{name}.json")[0] == 0
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()


def test_a_size_out_of_reach_is_said_in_a_sentence(run, tmp_path):
    (tmp_path / "text.txt").write_text("abc abc", encoding="utf-8")
    code, _, err = run("train", "--text", "text.txt", "-o", "own.json")
    assert code == 0
    assert err.startswith("warning: vocab_size: 31999 is out of reach; the words yield ")
    assert "training.py" not in err


def test_eval_writes_what_it_shows(trained, tmp_path):
    assert trained("train", "--text", "text.txt", "--algorithm", "lbpe", "--vocab-size", 290, "-o", "lbpe.json")[0] == 0
    files = ("--html", "a.html", "--json", "a.json", "--markdown", "a.md")
    code, out, _ = trained("eval", "lbpe.json", "own.json", "--text", "text.txt", "--folds", 1, *files)
    assert code == 0
    assert {path.name for path in tmp_path.glob("a.*")} == {"a.html", "a.json", "a.md"}
    values = json.loads((tmp_path / "a.json").read_text())
    assert f"{values['tokenizers'][1]['figures']['bytes_per_token']['value']:.4f}".encode() in out
    assert values["text_bytes"] == len(TEXT.encode())


def test_export_writes_a_folder_that_names_its_end_of_text(trained, tmp_path):
    code, out, _ = trained("export", "own.json", "-o", "folder")
    assert (code, b"trust_remote_code=True" in out) == (0, True)
    assert json.loads((tmp_path / "folder/tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert trained("encode", "folder", "the cat")[1] == trained("encode", "own.json", "the cat")[1]
    assert trained("export", "own.json", "--encoding", "longest_first", "-o", "lbpe")[0] == 0
    assert json.loads((tmp_path / "lbpe/tokenizer.json").read_text())["model"]["encoding"] == "longest_first"


REFUSED = {
    "algorithm": (("train", "--text", "text.txt", "-o", "x.json", "--algorithm", "bp"), "did you mean bpe?"),
    "encoding": (("train", "--text", "text.txt", "-o", "x.json", "--encoding", "x"), "expected one of merges, "),
    "choice": (("train", "--text", "text.txt", "-o", "x.json", "--choose", "tie=1"), "expected one of pair_ties"),
    "value": (("train", "--text", "text.txt", "-o", "x.json", "--choose", "head=x"), "expected one of queue, pairs"),
    "number": (("train", "--text", "text.txt", "-o", "x.json", "--choose", "min_frequency=x"), "a whole number"),
    "pattern": (("train", "--text", "text.txt", "-o", "x.json", "--pattern", "("), "expected a regular expression"),
    "room": (
        ("train", "--text", "text.txt", "-o", "x.json", "--vocab-size", 257, "--special", "a", "--special", "b"),
        "expected at least 258",
    ),
    "no files": (("train", "--text", "none", "-o", "x.json"), "no file matches 'none'"),
    "key": (("train", "--set", "data.source.nam=files", "-o", "x.json"), "did you mean data.source.name?"),
    "empty": (("train", "--text", "empty.txt", "-o", "x.json"), "there is no text"),
    "no tokenizer": (("encode", "text.txt", "a"), "text.txt: "),
    "bare folder": (("encode", "bare", "a"), "TOKENIZER: the folder bare has no tokenizer.json"),
    "bare to export": (("export", "bare", "-o", "folder"), "TOKENIZER: the folder bare has no tokenizer.json"),
    "bare to eval": (("eval", "a=bare", "--text", "text.txt"), "TOKENIZER: the folder bare has no tokenizer.json"),
    "twice": (("encode", "own.json", "a", "--text", "text.txt"), "texts are given twice"),
    "suffix": (("encode", "own.json", "--text", "text.txt", "-o", "ids.npy"), ".jsonl or .bin"),
    "no ids": (("decode", "own.json"), "expected either ids or --ids FILE"),
    "word": (("decode", "own.json", "a"), "'a' is not an id; expected whole numbers from 0 to 289"),
    "beyond": (("decode", "own.json", "290"), "the id 290 belongs to no token"),
    "plain": (("decode", "own.json", "--ids", "text.txt"), "'the' is not an id"),
    "cut": (("decode", "own.json", "--ids", "cut.bin"), "not a multiple of 4 bytes"),
    "rows": (("decode", "own.json", "--ids", "rows.jsonl"), "rows.jsonl:2: no row of ids"),
    "negative": (("decode", "own.json", "--ids", "minus.jsonl"), "not a list of whole numbers from 0"),
    "folds": (("eval", "own.json", "--text", "text.txt", "--folds", "9"), "fills 1 of 9 folds"),
    "end": (("export", "own.json", "-o", "folder", "--end-of-text", "<eos>"), "own.json has no such special token"),
    "no object": (("export", "list.json", "-o", "folder"), "list.json: JSON, but not a tokenizer.json"),
    "no JSON": (("export", "text.txt", "-o", "folder"), "text.txt: not JSON"),
    "half": (("export", "half.json", "-o", "folder"), "half.json: an entry is missing or malformed"),
    "name": (("train", "--text", "text.txt", "-o", "x.json", "--pattern", "gpt"), "did you mean gpt"),
    "other key": (
        ("train", "--set", "data.tokenizer.vocab_size=300", "-o", "x.json"),
        "expected data.source.KEY=VALUE",
    ),
}


@pytest.fixture
def broken(trained, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('{"model": {"type": "moeport/BytePairs"}}')
    (tmp_path / "cut.bin").write_bytes(b"12345")
    (tmp_path / "rows.jsonl").write_text('{"ids": [1]}\n{"id": 1}\n')
    (tmp_path / "minus.jsonl").write_text('{"ids": [-1]}\n')
    return trained


def test_what_is_refused(broken, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, (arguments, message) in REFUSED.items():
        code, _, err = broken(*arguments)
        assert (code, message in " ".join(err.split())) == (2, True), (name, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
