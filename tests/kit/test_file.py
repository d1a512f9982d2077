"""The file that the kit writes, and what is made of one that came from elsewhere."""

import contextlib
import io
import json
import os
import zipfile

import pytest

from moeport.errors import UserError
from moeport.kit import pack
from moeport.kit.pack import README_FILE, Contents, PartRecord, write_kit
from moeport.kit.page import page
from moeport.kit.private import Scrubber
from moeport.kit.read import MAX_ENTRIES, MAX_UNPACKED, read_kit
from moeport.kit.result import Result
from moeport.kit.text import facts, render
from moeport.pages.console import PlainConsole
from moeport.pages.tables import LISTED, Table
from moeport.version import VERSION

ENVIRONMENT = {"HOME": "/home/planted", "USER": "planted-user", "TOKEN": "planted-secret"}


def contents(*records):
    machine = {"device": "npu (Ascend910B4)", "CANN": "none found", "variables": {"OMP_NUM_THREADS": "1"}}
    return Contents({"backend": "torch", "parts": ["probe"]}, machine, "2026-11-28 12:00 UTC", list(records))


def failed():
    table = Table.of("what is wrong", ("case", "what"), [("swiglu", "zeros of planted-user")])
    result = Result(
        "fail",
        "1 of 3 cases is wrong in /home/planted/deep/x.py",
        [("cases", "3", "")],
        [table],
        {"path": "/home/planted/y/z"},
        {"more.json": {"by": "planted-user", "at": "/home/planted/a\n/home/planted/b"}},
    )
    return PartRecord("conformance", "operations", result, 3.21, "Traceback\nplanted-secret\n/home/planted/q.py")


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "commit", lambda: "0123456789abcdef")
    path = tmp_path / "kit.zip"
    passed = PartRecord("probe", "collectives", Result("pass", "every value is right"), 1.0)
    write_kit(path, contents(passed, failed()), Scrubber(ENVIRONMENT))
    return path


def test_a_file_is_read_as_it_was_written(written):
    found = read_kit(written)
    assert found.results["verdict"] == "fail"
    assert [part["verdict"] for part in found.results["parts"]] == ["pass", "fail"]
    assert found.results["parts"][1]["summary"] == "1 of 3 cases is wrong in ~/…/x.py"
    assert sorted(found.files) == [README_FILE, "logs/conformance.txt", "reports/more.json"]
    assert json.loads(found.files["reports/more.json"]) == {"by": "<user>", "at": "~/…/a\n~/…/b"}


def test_nothing_private_is_in_it(written):
    with zipfile.ZipFile(written) as file:
        everything = "".join(file.read(name).decode() for name in file.namelist())
    assert "planted" not in everything
    assert "host names, user names" in everything


def test_it_is_shown_in_the_terminal_and_as_a_page(written):
    found = read_kit(written)
    output = io.StringIO()
    PlainConsole(file=output, width=120).print(render(found))
    shown = output.getvalue()
    for text in (
        "fail (1 passed, 0 with a warning, 1 failed, 0 skipped)",
        f"moeport: {VERSION} (commit 0123456789ab)",
        "npu (Ascend910B4)",
        "CANN: none found",
        "zeros of <user>",
    ):
        assert text in shown
    html = page(found)
    for text in ("Ascend910B4", "none found", "every value is right", "zeros of &lt;user&gt;", "Traceback"):
        assert text in html
    assert "http" not in html.replace("http-equiv", "")


def test_a_page_of_hostile_texts_runs_nothing(tmp_path):
    evil, path = "</pre><script>alert(1)</script>", tmp_path / "kit.zip"
    result = Result("pass", evil, [(evil, evil, evil)], [Table(evil, [evil], [[evil]])])
    write_kit(path, contents(PartRecord("x", evil, result, 1.0, evil)), Scrubber({}))
    assert "<script>alert" not in page(read_kit(path))


