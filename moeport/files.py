"""How files are written: whole or not at all, and with one sentence where that fails.

A file is written under a temporary name in its own folder, flushed to disk and renamed. The temporary name holds the
host and the process that writes, so that nobody deletes what another is writing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moeport.errors import WriteError

MAX_NAME = 255
"""Bytes of a file's name that every usual file system takes."""
ABANDONED_SECONDS = 24 * 3600.0
"""Age from which a temporary file of another host counts as left behind."""
LOOK_SECONDS = 0.02
"""From one look for a file of another process to the next."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
"""Errors of file systems that have no hard links."""
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)-(?P<token>[0-9a-f]{8})\.tmp")
_own: dict[str, Path] = {}
"""Temporary files and folders of this process, by their token: in a container, a dead process had its number."""
_NUMBER = re.compile(r"\(os error (\d+)\)")
_ELSEWHERE = "choose another place"
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free space on it, or choose a place on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free space, or choose a place on another disk"),
    errno.EFBIG: ("the file would be larger than allowed", "raise the limit (ulimit -f), or choose another disk"),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EACCES: ("permission denied", "change the permissions, or choose a place that you may write to"),
    errno.EPERM: ("permission denied", "change the permissions, or choose a place that you may write to"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", _ELSEWHERE),
    errno.EEXIST: ("it is a file, not a folder", _ELSEWHERE),
    errno.ENOTEMPTY: ("the folder holds other files", _ELSEWHERE),
    errno.ENOENT: ("its folder does not exist or was deleted meanwhile", "make the folder, or choose another place"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("its links lead in a circle", _ELSEWHERE),
    errno.ENXIO: ("nothing reads from it", "start the reader, or name a file"),
    errno.EPIPE: ("its reader has gone", "start the reader again, or name a file"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.EIO: ("the disk reports an error", "check the disk, or choose another one"),
    errno.ESTALE: ("the network storage no longer knows it", "check the mount, or choose another place"),
}
"""What is wrong and what helps, by error number."""


def write_error(path: Path, error: BaseException) -> WriteError | None:
    """The sentence for a failed write; None for an error that is about something else.

    Args:
        path: what was to be written.
        error: an OSError, or an error of safetensors or tokenizers, which wrap one.
    """
    number = error.errno if isinstance(error, OSError) else _wrapped_number(error)
    if number is None:
        return None
    cause, remedy = _CAUSES.get(number, (os.strerror(number), _ELSEWHERE))
    if os.path.islink(path) and not os.path.exists(path):
        cause, remedy = f"it is a link to {os.readlink(path)}, which cannot be made", "remove the link"
    return WriteError(f"{path}: cannot be written: {cause}; {remedy}")


def disk_error(error: BaseException) -> WriteError | None:
    """The sentence for a write of a library that failed, if the error is surely one: the disk is full or read-only."""
    if not isinstance(error, OSError):
        return None
    if str(error.strerror).startswith("No usable temporary directory"):
        return WriteError(
            "no folder for temporary files can be written; free space in it, or set TMPDIR to another one"
        )
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return None
    return write_error(Path(str(error.filename or "a temporary file")), error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises WriteError, which names `path`, for every write that fails in the block."""
    try:
        yield
    except Exception as error:
        known = write_error(path, error)
        if known is None:
            raise
        raise known from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces `path` when the block ends without an error.

    Missing folders are made. The file gets the permissions of the one that it replaces, or those that the umask gives.
    What is not a regular file, such as /dev/stdout, is written to directly.

    Raises WriteError if it cannot be written; then `path` is as it was.
    """
    with writing(path):
        if _is_special(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        _refuse_unwritable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        temporary = _temporary(target)
        try:
            with temporary.open("x"):
                mode = stat.S_IMODE(temporary.stat().st_mode)
            with suppress(FileNotFoundError):
                mode = stat.S_IMODE(target.stat().st_mode)
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            sync(temporary)
            temporary.replace(target)
            sync(target.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes the place of `path` when the block ends without an error.

    Its files get the permissions that the umask gives. Missing folders are made.

    Raises WriteError if it cannot be written; then `path` is as it was.
    """
    temporary = start_folder(path)
    try:
        with writing(path):
            yield temporary
        put_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def start_folder(path: Path) -> Path:
    """Make a temporary folder beside `path`, for `put_folder`. Missing folders are made.

    Raises WriteError if it cannot be made.
    """
    with writing(path):
        target = Path(os.path.realpath(path))
        _refuse_long(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        temporary = _temporary(target)
        temporary.mkdir()
        return temporary


def put_folder(temporary: Path, path: Path) -> None:
    """Flush a temporary folder to disk, and let it take the place of `path`.

    Raises WriteError if it cannot be done; then `path` is as it was.
    """
    with writing(path):
        target = Path(os.path.realpath(path))
        mode = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        for file in temporary.iterdir():
            file.chmod(mode)
            sync(file)
        sync(temporary)
        _put(temporary, target)
        sync(target.parent)


def token_of(temporary: Path) -> int:
    """A number of 32 bits by which another process finds a temporary file or folder of this one."""
    found = _TEMPORARY.fullmatch(temporary.name)
    assert found
    return int(found["token"], 16)


def find_temporary(folder: Path, token: int, seconds: float) -> Path | None:
    """The temporary file or folder in `folder` that another process has made; None if it does not appear in time."""
    end = time.monotonic() + seconds
    while True:
        if found := next(iter(folder.glob(f".*-{token:08x}.tmp")), None):
            return found
        if time.monotonic() > end:
            return None
        time.sleep(LOOK_SECONDS)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 as `atomic_file` does; what UTF-8 cannot hold becomes `?`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON that ends in a newline, as `atomic_file` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def create_text(path: Path, text: str) -> None:
    """Write a file that must not be there yet, so that of several processes only one succeeds, on any host.

    A link that fails where there is a file is atomic on network storage too.

    Raises FileExistsError if it is there, WriteError if it cannot be written.
    """
    with writing(path):
        temporary = _temporary(path)
        try:
            temporary.write_text(text, encoding="utf-8")
            try:
                os.link(temporary, path)
            except FileExistsError:
                exists = temporary.stat().st_nlink < 2  # a request that network storage repeated has succeeded
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                exists = not _created(path, text)
            else:
                exists = False
        finally:
            with suppress(OSError):
                temporary.unlink()
    if exists:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def take_away(path: Path) -> Path:
    """Give a file another name beside it, of which only one process succeeds; it is deleted as a leftover is.

    Raises FileNotFoundError if it is not there.
    """
    aside = _temporary(path)
    path.rename(aside)
    return aside


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there. Raises WriteError if it cannot be made."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Delete a file or a folder; it is renamed first, so that a half-deleted folder is never seen under its name.

    Raises WriteError if it cannot be deleted.
    """
    with writing(path):
        doomed = _temporary(path)
        path.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Delete temporary files and folders that processes left behind when they were killed.

    Args:
        folder: where to look; what lies deeper stays.
        name: only those of this file or folder; empty: all.
    """
    for path in folder.glob(f".{_escaped(_kept(name))}*.tmp" if name else ".*.tmp"):
        if is_abandoned(path):
            discard(path)


def discard(path: Path) -> None:
    """Delete a temporary file or folder if it is there and can be deleted.

    A folder is renamed first: a thread that gives it its final name meanwhile either comes first or fails.
    """
    with suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            doomed = _temporary(path)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            path.unlink()


def discard_temporaries() -> None:
    """Delete what this process is writing, since it ends now."""
    for path in list(_own.values()):
        discard(path)


def is_abandoned(path: Path) -> bool:
    """Whether `path` is a temporary file whose process has ended; on another host, whether it is a day old."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None:
        return False
    if found["host"] == _host():
        pid = int(found["pid"])
        return found["token"] not in _own if pid == os.getpid() else not process_runs(pid)
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_SECONDS
    except OSError:
        return False


def process_runs(pid: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold. Leaves no trace.

    Raises WriteError: it is a folder, its folder cannot be made or written to, the disk is full.
    """
    with writing(path):
        if _is_special(path):
            return
        target = Path(os.path.realpath(path))
        _refuse_unwritable(target)
        check_folder(target.parent, path)


def check_folder(folder: Path, path: Path | None = None) -> None:
    """Refuse a folder that cannot be made or written to. Leaves no trace.

    Args:
        folder: the folder, which need not exist.
        path: what the message names; default: the folder.

    Raises WriteError.
    """
    with writing(path or folder):
        folder = Path(os.path.realpath(folder))
        _refuse_long(folder)
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        trial = _temporary(folder / "trial")
        try:
            trial.write_bytes(b"\n")
        finally:
            with suppress(OSError):
                trial.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _created(path: Path, text: str) -> bool:
    """Create a file where the file system has no links; False if it is there."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    token = uuid.uuid4().hex[:8]
    _own[token] = path.with_name(f".{_kept(path.name)}.{_host()}-{os.getpid()}-{token}.tmp")
    return _own[token]


def _kept(name: str) -> str:
    """As much of a name as a temporary name has room for."""
    return os.fsencode(name)[:128].decode("utf-8", "ignore")


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())[:64]


def _is_special(path: Path) -> bool:
    """Whether it names a device, a pipe or an open file, which cannot be replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    name = os.path.abspath(path)
    if stat.S_ISREG(mode):
        return name.startswith(("/dev/", "/proc/")) and not name.startswith("/dev/shm/")
    return not stat.S_ISDIR(mode)


def _refuse_long(path: Path) -> None:
    """Raises OSError for names that no file system takes, before folders are made for them."""
    if any(len(os.fsencode(part)) > MAX_NAME for part in path.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _refuse_unwritable(target: Path) -> None:
    """Raises OSError where a file of this name would be refused, although its folder takes new ones."""
    _refuse_long(target)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    number = errno.EISDIR if stat.S_ISDIR(mode) else 0 if os.access(target, os.W_OK) else errno.EACCES
    if number:
        raise OSError(number, os.strerror(number))


def _put(temporary: Path, target: Path) -> None:
    """Rename a folder to a name that an older folder may have, which is then deleted."""
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = _temporary(target)
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _wrapped_number(error: BaseException) -> int | None:
    """The error number in the text of an error that a library in Rust raises for a failed write."""
    if not type(error).__module__.startswith(("safetensors", "tokenizers", "builtins")):
        return None
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None
