"""`moeport compare`."""

from pathlib import Path
from typing import Annotated

import typer

from moeport.cli.options import Overrides


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML configs.", show_default=False)],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", metavar="DIR", help="Where the run folders and compare.html go.")
    ] = Path("runs/compare"),
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option("--steps", help="The same as --set training.steps=STEPS.")] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="N,N...", help="Train each config with each seed. Default: with its own."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="NAME", help="The config the others are held against. Default: topk, else the first."
        ),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            "--ranks",
            min=1,
            help="N of the all-to-all, whose bytes a token are computed, not measured: rows a token x (1 - 1/N) x "
            "d_model x bytes of the compute type x 2 (there and back) x 2 (forward and backward), if experts and "
            "tokens are spread evenly over N ranks.",
        ),
    ] = 8,
    allowed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-different", metavar="KEY", help="Let a key or section other than model.moe differ. Repeatable."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the table as Markdown.")
    ] = None,
) -> None:
    """Train configs that differ in model.moe from the same initial weights on the same data, and compare them.

    Each config becomes a run of its own in DIR/NAME. Repeat the command after an interruption: finished runs are read,
    not trained again, and an unfinished one goes on from its last checkpoint.
    """
    import json

    from rich.console import Console

    from moeport.studies.compare.compare import compare as run_comparison
    from moeport.studies.compare.page import write_page
    from moeport.studies.compare.plan import plan
    from moeport.studies.compare.table import markdown, terminal, to_json

    console = Console()
    given = [*(overrides or ()), *([] if steps is None else [f"training.steps={steps}"])]
    planned = plan(files, output_dir, given, seeds=_numbers(seeds), baseline=baseline, allowed=allowed or ())
    comparison = run_comparison(planned, ranks=ranks, console=console)
    console.print(terminal(comparison), crop=False)
    written = {
        json_file: lambda: json.dumps(to_json(comparison), indent=2) + "\n",
        markdown_file: lambda: markdown(comparison),
    }
    for path, text in written.items():
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(), encoding="utf-8")
    console.print(f"page: {write_page(comparison, output_dir)}", highlight=False, markup=False, soft_wrap=True)
    comparison.raise_for_problems()


def _numbers(text: str | None) -> list[int]:
    from moeport.errors import UserError

    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise UserError(f"--seeds {text}: not a list of seeds; expected whole numbers from 0, as in --seeds 0,1,2")
    return numbers
