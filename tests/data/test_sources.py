import json
import os
import re
import sys
from types import SimpleNamespace

import pytest

from moeport.config import config_from_dict
from moeport.config.data import DataConfig, FilesSource, HuggingFaceSource
from moeport.data.documents import check_split, is_validation, place
from moeport.data.left_out import LeftOut
from moeport.data.sources import read_documents, split_rule
from moeport.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, content):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def write_json_lines(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)


def read_files(*paths, fraction=0.5, left_out=None, **options):
    return usable(DataConfig(source=FilesSource(paths=paths, **options), validation_fraction=fraction), left_out)


def usable(config, left_out=None):
    left_out = left_out or LeftOut()
    corpus = read_documents(config, left_out)
    check_split(corpus, split_rule(config), left_out)
    return SimpleNamespace(train=list(corpus.train), validation=list(corpus.validation))


def pairs(documents):
    return [(document.name, document.text) for document in documents]


def refused(message, *paths, **options):
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        read_files(*paths, **options)


def test_stdlib_has_library_code_but_no_tests_and_no_installed_packages():
    corpus = read_documents(DataConfig())
    names = [document.name for document in (*corpus.train, *corpus.validation)]
    assert "json/decoder.py" in names
    assert len(names) > 300
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    assert all(sorted(part) == list(part) for part in corpus)
    assert all(is_validation(document.name, 0.05) for document in corpus.validation)
    assert not any(is_validation(document.name, 0.05) for document in corpus.train)


def test_the_split_depends_on_the_name_alone():
    # The rule is part of the format: these values must not change.
    assert is_validation("asyncio/events.py", 0.05)
    assert not is_validation("asyncio/queues.py", 0.05)
    held_out = {f"{number}.txt" for number in range(2000) if is_validation(f"{number}.txt", 0.1)}
    assert 150 < len(held_out) < 250
    assert held_out < {f"{number}.txt" for number in range(2000) if is_validation(f"{number}.txt", 0.2)}


def test_files_of_every_kind_in_the_order_of_their_names():
    write("data/b.txt", "text\r\n")
    write("data/deep/a.py", "pass\n")
    write_json_lines("data/c.jsonl", [{"text": "2020-01-01"}, {"text": "é\x00\u2028x", "n": 1}])
    write("data/d.txt", "")
    write("held/out.txt", "validation")
    corpus = read_files("data/**/*", "data/b.txt", validation_paths=("held/*",))
    assert pairs(corpus.train) == [
        ("data/b.txt", "text\r\n"),
        ("data/c.jsonl:1", "2020-01-01"),
        ("data/c.jsonl:2", "é\x00\u2028x"),
        ("data/deep/a.py", "pass\n"),
    ]
    assert pairs(corpus.validation) == [("held/out.txt", "validation")]


def test_json_lines_may_have_blank_lines_a_byte_order_mark_and_other_columns():
    write("a.jsonl", '\ufeff{"body": "one", "text": 1}\n\n{"body": "two", "meta": {"x": []}}')
    write("v.txt", "validation")
    corpus = read_files("a.jsonl", text_field="body", validation_paths=("v.txt",))
    assert pairs(corpus.train) == [("a.jsonl:1", "one"), ("a.jsonl:3", "two")]


def test_parquet_rows_are_documents():
    write_parquet("odd [1].parquet", {"n": [1, 2, 3], "text": ["one", "", "three"]})
    write("v.txt", "validation")
    corpus = read_files("odd*.parquet", validation_paths=("v.txt",))
    assert pairs(corpus.train) == [("odd [1].parquet:1", "one"), ("odd [1].parquet:3", "three")]


def test_without_validation_files_rows_are_split_by_name():
    write_json_lines("a.jsonl", [{"text": str(number)} for number in range(50)])
    corpus = read_files("a.jsonl", fraction=0.2)
    assert {document.name for document in corpus.validation} == {
        f"a.jsonl:{line}" for line in range(1, 51) if is_validation(f"a.jsonl:{line}", 0.2)
    }
    assert len(corpus.train) + len(corpus.validation) == 50


