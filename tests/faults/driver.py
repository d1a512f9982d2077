"""`moeport ARGUMENTS` in a process that something happens to: driver.py FAULT ARGUMENTS.

FAULT is JSON, with `do`, and with `under` and `at` if it happens before the at-th file operation in the folder `under`.
`count`, a file, is given the number of file operations that there were.

| `do` | What happens |
|---|---|
| a signal, such as SIGKILL | The process sends it to itself. |
| an error number, such as ENOSPC | The operation fails, and so does every later one that makes or writes something. |
| disk | `under` is a disk of `size`, in the notation of mount; once the command has ended, the disk grows, the command
         is given `--resume`, and what it leaves is copied to `under` with `.out` added. |
| closed | Standard output is a pipe whose reader has gone, from the start. |
| stuck | The first step of the run never ends, and is deaf to Python's signal handlers. |
"""

import atexit
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from moeport.training import task

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
NO_DISK, NO_RESUME = 77, 78
"""Exit codes: disks cannot be made here; the run could not be resumed."""
REMOVING = {"os.remove", "os.rmdir"}


class Fault:
    """What happens, and when."""

    def __init__(self, do, under="", at=0, count=None):
        self.do, self.under, self.at, self.operations = do, under, at, 0
        if count:
            atexit.register(lambda: Path(count).write_text(str(self.operations)))

    def hear(self, event, arguments):
        """An audit hook."""
        if self._is_operation(event, arguments) and self._is_under(arguments[0]):
            self.happen(event)

    def happen(self, event):
        """Count an operation, before which the fault may strike."""
        self.operations += 1
        if not self.at or self.operations < self.at:
            return
        if self.do.startswith("SIG"):
            if self.operations == self.at:
                os.kill(os.getpid(), getattr(signal, self.do))
        elif event not in REMOVING:
            number = getattr(errno, self.do)
            raise OSError(number, os.strerror(number))

    def _is_operation(self, event, arguments):
        if event == "open":
            _, mode, flags = arguments
            return bool(set(mode or "").intersection("wax+") or (flags or 0) & WRITING)
        return event in OPERATIONS

    def _is_under(self, path):
        try:
            return os.fsdecode(path).startswith(self.under)
        except TypeError:
            return False


def watch_fsync(fault):
    """Flushing is an operation too; no audit event tells of it."""
    flush = os.fsync

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(fault.under):
            fault.happen("os.fsync")
        flush(descriptor)

    os.fsync = fsync


def close_output():
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def on_disk(folder, size):
    """The command on a disk of that size, and again on a large one; ends this process with the first exit code.

    The disk is a tmpfs in a mount namespace of this process: nobody else sees it, and it ends with the process.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    new = 0x00020000 | (0x10000000 if user else 0)  # CLONE_NEWNS, CLONE_NEWUSER
    steps = [lambda: libc.unshare(new)]
    if user:
        steps += [lambda: Path("/proc/self/setgroups").write_text("deny") and 0]
        steps += [lambda: Path("/proc/self/uid_map").write_text(f"0 {user} 1") and 0]
        steps += [lambda: Path("/proc/self/gid_map").write_text(f"0 {group} 1") and 0]
    steps += [lambda: libc.mount(None, b"/", None, 0x00044000, None)]  # MS_REC | MS_PRIVATE
    steps += [lambda: libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())]
    if any(step() for step in steps):
        print(f"no disk: {os.strerror(ctypes.get_errno())}", flush=True)
        os._exit(NO_DISK)
    code = _forked()
    left = [str(path) for path in Path(folder).rglob("*.tmp")]
    print(f"on the full disk: {left or 'no litter'}", flush=True)
    libc.mount(None, os.fsencode(folder), None, 32, b"size=64m")  # MS_REMOUNT
    if _forked("--resume"):
        code = NO_RESUME
    shutil.copytree(folder, folder + ".out")
    os._exit(code)


def _forked(*more):
    """Run the command in a child; its exit code."""
    pid = os.fork()
    if pid == 0:
        sys.argv += more
        from moeport.cli.main import main as command

        command()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stick():
    """Never returns; a lock of the C library is not given up for a signal."""
    from moeport.training.trainer import Trainer

    def advance(self, waits=False):
        print("stuck", flush=True)
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)

    Trainer.advance = advance


def main():
    task.SAMPLE_TOKENS = 4  # most of the time of a run of a few steps goes into its sample
    wanted = json.loads(sys.argv[1])
    sys.argv = ["moeport", *sys.argv[2:]]
    if wanted["do"] == "closed":
        close_output()
    elif wanted["do"] == "stuck":
        stick()
    elif wanted["do"] == "disk":
        on_disk(wanted["under"], wanted["size"])
    else:
        fault = Fault(**wanted)
        watch_fsync(fault)
        sys.addaudithook(fault.hear)
    from moeport.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
