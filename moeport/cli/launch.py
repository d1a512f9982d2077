"""`moeport launch`."""

from __future__ import annotations

from typing import Annotated

import typer

from moeport.cli.options import Flags, Overrides, Resume, SharedConfigFile, grouped, output_file
from moeport.launch.commands import PORTS
from moeport.launch.training import Nodes, Script, TrainingJob

_PORTS = ", ".join(f"{port} for {launcher}" for launcher, port in PORTS.items())

NodeFlags = Annotated[
    Nodes,
    Flags(
        ranks_per_node=typer.Option(min=1, help="Ranks per node.", show_default=False),
        nodes=typer.Option(min=1, help="Number of nodes."),
        node_rank=typer.Option(min=0, help="Only this node, counted from 0; default: all.", show_default=False),
        master_addr=typer.Option(help="Host name or address of node 0; needed for several nodes.", show_default=False),
        master_port=typer.Option(
            min=1, max=65535, help=f"A free port on node 0; default: {_PORTS}.", show_default=False
        ),
        max_restarts=typer.Option(
            min=0, help="How often torchrun restarts the job from the last checkpoint after a failure."
        ),
    ),
]
ScriptFlags = Annotated[
    Script,
    Flags(
        slurm=output_file("--slurm", help="Write a script for sbatch instead of printing commands."),
        gpus_per_node=typer.Option(min=1, help="For the script: GPUs, or NPUs, per node.", show_default=False),
        time=typer.Option(help="For the script: time limit, such as 02:00:00.", show_default=False),
        partition=typer.Option(help="For the script: Slurm's partition.", show_default=False),
        cpus_per_rank=typer.Option(
            min=1, help="For the script: cores per rank; default: all cores of the nodes.", show_default=False
        ),
    ),
]


@grouped
def launch(
    file: SharedConfigFile,
    nodes: NodeFlags,
    overrides: Overrides = None,
    resume: Resume = False,
    run: Annotated[bool, typer.Option("--run", help="Start the command here instead of printing it.")] = False,
    *,
    script: ScriptFlags,
) -> None:
    """Print the command that each node runs to train CONFIG on several ranks, with the launcher of its backend.

    The sizes in the config are first checked against the number of ranks.
    Example: moeport launch configs/quickstart.yaml --set training.batch_size=16 --nodes 2 --ranks-per-node 8
    --master-addr node-0
    """
    from moeport.config import load_config
    from moeport.training.ranks import check_ranks, check_trains, npu_needs

    config = load_config(file, overrides or ())
    check_trains(config)
    check_ranks(config, nodes.ranks)
    job = TrainingJob(file, nodes, overrides or (), resume, run, script)
    needs = npu_needs(config, nodes.ranks)
    code = job.launch(config.backend.name, config.checkpoint.interval, typer.echo, needs)
    if run or code:
        raise typer.Exit(code)
