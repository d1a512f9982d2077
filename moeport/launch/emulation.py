"""A cluster emulated on one Linux machine: one network namespace per node, joined by rate-limited links.

Ranks of one node communicate over its loopback device, ranks of different nodes over the limited links. All nodes
share the CPUs and memory of the machine. Needs root, and `ip` and `tc` from iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from moeport.errors import RunError, UserError
from moeport.launch.launcher import NodeProcess
from moeport.stopping import install, restore

PREFIX = "moeport"
DEVICE = "eth0"
EMULATED = "MOEPORT_EMULATED"
"""Environment variable that tells ranks, and through them the files of benchmarks, that all share one machine."""
BURST_BYTES = 128 * 1024
"""Largest burst of a link: a tenth of a millisecond at 10 Gbit/s."""
QUEUE = "50ms"
"""Longest time that a packet waits at a full link before it is dropped."""
GRACE_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL."""
RATE = re.compile(r"[1-9][0-9]*(\.[0-9]+)?[kmg]?bit")
LATENCY = re.compile(r"[0-9]+(\.[0-9]+)?(us|ms|s)")
MAX_NODES = 250
"""Far below the number of ports of a Linux bridge, and as many as have distinct addresses."""


class EmulatedCluster:
    """Nodes and links, which exist for the duration of the `with` block.

    Args:
        nodes: number of nodes.
        rate: rate of each node's link in each direction, in the notation of tc: `200mbit`, `1gbit`; None for no limit.
        latency: delay of each packet that leaves a node, in the notation of tc: `200us`; needs netem in the kernel.

    Raises UserError if the machine cannot emulate a cluster; the message says what is missing.
    """

    def __init__(self, nodes: int, rate: str | None, latency: str | None = None):
        if rate is not None and not RATE.fullmatch(rate):
            raise UserError(f"rate {rate!r}: expected a number of bits per second such as 200mbit or 1gbit")
        if latency is not None and not LATENCY.fullmatch(latency):
            raise UserError(f"latency {latency!r}: expected a time such as 200us or 1.5ms")
        if nodes > MAX_NODES:
            raise UserError(f"--nodes {nodes}: expected at most {MAX_NODES}")
        self.nodes, self.rate, self.latency = nodes, rate, latency
        self._switch = f"{PREFIX}-{os.getpid()}-switch"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> EmulatedCluster:
        require()
        _delete(_left_by_the_dead())
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        ours = {self._switch, *map(self.namespace, range(self.nodes))}
        _delete([name for name in _namespaces() if name in ours])

    def namespace(self, node: int) -> str:
        """Name of the network namespace of a node."""
        return f"{PREFIX}-{os.getpid()}-{node}"

    @staticmethod
    def address(node: int) -> str:
        """IP address of a node."""
        return f"10.77.{(node + 1) // 256}.{(node + 1) % 256}"

    def run(self, processes: Sequence[NodeProcess], environment: Mapping[str, str]) -> int:
        """Runs processes on their nodes until all have exited; the first failure stops the others.

        Returns: exit code of the first process that failed, or 0. A signal that asks for an end stops all processes.
        """
        before = install(_interrupt)
        try:
            for process in processes:
                inside = ["ip", "netns", "exec", self.namespace(process.node), *process.command]
                env = {**environment, **process.environment}
                self._processes.append(subprocess.Popen(inside, env=env, start_new_session=True))
            while True:
                codes = [process.poll() for process in self._processes]
                failed = next((code for code in codes if code), None)
                if failed or None not in codes:
                    return failed or 0
                time.sleep(0.05)
        finally:
            self._end()
            restore(before)

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for node in range(self.nodes):
            name, port = self.namespace(node), f"port{node}"
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "add", DEVICE, "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{self.address(node)}/16", "dev", DEVICE)
            _ip("-n", name, "link", "set", DEVICE, "up")
            _limit(name, DEVICE, self.rate, self.latency)
            _limit(self._switch, port, self.rate, None)

    def _end(self) -> None:
        """Stops everything still running on the nodes, including workers that left their launcher's session."""
        for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + seconds
            for pid in self._pids():
                _send(pid, number)
            while self._pids() and time.monotonic() < deadline:
                time.sleep(0.05)
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def _pids(self) -> list[int]:
        for process in self._processes:
            process.poll()
        there = set(_namespaces())
        names = [name for name in map(self.namespace, range(self.nodes)) if name in there]
        return [int(pid) for name in names for pid in _ip("netns", "pids", name).split()]


def require() -> None:
    """Raises UserError, listing everything that is missing, if this machine cannot emulate a cluster."""
    missing = []
    if not Path("/proc/sys/net").is_dir():
        missing.append("Linux")
    if os.geteuid() != 0:
        missing.append("root: run it as root, in a container with the capabilities NET_ADMIN and SYS_ADMIN")
    missing += [f"the command {name}: install iproute2" for name in ("ip", "tc") if shutil.which(name) is None]
    if not missing:
        missing = _kernel()
    if missing:
        raise UserError("this machine cannot emulate a cluster; missing are\n  " + "\n  ".join(missing))


def _kernel() -> list[str]:
    """Features that the kernel lacks, found by trying them."""
    name = f"{PREFIX}-{os.getpid()}-try"
    trials = {
        "network namespaces": ["ip", "netns", "add", name],
        "veth devices": ["ip", "-n", name, "link", "add", DEVICE, "type", "veth", "peer", "name", "port0"],
        "bridges": ["ip", "-n", name, "link", "add", "br0", "type", "bridge"],
        "the queueing discipline tbf": _tbf(name, DEVICE, "1mbit"),
    }
    try:
        for what, command in trials.items():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return [f"{what} in the kernel, or the right to use them: {done.stderr.strip()}"]
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return []


def _limit(namespace: str, device: str, rate: str | None, latency: str | None) -> None:
    parent = ["root"]
    if latency is not None:
        try:
            _run(
                [
                    "tc",
                    "-n",
                    namespace,
                    "qdisc",
                    "add",
                    "dev",
                    device,
                    "root",
                    "handle",
                    "1:",
                    "netem",
                    "delay",
                    latency,
                ]
            )
        except RunError as error:
            raise UserError(f"--latency needs the queueing discipline netem in the kernel: {error}") from error
        parent = ["parent", "1:"]
    if rate is not None:
        _run(_tbf(namespace, device, rate, parent))


def _tbf(namespace: str, device: str, rate: str, parent: Sequence[str] = ("root",)) -> list[str]:
    limits = ["rate", rate, "burst", str(BURST_BYTES), "latency", QUEUE]
    return [*_qdisc(namespace, device), *parent, "tbf", *limits]


def _qdisc(namespace: str, device: str) -> list[str]:
    return ["tc", "-n", namespace, "qdisc", "add", "dev", device]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def _left_by_the_dead() -> list[str]:
    """Namespaces left behind by processes that were killed before they could clean up."""
    return [name for name in _namespaces() if not Path(f"/proc/{name.split('-')[1]}").exists()]


def _delete(namespaces: Sequence[str]) -> None:
    for name in namespaces:
        for pid in _ip("netns", "pids", name).split():
            _send(int(pid), signal.SIGKILL)
        _ip("netns", "del", name)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