@pytest.mark.parametrize(
    "paths", [("**/*.txt",), (".",), ("a", "b/*.txt"), ("a/rows.jsonl", "b/1.txt"), ("./a/../a/*.jsonl",)]
)
def test_a_corpus_below_a_root_is_split_the_same_wherever_it_lies(tmp_path, paths):
    rows = [{"text": f"row {number}"} for number in range(40)]
    for root in ("here", "else where/deep [1]*"):
        for number in range(40):
            write(f"{root}/{'ab'[number % 2]}/{number}.txt", f"text {number}")
        write_json_lines(f"{root}/a/rows.jsonl", rows)

    def corpus(root, *named):
        source = FilesSource(paths=named, exclude=("b/3.txt",))
        return read_documents(DataConfig(source=source, root=root, validation_fraction=0.3))

    expected = corpus("here", *paths)
    found = [corpus(root, *paths) for root in (tmp_path / "here", "else where/deep [1]*")]
    found.append(corpus("here", *(f"{tmp_path}/here/{path}" for path in paths)))
    for other in found:
        for one, another in zip(expected, other, strict=True):
            assert [document.text for document in one] == [document.text for document in another]
            assert one.fingerprint == another.fingerprint
    names = [document.name for side in expected for document in side]
    assert all(name.startswith("here/") for name in names)
    assert "here/b/3.txt" not in names
    os.chdir("here")
    assert [side.fingerprint for side in corpus(None, *paths)] == [side.fingerprint for side in expected]


def test_a_path_outside_the_root_keeps_its_name():
    write("root/a.txt", "one")
    write("b.txt", "text")
    corpus = read_documents(DataConfig(source=FilesSource(paths=("a.txt", "../b.txt")), root="root"))
    assert {document.key for side in corpus for document in side} == {"a.txt", "b.txt"}


def test_a_root_that_is_no_folder(tmp_path):
    write("a.txt", "text")
    for source in (FilesSource(paths=("a.txt",)), HuggingFaceSource(dataset="./set")):
        with pytest.raises(DataError, match=r"^data.root: 'a.txt' is not a folder \(working directory "):
            read_documents(DataConfig(source=source, root="a.txt"))


def test_no_match(tmp_path):
    os.makedirs("folder")
    write("a.txt", "text")
    for pattern in ("*.md", "folder/*", ""):
        message = f"data.source.paths: no file matches {pattern!r} (working directory {tmp_path})"
        refused(message, "a.txt", pattern)
    refused("data.source.paths: the folder 'folder' has no file to read; expected .txt", "a.txt", "folder")
    refused("data.source.validation_paths: no file matches 'v/*'", "a.txt", validation_paths=("v/*",))


def test_unknown_suffixes():
    write("a.txt", "text")
    for number in range(7):
        write(f"{number}.png", b"\x89PNG")
    refused(
        "data.source.paths: cannot read 0.png, 1.png, 2.png, 3.png, 4.png and 2 more: expected .txt, .py, .md, .rst, "
        ".html, .htm, .jsonl, .parquet; narrow the glob, such as data/**/*.txt, name the suffix in "
        "data.source.text_suffixes, or convert the file",
        "*",
    )


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_unreadable_file(suffix):
    os.symlink("nowhere", f"dangling{suffix}")
    refused(f"dangling{suffix}: cannot read the file: No such file or directory", f"*{suffix}")


def test_text_that_is_not_utf8():
    write("a.txt", b"caf\xe9")
    refused("a.txt: not UTF-8 at byte 3; convert the file to UTF-8", "a.txt")
    write("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')
    refused("a.jsonl:2: not UTF-8 at byte 24; convert the file to UTF-8", "a.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "a.jsonl:2: malformed JSON: Expecting value at column 9"),
        ('["text"]', "a.jsonl:2: expected a JSON object with the key 'text'; got list"),
        (
            '{"body": "b", "n": 1}',
            "a.jsonl:2: no column 'text'; columns: body, n; set data.source.text_field",
        ),
        ('{"text": null}', "a.jsonl:2: column 'text' holds NoneType, expected a string"),
        ('{"text": 7}', "a.jsonl:2: column 'text' holds int, expected a string"),
        (
            '{"text": "\\ud800"}',
            "a.jsonl:2: column 'text' holds half of a surrogate pair; repair the JSON",
        ),
    ],
)
def test_faulty_json_line(line, message):
    write("a.jsonl", f'{{"text": "fine"}}\n{line}\n')
    refused(message, "a.jsonl")


