"""`moeport generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a training run.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, help="Divides the logits; 0 always takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Sample from the K most likely tokens.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to use: latest, best or step-N.")
    ] = "latest",
) -> None:
    """Continue a text with a trained model."""
    from moeport.pages.console import printable
    from moeport.training.generate import generate as continue_text

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    text = continue_text(
        run_dir,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        checkpoint=checkpoint,
    )
    shown = printable(prompt + text) if sys.stdout.isatty() else prompt + text
    typer.echo(shown.encode())  # UTF-8 in any locale
