"""Which files a source names, how they are read, and what is said about those that are left out."""

import bz2
import gzip
import json
import lzma
import os
import re
import sys

import pytest

from moeport.config import config_from_dict
from moeport.config.data import DataConfig, FilesSource
from moeport.data import files, streams
from moeport.data.left_out import LeftOut
from moeport.data.sources import open_source, read_documents
from moeport.errors import ConfigError, DataError

TEXT = "naïve café — 日本語\r\n"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, content="x"):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return path


def read(*paths, **options):
    """All documents, by name."""
    source = FilesSource(paths=paths, **options)
    left_out = LeftOut()
    opened = open_source(DataConfig(source=source), left_out)
    documents = {document.name: document.text for document in opened.train(left_out)}
    opened.refuse_faults(left_out)
    return {name: text for name, text in documents.items() if text}, left_out


def refused(message, *paths, **options):
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        read(*paths, **options)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.md", "a.rst", "a.html", "a.htm", "A.TXT", "b.c.Md"])
def test_text_files_are_read_as_they_are(name):
    write(name, f"<p>&amp;{TEXT}")
    assert read(name)[0] == {name: f"<p>&amp;{TEXT}"}


def test_further_suffixes():
    write("a.tex", "tex")
    write("b.TEX", "TEX")
    write("Makefile", "all:")
    write("c.txt", "txt")
    assert set(read("*.*", text_suffixes=(".tex",))[0]) == {"a.tex", "b.TEX", "c.txt"}
    assert set(read("*", text_suffixes=("*",))[0]) == {"a.tex", "b.TEX", "c.txt", "Makefile"}
    with pytest.raises(ConfigError, match="has an item that is not a suffix"):
        config_from_dict({"data": {"source": {"name": "files", "paths": ["a"], "text_suffixes": ["tex"]}}})


ROWS = "".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "two"))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(suffix, pack):
    write(f"a.txt{suffix}", pack(b"one ") + pack(b"file"))
    write(f"b.jsonl{suffix}", pack(ROWS.encode()))
    write(f"c.txt{suffix}", pack(b"text" * 99)[:-9])
    write(f"d.txt{suffix}", b"not packed")
    write(f"e.png{suffix}", pack(b""))
    assert read(f"a.txt{suffix}", f"b.jsonl{suffix}")[0] == {
        f"a.txt{suffix}": "one file",
        f"b.jsonl{suffix}:1": TEXT,
        f"b.jsonl{suffix}:2": "two",
    }
    refused(f"c.txt{suffix}: cannot read the file: ", f"c.txt{suffix}")
    refused(f"d.txt{suffix}: cannot read the file: ", f"d.txt{suffix}")
    refused(f"data.source.paths: cannot read e.png{suffix}: expected ", f"e.png{suffix}")


def test_zstd():
    zstandard = pytest.importorskip("zstandard")
    write("a.txt.zst", zstandard.compress(b"one ") + zstandard.compress(b"file"))
    write("b.jsonl.zst", zstandard.compress(ROWS.encode()))
    write("c.txt.zst", b"not packed")
    write("d.txt.zst", zstandard.compress(bytes(10**8)))
    assert read("a.*", "b.*")[0] == {"a.txt.zst": "one file", "b.jsonl.zst:1": TEXT, "b.jsonl.zst:2": "two"}
    refused("c.txt.zst: cannot read the file: ", "c.txt.zst")
    refused("d.txt.zst: cannot read the file: unpacks to more than 200 times its size", "d.txt.zst")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python has it")
