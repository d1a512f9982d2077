"""Ranks that a forker of their framework starts: what the tests see of tests/jobs/forker.py."""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from moeport.launch.launcher import node_processes

MODULES = {
    "torch": ("torch", "torch.distributed", "torch._inductor", "moeport.backends.torch.backend"),
    "mindspore": ("mindspore", "moeport.backends.mindspore.backend"),
}
"""Also what the framework imports only when it is first used: torch its compiler, to be deterministic."""
COMMON = ("moeport.cli.main", "moeport.training.run", "moeport.parity.run", "tests.jobs.shorter")


class Rank:
    """A forked process, with the methods of Popen that jobs use."""

    def __init__(self, pid):
        self.pid, self.returncode, self.ended = pid, None, threading.Event()

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"rank of pid {self.pid}", timeout)
        return self.returncode


class Forker:
    """One process of a framework, from which ranks are forked."""

    def __init__(self, modules, environment):
        command = [sys.executable, str(Path(__file__).with_name("forker.py")), *modules]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.ranks, self.requested, self.lock = {}, {}, threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments, environment, output, directory=None):
        """A rank that runs `python ARGUMENTS`, as soon as the framework is there."""
        request = {"arguments": arguments, "environment": environment, "output": str(output)}
        request["directory"] = str(directory or os.getcwd())
        with self.lock:
            number = request["number"] = len(self.requested)
            self.requested[number] = None
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            while not self.requested[number]:
                assert self.process.poll() is None, "the process that forks ranks has ended"
                self.lock.wait(1.0)
            return self.requested[number]

    def _listen(self):
        for line in self.process.stdout:
            if not line.startswith(b"{"):  # a framework speaks when it is imported
                continue
            event = json.loads(line)
            with self.lock:
                if "started" in event:
                    rank = self.ranks[event["started"]] = Rank(event["started"])
                    self.requested[event["number"]] = rank
                    self.lock.notify_all()
                else:
                    rank = self.ranks.pop(event["ended"])
                    rank.returncode = event["code"]
                    rank.ended.set()


FIRST = threading.Lock()
"""Held while a forker is looked up: of the threads that want it at the same time, one starts it."""


def forker_of(backend):
    """The forker of this test process."""
    with FIRST:
        return _forker(backend)


@functools.cache
def _forker(backend):
    return Forker([*MODULES[backend], *COMMON], settings())


def settings():
    """The environment of every rank."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOG_v": "3", "COLUMNS": "200"}


class Ranks:
    """The ranks of one job, with the methods of Popen that jobs use: it ends when all have ended."""

    def __init__(self, ranks, scheduler=None):
        self.ranks, self.scheduler = ranks, scheduler

    def poll(self):
        codes = [rank.poll() for rank in self.ranks]
        return None if None in codes else next(filter(None, codes), 0)

    def wait(self, timeout=None):
        """The exit code of the first rank that did not end with 0, else that of MindSpore's scheduler."""
        deadline = time.monotonic() + (timeout or 1e9)
        code = next(filter(None, [rank.wait(deadline - time.monotonic()) for rank in self.ranks]), 0)
        return code or (self.scheduler.wait(deadline - time.monotonic()) if self.scheduler else 0)

    def kill(self):
        for rank in filter(None, [*self.ranks, self.scheduler]):
            if rank.poll() is None:
                os.kill(rank.pid, 9)
                rank.wait(30)


def start_all(backend, commands, environments, folder):
    """A job of ranks with a command and an environment each, as a launcher other than torchrun and msrun starts it."""
    forker = forker_of(backend)
    return Ranks(
        [
            forker.start(command, settings() | own, folder / f"worker_{rank}.log")
            for rank, (command, own) in enumerate(zip(commands, environments, strict=True))
        ]
    )


def start_torch(size, nodes, arguments, folder, port, environment):
    """As torchrun starts them."""
    processes = node_processes("torchrun", nodes, size // nodes, "127.0.0.1", [], port)
    environments = [process.environment | environment for process in processes]
    return start_all("torch", [arguments] * size, environments, folder)


def start_mindspore(size, nodes, arguments, folder, port, environment):
    """As msrun starts them on one node."""
    assert nodes == 1
    forker = forker_of("mindspore")
    job = settings() | {
        "MS_WORKER_NUM": str(size),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(port),
        "MS_TOPO_TIMEOUT": "120",
        "RANK_SIZE": str(size),
    }
    scheduler = forker.start(
        arguments, job | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"} | environment, folder / "scheduler.log"
    )
    ranks = []
    for rank in map(str, range(size)):
        own = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "RANK_ID": rank, "DEVICE_ID": rank}
        ranks.append(forker.start(arguments, job | own | environment, folder / f"worker_{rank}.log"))
    return Ranks(ranks, scheduler)


START = {"torch": start_torch, "mindspore": start_mindspore}
