"""What a rank does before MindSpore leaves its cluster, which may crash."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("mindspore")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MindSpore's threads are found in /proc")

THREADS = """
import os, threading, time
from pathlib import Path

ended = threading.Event()

def named(name):
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
    ended.wait()

names = ["RECV_EVENT_LOOP", "SEND_EVENT_LOOP", "other"]
threads = {name: threading.Thread(target=named, args=(name,)) for name in names}
for thread in threads.values():
    thread.start()
while not set(names) <= {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}:
    time.sleep(0.01)

from moeport.backends.mindspore import communicator

cores = sorted(os.sched_getaffinity(0))
communicator._let_receivers_finish(rank=len(cores))
found = {name: threads[name].native_id for name in names} | {"main": 0}
for name, thread in found.items():
    is_alone = os.sched_getaffinity(thread) == {cores[0]}
    policy = {os.SCHED_OTHER: "usual", os.SCHED_BATCH: "batch"}[os.sched_getscheduler(thread)]
    print(name, is_alone or len(cores) == 1, os.getpriority(os.PRIO_PROCESS, thread), policy)
ended.set()
"""


def test_receiving_threads_come_first():
    """They share a core with the main thread, which preempts nobody, and with the sending threads, which come last."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    usual = str(os.getpriority(os.PRIO_PROCESS, 0))
    assert found["RECV_EVENT_LOOP"] == ["True", usual, "usual"]
    assert found["SEND_EVENT_LOOP"] == ["True", "19", "usual"]
    assert found["main"] == ["True", usual, "batch"]
    assert found["other"][1:] == [usual, "usual"]
