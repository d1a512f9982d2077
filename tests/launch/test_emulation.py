"""`moeport emulate`: namespaces and links that come, carry a job, and go."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moeport.errors import UserError
from moeport.launch import emulation
from moeport.launch.emulation import EmulatedCluster, require
from moeport.launch.launcher import node_processes
from tests.comm.jobs import ROOT

try:
    require()
    MISSING = ""
except UserError as error:
    MISSING = str(error)

emulates = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def moeport(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "moeport", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def namespaces_of(pid):
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in names if name.startswith(f"moeport-{pid}-")]


def inside(cluster, node, *command):
    done = subprocess.run(
        ["ip", "netns", "exec", cluster.namespace(node), *command], capture_output=True, text=True, check=True
    )
    return done.stdout


@emulates
def test_nodes_reach_each_other_over_limited_links():
    with EmulatedCluster(3, "200mbit") as cluster:
        for node in range(3):
            assert f"inet {cluster.address(node)}/16" in inside(cluster, node, "ip", "addr", "show", "eth0")
            assert "qdisc tbf" in inside(cluster, node, "tc", "qdisc", "show", "dev", "eth0")
            assert "rate 200Mbit" in inside(cluster, node, "tc", "qdisc", "show", "dev", "eth0")
        serve = "import socket; s = socket.create_server(('', 5000)); s.accept()[0].sendall(b'here')"
        server = subprocess.Popen(["ip", "netns", "exec", cluster.namespace(0), sys.executable, "-c", serve])
        ask = f"""
import socket, time
while True:
    try:
        print(socket.create_connection(({cluster.address(0)!r}, 5000), 5).recv(4).decode())
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
"""
        assert inside(cluster, 2, sys.executable, "-c", ask) == "here\n"
        server.wait(10)
    assert namespaces_of(os.getpid()) == []


@emulates
def test_a_job_knows_its_nodes():
    process = moeport("emulate", "--nodes", "2", "--ranks-per-node", "2", "--inter", "500mbit", "--", "probe")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "4 ranks on 2 nodes" in out
    assert "every value is right" in out
    assert namespaces_of(process.pid) == []


@emulates
def test_the_exit_code_is_that_of_the_command():
    process = moeport("emulate", "--nodes", "2", "--ranks-per-node", "1", "--", "probe", "--backend", "nothing")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "nothing" in out
    assert namespaces_of(process.pid) == []


SLEEP = "import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(600)"


@emulates
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_nothing(number):
    script = f"""
from moeport.launch.emulation import EmulatedCluster
from moeport.launch.launcher import NodeProcess
import os, sys
with EmulatedCluster(2, None) as cluster:
    sleep = [sys.executable, "-c", {SLEEP!r}]
    cluster.run([NodeProcess(node, sleep, {{}}) for node in range(2)], os.environ)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(process.stdout.readline()) for _ in range(2)]
    finally:
        process.send_signal(number)
        code = process.wait(60)
        process.stdout.close()
    assert code != 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert namespaces_of(process.pid) == []


@emulates
def test_what_a_killed_job_leaves_goes_with_the_next():
    script = f"""
from moeport.launch.emulation import EmulatedCluster
import os, subprocess, sys, time
cluster = EmulatedCluster(1, None).__enter__()
subprocess.Popen(["ip", "netns", "exec", cluster.namespace(0), sys.executable, "-c", {SLEEP!r}])
time.sleep(600)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(namespaces_of(process.pid)) == 2
    with EmulatedCluster(1, None):
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{pid}")
        assert namespaces_of(process.pid) == []


@emulates
def test_latency_needs_netem():
    """Where the kernel has it, packets are delayed; where not, the message says so and nothing is left."""
    with EmulatedCluster(1, None) as cluster:
        add = ["tc", "-n", cluster.namespace(0), "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
        has_netem = subprocess.run(add, capture_output=True, check=False).returncode == 0
    if has_netem:
        with EmulatedCluster(1, "1gbit", "200us") as cluster:
            assert "delay 200us" in inside(cluster, 0, "tc", "qdisc", "show", "dev", "eth0")
    else:
        with (
            pytest.raises(UserError, match=r"^--latency needs the queueing discipline netem in the kernel: tc "),
            EmulatedCluster(1, "1gbit", "200us"),
        ):
            pass
    assert namespaces_of(os.getpid()) == []


@pytest.mark.parametrize("rate", ["fast", "0mbit", "200", "200 mbit", "-1gbit"])
def test_a_rate_that_is_none(rate):
    with pytest.raises(UserError, match="expected a number of bits per second such as 200mbit or 1gbit"):
        EmulatedCluster(2, rate)


def test_what_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.setattr(emulation.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as error:
        require()
    assert str(error.value) == (
        "this machine cannot emulate a cluster; missing are\n"
        "  root: run it as root, in a container with the capabilities NET_ADMIN and SYS_ADMIN\n"
        "  the command ip: install iproute2\n"
        "  the command tc: install iproute2"
    )


def test_ranks_are_numbered_node_after_node():
    processes = node_processes("torchrun", 2, 2, "10.77.0.1", ["train", "c.yaml"])
    keys = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    assert [(process.node, *(process.environment[key] for key in keys)) for process in processes] == [
        (0, "0", "0", "0", "4", "2"),
        (0, "1", "1", "0", "4", "2"),
        (1, "2", "0", "1", "4", "2"),
        (1, "3", "1", "1", "4", "2"),
    ]
    assert all(process.command[1:] == ["-m", "moeport", "train", "c.yaml"] for process in processes)