def test_long_tables_are_cut():
    table = Table.of("rows", ("a", "b"), [(i, i) for i in range(LISTED + 5)])
    assert (len(table.rows), list(table.rows[-1])) == (LISTED + 1, ["… 5 more", ""])


def altered(path, change):
    """The file with other entries: `change` takes and returns them by name."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in change(entries).items():
            file.writestr(name, data)


def results(change):
    def changed(entries):
        found = json.loads(entries["kit.json"])
        change(found)
        return entries | {"kit.json": json.dumps(found).encode()}

    return changed


HOSTILE = {
    "path upwards": (lambda e: e | {"../../etc/cron": b"x"}, "it has a file named '../../etc/cron'"),
    "path from the root": (lambda e: e | {"/etc/cron": b"x"}, "it has a file named '/etc/cron'"),
    "bomb": (lambda e: e | {"logs/bomb.txt": bytes(MAX_UNPACKED + 1)}, f"unpacks to more than {MAX_UNPACKED:,} bytes"),
    "too many": (lambda e: e | {f"logs/{i}.txt": b"" for i in range(MAX_ENTRIES)}, f"more than {MAX_ENTRIES} entries"),
    "another file": (lambda e: e | {"logs/more.txt": b"x"}, "kit.json lists 3 files"),
    "altered": (lambda e: e | {"README.txt": b"x"}, "README.txt does not match its checksum"),
    "no results": (lambda e: {"README.txt": b"x"}, "it has no kit.json"),
    "not JSON": (lambda e: e | {"kit.json": b"{"}, "not JSON"),
    "deep JSON": (lambda e: e | {"kit.json": b"[" * 200_000}, "nested too deeply"),
    "another format": (results(lambda r: r.update(format="x")), 'kit.json has no "format": "moeport-kit"'),
    "a later version": (results(lambda r: r.update(format_version=99)), "format version 99, and this moeport reads 1"),
    "parts of another form": (results(lambda r: r.update(parts=[3])), "parts[0] is an integer, expected an object"),
    "a commit that is none": (results(lambda r: r.update(commit=3)), "commit is an integer, expected a string"),
    "a table of numbers": (
        results(lambda r: r["parts"][1]["tables"][0].update(rows=[[3]])),
        "parts[1].tables[0].rows[0][0] is an integer, expected a string",
    ),
    "a figure of two": (results(lambda r: r["parts"][1].update(figures=[["a", "b"]])), "a figure of conformance has 2"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(written, case):
    change, said = HOSTILE[case]
    altered(written, change)
    with pytest.raises(UserError) as caught:
        read_kit(written)
    assert str(caught.value).startswith(f"{written}: not a whole file of moeport kit: ")
    assert said in str(caught.value)


def test_a_file_of_an_older_version_has_no_commit(written):
    altered(written, results(lambda r: r.pop("commit")))
    assert ("moeport", f"{VERSION} (commit unknown)") in facts(read_kit(written).results)


def test_a_file_that_is_cut_or_altered_anywhere_is_refused_or_equal(written):
    whole = written.read_bytes()
    found = read_kit(written)
    for place in range(0, len(whole), max(len(whole) // 150, 1)):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            written.write_bytes(data)
            with contextlib.suppress(UserError):
                assert read_kit(written).files == found.files  # times of entries are not checked


def test_a_file_with_another_compression_is_refused(written):
    with zipfile.ZipFile(written, "a", zipfile.ZIP_LZMA) as file:
        file.writestr("logs/x.txt", "x")
    with pytest.raises(UserError, match=r"logs/x\.txt is not compressed in the way"):
        read_kit(written)


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None, os.mkfifo], ids=["folder", "missing", "pipe"])
def test_what_is_no_file_is_refused(tmp_path, make):
    path = tmp_path / "x.zip"
    make(path)
    with pytest.raises(UserError, match=r"x\.zip: cannot be read"):
        read_kit(path)


def test_a_large_file_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="larger than"):
        read_kit(path)