def test_parquet_that_is_truncated_or_something_else():
    write_parquet("a.parquet", {"text": ["one", "two"]})
    with open("a.parquet", "rb") as file:
        data = file.read()
    foreign = "Parquet magic bytes not found in footer"
    for content, reason in ((data[:-20], foreign), (b"not parquet", foreign), (b"", "Parquet file size is 0")):
        write("a.parquet", content)
        refused(f"a.parquet: cannot read as parquet: {reason}", "a.parquet")


def test_parquet_columns():
    write_parquet("a.parquet", {"body": ["one"], "n": [7]})
    refused("a.parquet: no column 'text'; columns: body, n; set data.source.text_field", "a.parquet")
    refused("a.parquet:1: column 'n' holds int, expected a string", "a.parquet", text_field="n")


def test_parquet_without_datasets(monkeypatch):
    write("a.parquet", b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(
        "reading a parquet file or a Hugging Face dataset needs the package `datasets`: pip install 'moeport[data]'",
        "a.parquet",
    )


def test_only_empty_documents():
    write("a.txt", "")
    write("b.jsonl", '\n{"text": ""}\n')
    refused("data.source: there are no documents with text in them", "*")


def test_nothing_left_for_one_side():
    write("a.txt", "text")
    write("v.txt", "")
    refused(
        "data.source: no text is left for validation (1 document with text, data.source.validation_paths names the "
        "validation files); add documents, change data.validation_fraction or name validation data in data.source",
        "a.txt",
        validation_paths=("v.txt",),
    )
    write("b.txt", "x")
    refused("data.source: no text is left for training (1 document with text, data.validation_fraction is", "b.txt")


class TestOneDocumentIsAlwaysHeldOut:
    def test_the_closest_to_the_rule(self):
        for number in range(18):
            write(f"{number}.txt", f"text {number}")
        left_out = LeftOut()
        corpus = read_files("*", fraction=1e-9, left_out=left_out)
        (held_out,) = corpus.validation
        closest = min((f"{number}.txt" for number in range(18)), key=place)
        assert held_out.name == closest
        assert is_validation(closest, (place(closest) + 1) / 2**64 + 1e-15)
        assert len(corpus.train) == 17
        assert left_out.lines() == [
            f"held out {closest}: data.validation_fraction 1e-09 would hold out none of the texts of 18 documents"
        ]

    def test_another_document_of_its_text_is_not_trained_on(self):
        for number in range(18):
            write(f"{number}.txt", f"text {number % 3}")
        left_out = LeftOut()
        corpus = read_files("*", fraction=1e-9, left_out=left_out)
        (held_out,) = corpus.validation
        assert len(corpus.train) == 12
        assert held_out.text not in {document.text for document in corpus.train}
        assert "5 documents left out, since the same text is used for the other side of the split" in left_out.lines()

    def test_one_is_trained_on_if_all_are_held_out(self):
        for number in range(5):
            write(f"{number}.txt", f"text {number}")
        left_out = LeftOut()
        corpus = read_files("*", fraction=1 - 1e-9, left_out=left_out)
        (trained_on,) = corpus.train
        assert trained_on.name == max((f"{number}.txt" for number in range(5)), key=place)
        assert len(corpus.validation) == 4
        assert left_out.lines() == [
            f"training on {trained_on.name}: data.validation_fraction 0.999999999 would hold out all 5 documents"
        ]

    @pytest.mark.parametrize("names", [("a.txt",), ("a.txt", "b.txt", "c.txt")])
    def test_the_end_of_the_only_text(self, names):
        for name in names:
            write(name, "word " * 100)
        left_out = LeftOut()
        corpus = read_files("*", fraction=0.1, left_out=left_out)
        (train,), (held_out,) = corpus.train, corpus.validation
        assert train.text + held_out.text == "word " * 100
        assert held_out.text == "word " * 10
        assert f"held out the last 50 bytes of {train.name}, since it is the only text" in left_out.lines()[0]
        assert len(left_out.lines()) == (1 if len(names) == 1 else 2)


def test_overlapping_training_and_validation_files(tmp_path):
    write("data/a.txt", "text")
    refused(
        f"{tmp_path}/data/a.txt is named by both data.source.paths and data.source.validation_paths; "
        "validation data must not be trained on: narrow one of the globs",
        "data/*",
        validation_paths=(f"{tmp_path}/data/a.txt",),
    )


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        datasets.disable_progress_bars()
        write_json_lines("set/train.jsonl", [{"text": f"train {number}", "n": number} for number in range(20)])
        write_json_lines("set/test.jsonl", [{"text": "test", "n": 1}])

    def read(self, dataset="./set", **options):
        return usable(DataConfig(source=HuggingFaceSource(dataset=dataset, **options), validation_fraction=0.3))

    def refused(self, message, **options):
        with pytest.raises(DataError, match=f"^{re.escape(message)}"):
            self.read(**options)

    def test_local_folder(self):
        corpus = self.read(validation_split="test")
        assert pairs(corpus.train)[0] == ("./set:train:1", "train 0")
        assert len(corpus.train) == 20
        assert pairs(corpus.validation) == [("./set:test:1", "test")]

    def test_local_folder_below_a_root(self, tmp_path):
        here = self.read()
        os.makedirs("elsewhere")
        os.rename("set", "elsewhere/set")
        source = HuggingFaceSource(dataset="./set")
        config = DataConfig(source=source, root=tmp_path / "elsewhere", validation_fraction=0.3)
        there = usable(config)
        assert (pairs(there.train), pairs(there.validation)) == (pairs(here.train), pairs(here.validation))

    def test_split_by_name(self):
        corpus = self.read()
        assert len(corpus.train) + len(corpus.validation) == 20
        assert all(is_validation(document.name, 0.3) for document in corpus.validation)

    def test_unknown_split(self):
        self.refused(
            "data.source: cannot load './set', subset None, split 'valid': "
            "Unknown split \"valid\". Should be one of ['train', 'test'].",
            validation_split="valid",
        )

    def test_same_split_twice(self):
        self.refused("data.source.split and data.source.validation_split are both 'train'", validation_split="train")

    def test_unknown_subset(self):
        self.refused(
            "data.source: cannot load './set', subset 'de', split 'train': BuilderConfig 'de' not found", subset="de"
        )

    def test_columns(self):
        self.refused("./set:train: no column 'body'; columns: text, n; set data.source.text_field", text_field="body")
        self.refused("./set:test:1: column 'n' holds int, expected a string", split="test", text_field="n")

    def test_revision(self, monkeypatch):
        import datasets

        asked = []

        def load(dataset, subset, **options):
            asked.append(options)
            raise ValueError("enough")

        monkeypatch.setattr(datasets, "load_dataset", load)
        for revision in (None, "v1.2"):
            self.refused("data.source: cannot load 'a/b'", dataset="a/b", revision=revision)
        assert asked == [{"split": "train", "revision": None}, {"split": "train", "revision": "v1.2"}]
        for folder in ("./set", "/data/set", "~/set"):
            with pytest.raises(ConfigError, match=r"^data\.source\.revision: names a version on the hub, but"):
                config_from_dict({"data": {"source": {"name": "huggingface", "dataset": folder, "revision": "v1.2"}}})

    def test_missing_folder(self):
        self.refused("data.source.dataset: there is no folder ./nowhere", dataset="./nowhere")

    def test_malformed_folder(self):
        write("bad/train.jsonl", '{"text":\n')
        self.refused("data.source: cannot load './bad', subset None, split 'train': JSON parse error", dataset="./bad")

    def test_offline(self):
        self.refused(
            "data.source.dataset: 'nobody/nothing' is not in the local cache and the Hugging Face hub cannot be "
            "reached; copy the cache of a machine that has it and point HF_HOME there, or use source `files` with "
            "downloaded .parquet or .jsonl files",
            dataset="nobody/nothing",
        )

    def test_not_on_the_hub(self, monkeypatch):
        import datasets

        def missing(*args, **kwargs):
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", missing)
        self.refused(
            "data.source.dataset: the Hugging Face hub has no dataset 'nobody/nothing' that you may read",
            dataset="nobody/nothing",
        )