def test_zstd_without_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    write("a.txt.zst", b"")
    refused(
        "reading a .zst file needs the package `zstandard`: pip install 'moeport[data]'", "a.txt.zst", bad_files="skip"
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_what_unpacks_without_end_is_stopped_early(monkeypatch, name, suffix, pack):
    monkeypatch.setattr(streams, "FREE_BYTES", 2**20)
    write(f"{name}{suffix}", pack(bytes(2**23)))
    refused(f"{name}{suffix}: cannot read the file: unpacks to more than 200 times its size", f"{name}{suffix}")


@pytest.mark.parametrize(
    ("encoding", "option"),
    [
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-8"),
        ("utf-32", "utf-8"),
        ("utf-16-le", "utf-16-le"),
        ("gb18030", "gb18030"),
        ("shift_jis", "Shift-JIS"),
        ("utf-8", "UTF8"),
        ("utf-7", "utf-7"),
    ],
)
def test_encodings(encoding, option):
    text = "日本語 text\r\n"
    write("a.txt", text.encode(encoding))
    rows = f'{{"text": "{text.strip()}"}}\r\n\r\n{{"text": "two"}}'
    write("a.jsonl", rows.encode(encoding))
    assert read("a.*", encoding=option)[0] == {"a.jsonl:1": text.strip(), "a.jsonl:3": "two", "a.txt": text}


def test_wrong_encodings(monkeypatch):
    write("a.txt", "café".encode("latin-1"))
    assert read("a.txt", encoding="cp1252")[0] == {"a.txt": "café"}
    refused("a.txt: not UTF-8 at byte 3; convert the file to UTF-8, or set data.source.encoding", "a.txt")
    refused("a.txt: not ascii at byte 3; convert", "a.txt", encoding="ascii")
    write("c.jsonl", '{"text": "one"}\n'.encode("utf-16"))
    with monkeypatch.context() as patch:
        patch.setattr(files, "MAX_LINE", 10)
        refused("c.jsonl: longer than 0 MiB in utf-16, which is read as a whole; convert it to UTF-8", "c.jsonl")
    write("b.txt", b"\xff\xfea")
    refused("b.txt: not utf-16 at byte ", "b.txt")
    for wrong in ("hex", "no-such", ""):
        with pytest.raises(ConfigError, match=r"data\.source\.encoding: is not a text encoding that Python knows"):
            config_from_dict({"data": {"source": {"name": "files", "paths": ["a"], "encoding": wrong}}})


def faulty_files():
    write("a.txt", b"\xff")
    write("b.jsonl", '{"text": 1}\n{"text": "fine"}\n{"text"\n' + "[" * 100_000 + f'\n{{"n": {"1" * 5000}}}\n')
    write("c.txt", "fine")
    os.symlink("nowhere", "d.txt")
    os.mkfifo("e.txt")


FAULTS = [
    "a.txt: not UTF-8 at byte 0; convert the file to UTF-8, or set data.source.encoding",
    "b.jsonl:1: column 'text' holds int, expected a string",
    "b.jsonl:3: malformed JSON: Expecting ':' delimiter at column 8",
    "b.jsonl:4: malformed JSON: nested too deeply",
    "b.jsonl:5: malformed JSON: a number of thousands of digits",
    "d.txt: cannot read the file: No such file or directory",
    "e.txt: cannot read the file: it is a named pipe, not a regular file",
]


def test_all_faults_are_listed_at_once():
    faulty_files()
    refused(
        "data.source: 7 files or rows cannot be read; fix them, leave them out with data.source.exclude, or skip them "
        "with data.source.bad_files:\n  " + "\n  ".join(FAULTS),
        "*",
    )


def test_faults_can_be_skipped_and_are_counted():
    faulty_files()
    documents, left_out = read("*", bad_files="skip")
    assert set(documents) == {"b.jsonl:2", "c.txt"}
    assert left_out.unreadable == 7
    assert left_out.lines() == [
        "skipped 7 files or rows that cannot be read (data.source.bad_files): " + "; ".join(FAULTS)
    ]


def test_a_long_list_of_faults_is_cut():
    write("a.jsonl", "x\n" * 1000)
    _, left_out = read("a.jsonl", bad_files="skip")
    assert left_out.listed("\n").count("\n") == 20
    assert left_out.listed("\n").endswith("\nand 980 more")


def test_numbers_that_other_programs_write_are_no_fault_in_other_columns():
    write("a.jsonl", '{"n": NaN, "text": "a"}\n{"n": 1e999, "text": "b"}\n{"n": -Infinity, "text": "c"}\n')
    assert list(read("a.jsonl")[0].values()) == ["a", "b", "c"]


def test_empty_parquet_shards():
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "a.parquet")
    parquet.write_table(pyarrow.table({}), "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None]}), "c.parquet")
    documents, left_out = read("*.parquet", bad_files="skip")
    assert documents == {"c.parquet:1": "one"}
    assert left_out.faults == ["c.parquet:2: column 'text' holds NoneType, expected a string"]


def tree():
    for path in (
        "d/b.txt", "d/a/c.md", "d/a/.hidden.txt", "d/.git/x.txt", "d/a/p.png", "d/a/q.png", "d/README", "d/z/deep/e.py"
    ):  # fmt: skip
        write(path, path)
    os.symlink("nowhere", "d/broken.txt")


def test_a_folder_stands_for_the_files_in_it_and_below():
    tree()
    documents, left_out = read("d")
    assert list(documents) == ["d/a/c.md", "d/b.txt", "d/z/deep/e.py"]
    assert left_out.notes == ["skipped in d: 2 hidden, 2 with .png, 1 with a broken link, 1 without a suffix"]
    assert list(read("d/")[0]) == list(documents)
    assert list(read(".")[0]) == list(documents)
    assert list(read(os.path.abspath("d"))[0]) == [os.path.abspath(path) for path in documents]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.txt", ["d/b.txt", "t.txt"]),
        ("d/**/*.md", ["d/a/c.md"]),
        ("d/**/deep/**", ["d/z/deep/e.py"]),
        ("**/[a-c]*.??", ["d/a/c.md"]),
        ("./**/e.py", ["d/z/deep/e.py"]),
        ("d/**/.git/*", ["d/.git/x.txt"]),
        ("d/a/.*", ["d/a/.hidden.txt"]),
        ("*/*/**/*.py", ["d/z/deep/e.py"]),
        ("**/d/**/**/c.md", ["d/a/c.md"]),
        ("odd [1].txt", ["odd [1].txt"]),
    ],
)
def test_globs(pattern, names):
    tree()
    os.remove("d/broken.txt")
    write("t.txt")
    write("odd [1].txt", "odd")
    assert [name for name in read(pattern)[0] if name != "odd [1].txt" or "odd" in pattern] == names


