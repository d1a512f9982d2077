"""Ends whatever a test run leaves behind, however it ends.

Run as a script with a token, the value of `MOEPORT_TESTS` in the environment of every process of the run. When stdin
ends, which it does when the run is killed too, processes with that token are killed; stdout says which, a line each.
Neither a session of its own nor a parent that has gone hides a process, as msrun's `tail -f` would be.
"""

import os
import signal
import sys
import time
from pathlib import Path

VARIABLE = "MOEPORT_TESTS"


def processes_of(token):
    """Process ids and commands."""
    wanted, found = f"{VARIABLE}={token}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                found[int(folder.name)] = " ".join(command.replace("\0", " ").split())[:200]
        except OSError:
            continue
    found.pop(os.getpid(), None)
    return found


def end_all(token):
    """Kill until none is left, since some may start others meanwhile; ids and commands of those killed."""
    killed = {}
    for _ in range(100):
        there = processes_of(token)
        if not there:
            break
        killed |= there
        for pid in there:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return killed


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    lines = [f"{pid} {command}\n" for pid, command in end_all(sys.argv[1]).items()]
    try:
        os.write(1, "".join(lines).encode())
    except BrokenPipeError:  # the run was killed
        os._exit(0)
