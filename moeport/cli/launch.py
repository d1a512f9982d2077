"""`moeport launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moeport.cli.options import ConfigFile, Overrides


def launch(
    file: ConfigFile,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each node.", show_default=False)],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This node alone, from 0; default: all.", show_default=False)
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Host name or address of node 0, if there are several.", show_default=False)
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(help="A free port of node 0; default: 29500 for torchrun, 8118 for msrun.", show_default=False),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often torchrun goes on from the last checkpoint after a failure.")
    ] = 0,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")] = False,
    run: Annotated[bool, typer.Option("--run", help="Start it here instead of printing it.")] = False,
    slurm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a script for sbatch instead.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="For the script: GPUs of each node.", show_default=False)
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="For the script: time limit, such as 02:00:00.", show_default=False)
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="For the script: Slurm's partition.", show_default=False)
    ] = None,
) -> None:
    """Print the command of each node that trains CONFIG on several ranks: torchrun for torch, msrun for mindspore.

    The sizes of the config are held against the number of ranks first.
    Example: moeport launch CONFIG --nodes 2 --ranks-per-node 8 --master-addr node-0
    """
    import shlex

    from moeport.config import load_config
    from moeport.errors import UserError
    from moeport.launch.commands import Job
    from moeport.launch.commands import run as start
    from moeport.training.ranks import check_ranks

    config = load_config(file, overrides or ())
    check_ranks(config, nodes * ranks_per_node)
    name = config.backend.name
    if name == "numpy":
        raise UserError("backend.name: numpy cannot train; set backend.name to torch or mindspore")
    if max_restarts and name == "mindspore":
        raise UserError(
            f"--max-restarts {max_restarts}: msrun, which starts mindspore, does not restart; leave it out, and start "
            "the job again with --resume after a failure"
        )
    if max_restarts and not config.checkpoint.interval:
        raise UserError(
            f"--max-restarts {max_restarts}: checkpoint.interval is 0, so there is no checkpoint to go on from; "
            "set it, as in --set checkpoint.interval=100"
        )
    if slurm and run:
        raise UserError("--slurm writes a script and --run starts the job here; use one of them")
    if node_rank is not None and node_rank >= nodes:
        raise UserError(f"--node-rank {node_rank}: expected 0 to {nodes - 1}, since --nodes is {nodes}")
    if run and nodes > 1 and node_rank is None:
        raise UserError(f"--node-rank is missing: --run starts one of the {nodes} nodes; expected 0 to {nodes - 1}")
    if nodes > 1 and not master_addr and not slurm:
        raise UserError(f"--master-addr is missing: {nodes} nodes meet at node 0; expected its host name or address")

    train = ["train", str(file)]
    for override in overrides or ():
        train += ["--set", override]
    if resume or max_restarts:
        train.append("--resume")
    launcher: Literal["torchrun", "msrun"] = "msrun" if name == "mindspore" else "torchrun"
    job = Job(launcher, nodes, ranks_per_node, tuple(train), max_restarts)
    if slurm:
        asked = {"gpus-per-node": gpus_per_node, "time": time, "partition": partition}
        try:
            with slurm.open("x") as script:
                script.write(job.slurm_script({key: str(value) for key, value in asked.items() if value is not None}))
        except OSError as error:
            raise UserError(f"--slurm {slurm}: cannot write it: {error.strerror}; name a new file") from error
        typer.echo(f"wrote {slurm}; adapt it, then: sbatch {shlex.quote(str(slurm))}")
        return
    for node in range(nodes) if node_rank is None else [node_rank]:
        command = job.command(node, master_addr or "127.0.0.1", master_port)
        if run:
            raise typer.Exit(start(command))
        if nodes > 1:
            typer.echo(f"# node {node}")
        typer.echo(shlex.join(command))
