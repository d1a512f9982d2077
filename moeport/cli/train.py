"""`moeport train`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moeport.cli.options import ConfigFile, Overrides, Resume


def train(
    file: ConfigFile,
    overrides: Overrides = None,
    resume: Resume = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN_OR_CHECKPOINT",
            help="Start a new run from the weights of a run or a checkpoint (training.start_from).",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Profile some steps: traces, and tables by kind of work (metrics.profile)."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the run, measure two steps and show a summary, without training.")
    ] = False,
) -> None:
    """Train a model, on all ranks of the job if a launcher (torchrun, srun, mpirun, msrun) started it."""
    from moeport.comm.excuse import excused
    from moeport.config import load_config
    from moeport.pages.console import PlainConsole
    from moeport.training.run import train as run_training

    console = PlainConsole(highlight=True)
    with excused():
        given = [*(overrides or ()), *(["metrics.profile=true"] if profile else [])]
        given += [] if start is None else [f"training.start_from={json.dumps(str(start), ensure_ascii=False)}"]
        config = load_config(file, given)
    outcome = run_training(config, resume=resume, dry_run=dry_run, console=console)
    if outcome is not None:
        console.print(outcome)
