"""`moeport ARGUMENTS` in a process that something happens to: driver.py FAULT ARGUMENTS.

FAULT is JSON, with `do`, and with `under` and `at` if it happens before the at-th file operation in the folder `under`.
`count`, a file, is given the number of file operations that there were.

| `do` | What happens |
|---|---|
| a signal, such as SIGKILL | The process sends it to itself. |
| an error number, such as ENOSPC | The operation fails, and so does every later one that makes or writes something. |
| closed | Standard output is a pipe whose reader has gone, from the start. |
| stuck | The first step of the run never ends, and is deaf to Python's signal handlers. |
"""

import atexit
import ctypes
import errno
import json
import os
import signal
import sys
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
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


def stick():
    """Never returns; a lock of the C library is not given up for a signal."""
    from moeport.training.trainer import Trainer

    def step(self):
        print("stuck", flush=True)
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)

    Trainer.step = step


def main():
    wanted = json.loads(sys.argv[1])
    sys.argv = ["moeport", *sys.argv[2:]]
    if wanted["do"] == "closed":
        close_output()
    elif wanted["do"] == "stuck":
        stick()
    else:
        fault = Fault(**wanted)
        watch_fsync(fault)
        sys.addaudithook(fault.hear)
    from moeport.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
