"""`moeport checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="checkpoint", help="List the checkpoints of a run, or verify them.", no_args_is_help=True)
Where = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR|CHECKPOINT", help="A run folder, or one step-* folder in it.", show_default=False),
]


@app.command("list")
def list_(path: Where) -> None:
    """List checkpoints: step, tokens, validation loss, number of arrays, bytes, number of ranks that wrote it.

    Example: moeport checkpoint list runs/own
    """
    from moeport.training.checkpoint_survey import checkpoints_in, row_of

    for checkpoint in checkpoints_in(path):
        typer.echo(row_of(checkpoint))


@app.command("verify")
def verify(path: Where) -> None:
    """Read every byte of checkpoints, and compare the checksums of blocks and files.

    Exit code 2 if any is damaged; the message names the array and the expert, or the file.

    Example: moeport checkpoint verify runs/own
    """
    from moeport.training.checkpoint_survey import checkpoints_in, damage

    errors = {checkpoint: damage(checkpoint) for checkpoint in checkpoints_in(path)}
    for checkpoint, error in errors.items():
        typer.echo(f"{checkpoint.name}  {'damaged' if error else 'good'}")
    for error in filter(None, errors.values()):
        raise error
