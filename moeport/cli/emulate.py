"""`moeport emulate`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeport.facts import BACKENDS, Launcher

LAUNCHERS = ", ".join(f"{facts.launcher} for the backend {name}" for name, facts in BACKENDS.items() if facts.launcher)

STARTERS = ("emulate", "launch")
"""Commands that start ranks themselves."""


def emulate(
    command: Annotated[
        list[str], typer.Argument(help="A moeport command and its options, after `--`.", show_default=False)
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks per node.")] = 2,
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

    check_command(command)
    check_framework(launcher)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MS_ROLE")}
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    environment = quiet | environment | {"GLOO_SOCKET_IFNAME": DEVICE, EMULATED: "1"}
    with handled(), EmulatedCluster(nodes, inter, latency) as cluster:
        processes = node_processes(launcher, nodes, ranks_per_node, cluster.address(0), command)
        code = cluster.run(processes, environment)
    raise typer.Exit(code)


def check_command(command: list[str]) -> None:
    """Refuse a command that the ranks would refuse for its usage, before they are started.

    Raises UserError for a command that is not there or that starts ranks itself; usage errors are those of the command.
    """
    from moeport.cli.main import whole_command
    from moeport.errors import UserError

    found, rest = whole_command(), [word for word in command if word != "--debug"]
    context = found.context_class(found, info_name="moeport", **found.context_settings)
    while there := getattr(found, "commands", None):
        if not rest or rest[0] not in there or rest[0] in STARTERS:
            expected = ", ".join(name for name in there if name not in STARTERS)
            raise UserError(f"{' '.join(rest[:1]) or 'nothing'!r} is not a command to emulate; expected {expected}")
        found, name, rest = there[rest[0]], rest[0], rest[1:]
        parent, context = context, found.context_class(found, info_name=name, parent=context)
    found.make_context(name, rest, parent=parent)


def check_framework(launcher: str) -> None:
    """Raises UserError, with the command that installs it, if the framework of a launcher is missing."""
    from importlib.util import find_spec

    from moeport.errors import UserError

    facts = next(facts for facts in BACKENDS.values() if facts.launcher == launcher)
    if find_spec(facts.framework) is None:
        raise UserError(
            f"--launcher {launcher}: needs {facts.framework}, which is not installed; install it with: {facts.install}"
        )
