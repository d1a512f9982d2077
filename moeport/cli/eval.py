"""`moeport eval`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeport.cli.long_context import LongContext, LongContextFlags
from moeport.cli.options import Flags, grouped, output_file
from moeport.facts import BACKENDS

if TYPE_CHECKING:
    from moeport.training.evaluate_texts import TextLosses


@dataclass(frozen=True)
class Windows:
    """How texts are cut."""

    context: int | None = None
    stride: int | None = None

    @property
    def by_option(self) -> dict[str, int | None]:
        """What was given, by the name of its option."""
        return {"--context": self.context, "--stride": self.stride}


WindowFlags = Annotated[
    Windows,
    Flags(
        context=typer.Option(
            "--context",
            min=1,
            help="Maximum number of tokens that the model sees at once. Default: data.sequence_length.",
        ),
        stride=typer.Option("--stride", min=1, help="Tokens between the starts of windows. Default: the context."),
    ),
]
Places = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN|HF_FOLDER",
        help="A run, or a folder of the Hugging Face hub; several with --needle or --by-position.",
        show_default=False,
    ),
]
EvaluatedTexts = Annotated[
    list[str],
    typer.Option(
        metavar="FILES",
        help="File, folder or glob of texts. Repeatable. Default with --needle and --by-position: the validation text "
        "of the first run.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str], typer.Option(metavar="NAME,...", help="Tasks of lm-evaluation-harness. Repeatable.", show_default=False)
]
Checkpoint = Annotated[
    str, typer.Option(metavar="latest|best|step-N", help="Checkpoint to use: latest, best or step-N.")
]
HubTokenizer = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A tokenizer.json, if HF_FOLDER has none; for texts.", show_default=False),
]


@grouped
def eval(  # noqa: A001
    places: Places,
    text: EvaluatedTexts = [],  # noqa: B006
    tasks: Tasks = [],  # noqa: B006
    checkpoint: Checkpoint = "latest",
    *,
    windows: WindowFlags,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows, or continuations of prompts, at once.")] = 8,
    backend: Annotated[
        str | None, typer.Option(help=f"{', '.join(BACKENDS)}; for texts. Default: the run's.", show_default=False)
    ] = None,
    tokenizer: HubTokenizer = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of YAML files with more tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task. Default: all.")] = None,
    json_file: Annotated[Path | None, output_file("--json", help="Write all figures as JSON.")] = None,
    long_context: LongContextFlags,
) -> None:
    """Measure a model on texts (loss, bits per byte, perplexity), on tasks, or on long texts.

    Long texts are those of --needle and --by-position, also beyond the length that the model was trained on.
    """
    from functools import partial

    from moeport.cli.long_context import measure_all
    from moeport.convert.evaluation import TaskOptions, evaluate, evaluate_tasks, is_of_hub, opened
    from moeport.errors import UserError
    from moeport.files import write_json

    if backend is not None and backend not in BACKENDS:
        raise UserError(f"--backend {backend}: is not a backend; expected one of {', '.join(BACKENDS)}")
    others = {"--tasks": tasks, "--tasks-path": tasks_path, "--limit": limit, **windows.by_option}
    _check(long_context, len(places), [name for name, value in others.items() if value], bool(text or tasks))
    if long_context.is_wanted:
        if not text and is_of_hub(places[0]):
            raise UserError(f"there is no validation text: {places[0]} is not a run; expected --text FILES")
        open_ = partial(opened, checkpoint=checkpoint, backend=backend, tokenizer=tokenizer)
        measured = measure_all(places, text, long_context, batch_size, open_)
        if json_file is not None:
            write_json(json_file, measured)
        return
    place = places[0]
    found: dict[str, Any] = {"model": str(place)}
    if text:
        sizes: dict[str, Any] = {**vars(windows), "batch_size": batch_size}
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


def _check(wanted: LongContext, places: int, others: list[str], has_texts: bool) -> None:
    """Refuse options that do not go together.

    Args:
        wanted: what is measured on long texts.
        places: number of models.
        others: options that were given and are for other measurements.
        has_texts: whether there are texts or tasks.
    """
    from moeport.errors import UserError

    if wanted.is_wanted:
        if others:
            raise UserError(
                f"{others[0]}: does not go with --needle and --by-position, whose lengths are --lengths; leave it out, "
                "or evaluate in a command of its own"
            )
        return
    if places > 1:
        raise UserError(f"{places} models: --text and --tasks measure one at a time; expected one RUN or HF_FOLDER")
    if wanted.changed:
        raise UserError(f"{wanted.changed[0]}: is an option of --needle and --by-position; expected one of them too")
    if not has_texts:
        raise UserError(
            "there is nothing to evaluate on; expected --text FILES, --tasks NAMES, --needle or --by-position"
        )


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
