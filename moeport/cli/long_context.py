"""`moeport eval --needle` and `--by-position`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeport.cli.options import Flags, output_file

if TYPE_CHECKING:
    from moeport.studies.long_context.measure import LongContext as Measured
    from moeport.studies.long_context.measure import Wanted
    from moeport.training.trained import TrainedText
else:
    Measured = TrainedText = Wanted = object
TIMES = (1, 2, 4)
"""Default lengths, as multiples of that of the first model's training."""


@dataclass(frozen=True)
class LongContext:
    """What is measured on long texts."""

    needle: bool = False
    by_position: bool = False
    lengths: str | None = None
    depths: str = "0,0.25,0.5,0.75,1"
    forms: str = "single,multi_key,multi_value,variable_tracking"
    samples: int = 20
    needles: int = 4
    seed: int = 0
    html_file: Path | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether anything is."""
        return self.needle or self.by_position

    @property
    def changed(self) -> list[str]:
        """Names of the options that are not as by default, in their order."""
        default = LongContext()
        names = [each.name for each in fields(self) if getattr(self, each.name) != getattr(default, each.name)]
        return [f"--{name.removesuffix('_file').replace('_', '-')}" for name in names]


LongContextFlags = Annotated[
    LongContext,
    Flags(
        needle=typer.Option("--needle", help="Hide needles in the text and ask for them, in the forms of RULER."),
        by_position=typer.Option("--by-position", help="The loss by position, up to the greatest of the lengths."),
        lengths=typer.Option(
            "--lengths",
            metavar="N,...",
            help="Tokens of a prompt with its answer. Default: 1, 2 and 4 times data.sequence_length.",
            show_default=False,
        ),
        depths=typer.Option("--depths", metavar="X,...", help="Where a needle is: 0 at the start, 1 at the end."),
        forms=typer.Option("--forms", metavar="NAME,...", help="Kinds of questions."),
        samples=typer.Option(
            "--samples", min=1, help="Questions of each form and length at each depth, and sequences of --by-position."
        ),
        needles=typer.Option("--needles", min=2, help="Keys, values or chains of a question, and candidates."),
        seed=typer.Option("--seed", min=0, help="Seed of the questions."),
        html_file=output_file("--html", help="Write --needle and --by-position as one HTML page with charts."),
    ),
]
Open = Callable[[Path], AbstractContextManager[TrainedText]]
"""Opens a model for as long as a `with` lasts."""


def measure_all(
    places: Sequence[Path], texts: Sequence[str], given: LongContext, batch_size: int, open_: Open
) -> dict[str, Any]:
    """Measure models one after the other on the same text, and print and write what was found.

    Args:
        places: the models.
        texts: files of text; empty: the validation text of the first model's run.
        given: the options.
        batch_size: of the command.
        open_: opens a model.

    Returns: all figures, for JSON.
    """
    from moeport.cli.progress import FileProgress, counted
    from moeport.pages.console import wide_console
    from moeport.studies.long_context.measure import measure
    from moeport.studies.long_context.page import write_page
    from moeport.studies.long_context.table import explanations, tables
    from moeport.studies.long_context.text import files_text, held_out_text

    console, names = wide_console(), _names(places)
    found: list[Measured] = []
    with FileProgress() as progress:
        for name, place in zip(names, places, strict=True):

            def show(done: int, total: int, name: str = name) -> None:
                progress.show(counted(done, total, f"questions and sequences, {name}"), done, total)

            with open_(place) as trained:
                if not found:
                    wanted = _wanted(given, trained, batch_size)
                    text = files_text(texts) if texts else held_out_text(trained.config.data, console.print)
                found.append(measure(trained, name, text, wanted, show))
    for table in tables(found, wanted.options):
        console.print(table.drawn())
    for line in (*explanations(found, wanted.options), *text.left_out):
        console.print(line, soft_wrap=True)
    if given.html_file is not None:
        write_page(given.html_file, found, wanted.options, text)
        console.print(f"page: {given.html_file}", soft_wrap=True)
    options = {**vars(wanted.options), "chance": wanted.options.chance}
    return {"options": options, "text": text.origin, "models": [each.as_json() for each in found]}


def _wanted(given: LongContext, trained: TrainedText, batch_size: int) -> Wanted:
    """The options, of which the lengths may be those of a model."""
    from moeport.studies.long_context.measure import Wanted
    from moeport.studies.long_context.needles import Options

    lengths = _numbers("--lengths", given.lengths, int) if given.lengths else [trained.context * n for n in TIMES]
    depths = _numbers("--depths", given.depths, float)
    forms = tuple(dict.fromkeys(name for name in given.forms.split(",") if name))
    options = Options(tuple(lengths), tuple(depths), forms, given.samples, given.needles, given.seed)
    options.check()
    return Wanted(options, given.needle, given.by_position, batch_size)


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers separated by commas, each once, ascending."""
    from moeport.errors import UserError

    try:
        return sorted({kind(part) for part in text.split(",")})
    except ValueError as error:
        example = "512,1024" if kind is int else "0,0.5,1"
        raise UserError(f"{option} {text}: not a list of numbers; expected such as {option} {example}") from error


def _names(places: Sequence[Path]) -> list[str]:
    """What models are called: the last part of their paths where these differ, else the paths."""
    from moeport.errors import UserError

    if repeated := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{repeated[0]}: is named more than once; expected each model once")
    names = [place.resolve().name for place in places]
    return names if len({*names}) == len(names) else [str(place) for place in places]
