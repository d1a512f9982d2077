"""`moeport train`."""

from typing import Annotated

import typer

from moeport.cli.options import ConfigFile, Overrides, Resume


def train(
    file: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Profile some steps: traces, and tables by kind of work (metrics.profile)."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and summarise the run without training.")] = False,
) -> None:
    """Train a model, on all ranks of the job if a launcher (torchrun, srun, mpirun, msrun) started it."""
    from moeport.comm.excuse import excused
    from moeport.config import load_config
    from moeport.pages.console import PlainConsole
    from moeport.training.run import train as run_training

    console = PlainConsole(highlight=True)
    with excused():
        config = load_config(file, [*(overrides or ()), *(["metrics.profile=true"] if profile else [])])
    outcome = run_training(config, resume=resume, dry_run=dry_run, console=console)
    if outcome is not None:
        console.print(outcome)
