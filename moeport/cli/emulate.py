"""`moeport emulate`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def emulate(
    command: Annotated[
        list[str], typer.Argument(help="A moeport command and its options, after `--`.", show_default=False)
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each node.")] = 2,
    inter: Annotated[
        str | None, typer.Option(help="Rate of each node's link, such as 200mbit; default: not limited.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="Added on the way between nodes, such as 200us; needs netem in the kernel.")
    ] = None,
    launcher: Annotated[
        Literal["torchrun", "msrun"], typer.Option(help="torchrun for the backend torch, msrun for mindspore.")
    ] = "torchrun",
) -> None:
    """Run a moeport command on a cluster emulated on this machine.

    Each node is a network namespace of Linux; ranks of different nodes talk over a link of limited rate. Needs root.
    Example: moeport emulate --nodes 2 --ranks-per-node 2 --inter 200mbit -- probe
    """
    import os

    from moeport.launch.emulation import DEVICE, EMULATED, EmulatedCluster
    from moeport.launch.launcher import node_processes

    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MS_ROLE")}
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    environment = quiet | environment | {"GLOO_SOCKET_IFNAME": DEVICE, EMULATED: "1"}
    with EmulatedCluster(nodes, inter, latency) as cluster:
        processes = node_processes(launcher, nodes, ranks_per_node, cluster.address(0), command)
        code = cluster.run(processes, environment)
    raise typer.Exit(code)