@pytest.mark.parametrize(
    ("exclude", "names"),
    [
        ("*.md", ["d/b.txt", "d/z/deep/e.py"]),
        ("deep", ["d/a/c.md", "d/b.txt"]),
        ("deep/", ["d/a/c.md", "d/b.txt"]),
        ("d/a", ["d/b.txt", "d/z/deep/e.py"]),
        ("./d/a/**", ["d/b.txt", "d/z/deep/e.py"]),
        ("**/e.py", ["d/a/c.md", "d/b.txt"]),
        ("d/*/*", ["d/b.txt"]),
        ("{cwd}/d/z", ["d/a/c.md", "d/b.txt"]),
    ],
)
def test_exclude(exclude, names):
    tree()
    documents, left_out = read("d", exclude=(exclude.format(cwd=os.getcwd()),))
    assert list(documents) == names
    assert len(left_out.notes) == 1


def test_exclude_that_leaves_nothing_or_does_nothing():
    tree()
    refused(
        "data.source.paths: the folder 'd' has no file that data.source.exclude leaves to read", "d", exclude=("d",)
    )
    refused("data.source.paths: no file that data.source.exclude leaves matches 'd/*.txt'", "d/*.txt", exclude=("d",))
    assert "data.source.exclude: '*.tex' matches no file" in read("d", exclude=("*.tex",))[1].notes


def test_a_file_counts_once_whatever_its_names():
    write("s/m.txt", "abc")
    for number in range(9):
        os.symlink("m.txt", f"s/l{number}.txt")
    os.link("s/m.txt", "s/a.txt")
    os.symlink("s", "t")
    documents, left_out = read("s/*.txt", "t/*.txt", "s/../s/m.txt")
    assert documents == {"s/a.txt": "abc"}
    assert left_out.lines() == ["21 further names of files that are read already (links)"]


def test_a_held_out_file_under_another_name_is_refused():
    write("a.txt")
    os.link("a.txt", "v.txt")
    refused("v.txt is named by both data.source.paths and data.source.validation_paths", "a.txt",
            validation_paths=("v.txt",))  # fmt: skip


@pytest.mark.parametrize("pattern", ["l/**/*.txt", "l", "l/**"])
def test_circles_of_links_come_to_an_end(pattern):
    write("l/sub/x.txt", "abc")
    for number in range(30):
        os.symlink("..", f"l/sub/up{number}")
        os.symlink(".", f"l/here{number}")
    assert read(pattern)[0] == {"l/sub/x.txt": "abc"}


def test_deep_folders():
    path = "deep"
    for _ in range(300):
        path += "/d"
    os.makedirs("deep")
    here = os.getcwd()
    os.chdir("deep")
    for _ in range(300):
        os.mkdir("d")
        os.chdir("d")
    write("x.txt")
    os.chdir(here)
    assert list(read("deep")[0]) == [f"{path}/x.txt"]


@pytest.mark.parametrize(
    ("fraction", "texts", "is_exchanged"), [(0.1, 40, True), (0.5, 40, True), (0.9, 40, False), (0.5, 200, False)]
)
def test_no_text_is_on_both_sides(fraction, texts, is_exchanged):
    write("a.jsonl", "".join(json.dumps({"text": str(number % texts)}) + "\n" for number in range(400)))
    left_out = LeftOut()
    config = DataConfig(source=FilesSource(paths=("a.jsonl",)), validation_fraction=fraction)
    train, validation = read_documents(config, left_out)
    assert not {document.text for document in train} & {document.text for document in validation}
    assert [len(list(side)) for side in (train, validation)] == [len(train), len(validation)]
    assert len(train) + len(validation) + left_out.shared == 400
    assert left_out.shared
    other = "the other side of the split" if is_exchanged else "training"
    assert left_out.lines()[-1] == f"{left_out.shared} documents left out, since the same text is used for {other}"
    assert left_out.is_exchanged == is_exchanged


def test_texts_of_a_given_validation_set_are_not_trained_on():
    write("a.jsonl", "".join(json.dumps({"text": str(number % 40)}) + "\n" for number in range(400)))
    write("v.txt", "7")
    left_out = LeftOut()
    config = DataConfig(source=FilesSource(paths=("a.jsonl",), validation_paths=("v.txt",)))
    train, validation = read_documents(config, left_out)
    assert (len(train), len(validation)) == (390, 1)
    assert left_out.lines() == ["10 documents left out, since the same text is used for validation"]
