"""`moeport eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeport.cli.options import output_file
from moeport.facts import BACKENDS

if TYPE_CHECKING:
    from moeport.training.evaluate_texts import TextLosses


def eval(  # noqa: A001
    place: Annotated[
        Path,
        typer.Argument(metavar="RUN|HF_FOLDER", help="A run, or a folder of the Hugging Face hub.", show_default=False),
    ],
    text: Annotated[
        list[str], typer.Option(metavar="FILES", help="File, folder or glob of texts. Repeatable.", show_default=False)
    ] = [],  # noqa: B006
    tasks: Annotated[
        list[str],
        typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness. Repeatable.", show_default=False),
    ] = [],  # noqa: B006
    checkpoint: Annotated[
        str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to use: latest, best or step-N.")
    ] = "latest",
    context: Annotated[
        int | None, typer.Option(min=1, help="Most tokens the model sees at once. Default: data.sequence_length.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between the starts of windows. Default: the context.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or questions, at once.")] = 8,
    backend: Annotated[
        str | None, typer.Option(help=f"{', '.join(BACKENDS)}; for texts. Default: the run's.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A tokenizer.json, if HF_FOLDER has none; for texts.", show_default=False),
    ] = None,
    tasks_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="YAML files of further tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. Default: all.")] = None,
    json_file: Annotated[Path | None, output_file("--json", help="Write all figures as JSON.")] = None,
) -> None:
    """Measure a model on texts (loss, bits per byte, perplexity) or on tasks."""
    from moeport.convert.evaluation import TaskOptions, evaluate, evaluate_tasks
    from moeport.errors import UserError
    from moeport.files import write_json

    if not text and not tasks:
        raise UserError("there is nothing to evaluate on; expected --text FILES or --tasks NAMES")
    if backend is not None and backend not in BACKENDS:
        raise UserError(f"--backend {backend}: is not a backend; expected one of {', '.join(BACKENDS)}")
    found: dict[str, Any] = {"model": str(place)}
    if text:
        sizes: dict[str, Any] = {"context": context, "stride": stride, "batch_size": batch_size}
        losses = evaluate(place, text, checkpoint=checkpoint, backend=backend, tokenizer=tokenizer, **sizes)
        _print_losses(losses)
        found |= losses.as_json()
    if tasks:
        names = [name for each in tasks for name in each.split(",") if name]
        options = TaskOptions(tasks_path, limit=limit, batch_size=batch_size)
        found["tasks"] = evaluate_tasks(place, names, checkpoint=checkpoint, options=options)
        _print_tasks(found["tasks"])
    if json_file is not None:
        write_json(json_file, found)


def _print_losses(found: "TextLosses") -> None:
    """A table with a row for each file."""
    from rich.table import Table

    from moeport.pages.console import wide_console

    table = Table("text", *("tokens", "bytes", "loss", "bits per byte", "perplexity"), box=None)
    rows = [*found.files.items(), *([("total", found.total)] if len(found.files) > 1 else [])]
    for name, each in rows:
        figures = f"{each.loss:.4f}", f"{each.bits_per_byte:.4f}", f"{each.perplexity:.4g}"
        table.add_row(name, f"{each.tokens:,}", f"{each.num_bytes:,}", *figures)
    console = wide_console()
    console.print(table)
    for line in found.left_out:
        console.print(line, soft_wrap=True)


def _print_tasks(results: dict[str, dict[str, Any]]) -> None:
    from moeport.pages.console import wide_console

    console = wide_console()
    for name, values in results.items():
        shown = [f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)]
        console.print(f"{name}: {', '.join(shown)}", soft_wrap=True)
