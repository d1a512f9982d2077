"""Files are written whole or not at all, and a failed write is one sentence."""

import errno
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moeport import files
from moeport.errors import WriteError
from moeport.files import (
    atomic_file,
    atomic_folder,
    check_output,
    discard,
    discard_temporaries,
    put_folder,
    start_folder,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_new(path):
    write_text(path, "new")


def failing(number):
    def fail(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_is_replaced_whole_and_keeps_its_permissions(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    path.chmod(0o640)
    write_text(path, "b")
    assert (path.read_text(), path.stat().st_mode & 0o777, names(path.parent)) == ("b", 0o640, ["a.json"])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_new_files_follow_the_umask_also_those_of_safetensors(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "one.safetensors") as path:
            save_file({"a": np.ones(2)}, path)
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"a": np.ones(2)}, folder / "two.safetensors")
            (folder / "three").write_text("3")
    finally:
        os.umask(before)
    written = [tmp_path / "one.safetensors", *(tmp_path / "folder").iterdir()]
    assert [path.stat().st_mode & 0o777 for path in written] == [0o666 & ~mask] * 3
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_error_in_the_block_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a"
    write_text(path, "old")

    def write(error):
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise error

    for error in (ValueError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write(error)
    assert (path.read_text(), names(tmp_path)) == ("old", ["a"])


@pytest.mark.parametrize("number", sorted(files._CAUSES))
@pytest.mark.parametrize("call", ["replace", "chmod", "fsync"])
def test_every_failure_is_one_sentence_with_path_cause_and_remedy(tmp_path, monkeypatch, number, call):
    def write():
        with atomic_file(tmp_path / "a") as temporary:
            temporary.write_text("new")
            temporary.chmod(0o600)

    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(WriteError) as caught:
        write()
    monkeypatch.undo()
    cause, remedy = files._CAUSES[number]
    assert str(caught.value) == f"{tmp_path / 'a'}: cannot be written: {cause}; {remedy}"
    assert (caught.value.exit_code, names(tmp_path)) == (2, [])


def test_an_unknown_failure_says_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(errno.EBUSY))
    with pytest.raises(WriteError, match="a: cannot be written: Device or resource busy; choose another place"):
        write_text(tmp_path / "a", "new")


def test_a_full_disk_under_safetensors_is_the_same_sentence():
    with (
        pytest.raises(WriteError, match="x: cannot be written: the disk is full; free space"),
        files.writing(Path("x")),
    ):
        raise type("SafetensorError", (Exception,), {"__module__": "safetensors_rust"})(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )


def unwritable(folder):
    """Paths that cannot be written, with the cause that is told."""
    (folder / "folder").mkdir()
    (folder / "file").touch()
    (folder / "dangling").symlink_to(folder / "file" / "below")
    (folder / "circle").symlink_to(folder / "circle")
    return {
        folder / "folder": "it is a folder",
        folder / "file" / "below": "a part of the path is a file, not a folder",
        folder / "file" / "below" / "deep": "a part of the path is a file, not a folder",
        folder / "dangling": f"it is a link to {folder / 'file' / 'below'}, which cannot be made",
        folder / "circle": f"it is a link to {folder / 'circle'}, which cannot be made",
        folder / ("n" * 256): "the name is too long",
        folder / "new" / ("n" * 256) / "a": "the name is too long",
        folder / ("n/" * 3000): "the name is too long",
        Path("/proc/nothing/a"): "its folder does not exist",
    }


def test_an_output_that_cannot_be_written_is_refused_before_the_work_as_after_it(tmp_path):
    for path, cause in unwritable(tmp_path).items():
        for attempt in (check_output, write_new):
            with pytest.raises(WriteError) as caught:
                attempt(path)
            assert str(caught.value).startswith(f"{path}: cannot be written: {cause}"), caught.value
            assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["circle", "dangling", "file", "folder"]


@contextmanager
def nobody():
    """Run as a user without rights, where tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.setresgid(65534, 65534, 0)
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def test_a_folder_without_permission_is_refused():
    sentence = "cannot be written: permission denied; change the permissions, or choose a place that you may write to"
    with tempfile.TemporaryDirectory() as name:
        closed, locked = Path(name, "closed"), Path(name, "open", "locked")
        closed.mkdir()
        locked.parent.mkdir()
        locked.touch(mode=0o444)
        for folder, mode in ((closed, 0o555), (locked.parent, 0o777), (Path(name), 0o755)):
            folder.chmod(mode)
        for path in (closed / "a", closed / "b" / "c", locked):
            for attempt in (check_output, write_new):
                with nobody(), pytest.raises(WriteError) as caught:
                    attempt(path)
                assert str(caught.value) == f"{path}: {sentence}"
        assert (names(closed), names(locked.parent)) == ([], ["locked"])


def test_a_good_output_leaves_no_trace_of_the_check(tmp_path):
    for path in (tmp_path / "a", tmp_path / "deep" / "er" / "a", tmp_path / ("n" * 255), Path("/dev/null")):
        check_output(path)
    assert names(tmp_path) == []


def test_long_names_and_links_are_written(tmp_path):
    write_text(tmp_path / ("é" * 127), "long")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    for text in ("new", "newer"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "real" / "a").read_text() == text
    assert (tmp_path / "link").is_symlink()


def test_devices_and_pipes_are_written_to_not_replaced(tmp_path):
    write_text(Path("/dev/null"), "nothing")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(WriteError, match="/dev/full: cannot be written: the disk is full"):
        write_text(Path("/dev/full"), "x")
    read, write = os.pipe()
    write_text(Path(f"/proc/self/fd/{write}"), "through")
    assert os.read(read, 100) == b"through"
    os.close(read)
    os.close(write)


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "a") as folder:
            (folder / text).write_text(text)
    assert (names(tmp_path), names(tmp_path / "a")) == (["a"], ["new"])
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a") as folder:
        (folder / "half").write_text(str(1 / 0))
    assert (names(tmp_path), names(tmp_path / "a")) == (["a"], ["new"])


def test_only_what_dead_processes_left_is_removed(tmp_path):
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    host, own, token = files._host(), os.getpid(), "0123abcd"
    for pid, there in ((dead, host), (own, host), (os.getppid(), host), (dead, "elsewhere"), (dead, "long-ago")):
        (tmp_path / f".a.{there}-{pid}-{token}.tmp").touch()
    os.utime(tmp_path / f".a.long-ago-{dead}-{token}.tmp", (0, 0))
    (tmp_path / f".folder.{host}-{dead}-{token}.tmp").mkdir()
    (tmp_path / ".mine.tmp").touch()
    with atomic_file(tmp_path / "a") as temporary:
        files.remove_leftovers(tmp_path)
        assert temporary.exists()
    kept = [".mine.tmp", f".a.{host}-{os.getppid()}-{token}.tmp", f".a.elsewhere-{dead}-{token}.tmp", "a"]
    assert names(tmp_path) == sorted(kept)


def test_a_write_removes_what_a_killed_write_of_the_same_file_left(tmp_path):
    body = "import os; from pathlib import Path; from moeport.files import *\n"
    body += f"with atomic_file(Path({str(tmp_path / 'a')!r})) as t: t.write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", body])
    assert len(names(tmp_path)) == 1
    write_text(tmp_path / "a", "whole")
    assert names(tmp_path) == ["a"]


def test_a_library_that_finds_no_space_is_explained_too(monkeypatch):
    for error, text in (
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: cannot be written: the disk is full; "),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "a temporary file: cannot be written: the file system is read-",
        ),
    ):
        assert str(files.disk_error(error)).startswith(text)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    assert "set TMPDIR to another one" in str(files.disk_error(caught.value))
    assert files.disk_error(OSError(errno.ENOENT, "No such file", "config.yaml")) is None
    assert files.disk_error(ValueError()) is None


@pytest.mark.parametrize("of_the_process", [False, True])
def test_a_folder_whose_deletion_has_begun_gets_no_final_name(tmp_path, monkeypatch, of_the_process):
    """Or a thread could give its name to a checkpoint that the process deletes, since it ends."""

    def rmtree(path, **options):
        if path.is_relative_to(tmp_path):  # the process may have others left to discard
            with pytest.raises(WriteError):
                put_folder(folder, tmp_path / "final")
            began.append(path)
        original(path, **options)

    began, original = [], files.shutil.rmtree
    folder = start_folder(tmp_path / "final")
    (folder / "file").write_text("text")
    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    if of_the_process:
        discard_temporaries()
    else:
        discard(folder)
    assert began
    assert not list(tmp_path.iterdir())


def test_a_folder_that_has_its_final_name_is_not_discarded(tmp_path):
    folder = start_folder(tmp_path / "final")
    (folder / "file").write_text("text")
    put_folder(folder, tmp_path / "final")
    discard(folder)
    discard_temporaries()
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "file"]
