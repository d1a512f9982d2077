"""`moeport emulate`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeport.facts import BACKENDS, Launcher

LAUNCHERS = ", ".join(f"{facts.launcher} for the backend {name}" for name, facts in BACKENDS.items() if facts.launcher)


def emulate(
    command: Annotated[
        list[str], typer.Argument(help="A moeport command and its options, after `--`.", show_default=False)
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes per node.")] = 2,
    inter: Annotated[
        str | None, typer.Option(help="Rate of each node's link, such as 200mbit; default: unlimited.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="Latency added between nodes, such as 200us; needs netem in the kernel.")
    ] = None,
    launcher: Annotated[Launcher, typer.Option(help=f"{LAUNCHERS}.")] = "torchrun",
) -> None:
    """Run a moeport command on a cluster emulated on this machine.

    Each node is a Linux network namespace; ranks of different nodes communicate over a rate-limited link. Needs root.
    Example: moeport emulate --nodes 2 --ranks-per-node 2 --inter 200mbit -- probe
    """
    import os

    from moeport.launch.emulation import DEVICE, EMULATED, EmulatedCluster
    from moeport.launch.launcher import node_processes
    from moeport.stopping import handled

    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MS_ROLE")}
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    environment = quiet | environment | {"GLOO_SOCKET_IFNAME": DEVICE, EMULATED: "1"}
    with handled(), EmulatedCluster(nodes, inter, latency) as cluster:
        processes = node_processes(launcher, nodes, ranks_per_node, cluster.address(0), command)
        code = cluster.run(processes, environment)
    raise typer.Exit(code)
