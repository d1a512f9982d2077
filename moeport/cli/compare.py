"""`moeport compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moeport.cli.options import Flags, Overrides, check_plot, grouped, output_file, output_folder

if TYPE_CHECKING:
    from moeport.studies.compare.outcome import Comparison
else:
    Comparison = object
ChosenOn = Literal["first", "all"]
ConfigFiles = Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML configs.", show_default=False)]
OutputDir = Annotated[Path, output_folder("--output-dir", help="Folder for the run folders and compare.html.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Short for --set training.steps=N.")]
Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="NAME",
        help="The config that the others are compared with. Default: topk, or else the first.",
    ),
]
Ranks = Annotated[
    int,
    typer.Option(
        "--ranks",
        min=1,
        help="Number of ranks N for the bytes per token of the all-to-all, which are computed, not measured: rows per "
        "token x (1 - 1/N) x d_model x bytes of the compute type x 2 (there and back) x 2 (forward and backward), if "
        "experts and tokens are spread evenly over N ranks.",
    ),
]
Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-different", metavar="KEY", help="Allow a key or section other than model.moe to differ. Repeatable."
    ),
]


@dataclass(frozen=True)
class Trials:
    """What each config is trained with."""

    seeds: str | None = None
    sweep: list[str] | None = None
    chosen_on: ChosenOn = "first"


@dataclass(frozen=True)
class Files:
    """What is written besides the run folders and the page."""

    json_file: Path | None = None
    markdown_file: Path | None = None
    csv_file: Path | None = None
    plot_file: Path | None = None


@dataclass(frozen=True)
class Job:
    """Where each run is trained."""

    nodes: int = 1
    ranks_per_node: int = 1
    inter: str | None = None


TrialFlags = Annotated[
    Trials,
    Flags(
        seeds=typer.Option(
            "--seeds", metavar="N,N...", help="Train each config with each of these seeds. Default: its own seed."
        ),
        sweep=typer.Option(
            "--sweep",
            metavar="KEY=V,V...",
            help="Train each config with each of these values and keep its best, as in "
            "optimizer.learning_rate=1e-3,2e-3,4e-3; NAME:KEY=V,V... for one config. Repeatable.",
        ),
        chosen_on=typer.Option(
            "--chosen-on",
            help="first: the best value has the lowest validation loss on the first seed, and only it is trained with "
            "the others. all: the lowest mean over all seeds, and every value is trained with each.",
        ),
    ),
]
JobFlags = Annotated[
    Job,
    Flags(
        nodes=typer.Option(
            "--nodes", min=1, help="Train each run on this many nodes, emulated on this machine, which needs root."
        ),
        ranks_per_node=typer.Option("--ranks-per-node", min=1, help="Train each run on this many ranks per node."),
        inter=typer.Option(
            "--inter",
            help="Rate of each emulated node's link, such as 200mbit; default: unlimited.",
            show_default=False,
        ),
    ),
]
FileFlags = Annotated[
    Files,
    Flags(
        json_file=output_file("--json", help="Write the figures as JSON."),
        markdown_file=output_file("--markdown", help="Write the table as Markdown."),
        csv_file=output_file("--csv", help="Write the figures of each run as CSV."),
        plot_file=output_file(
            "--plot",
            help="Plot the loss over rows, FLOPs and time as .png, .svg or .pdf; needs matplotlib.",
            check=check_plot,
        ),
    ),
]


@grouped
def compare(
    files: ConfigFiles,
    output_dir: OutputDir = Path("runs/compare"),
    overrides: Overrides = None,
    steps: Steps = None,
    *,
    trials: TrialFlags,
    baseline: Baseline = None,
    ranks: Ranks = 8,
    allowed: Allowed = None,
    job: JobFlags,
    out: FileFlags,
) -> None:
    """Train configs that differ in model.moe from the same initial weights on the same data, and compare them.

    Each config becomes a run in DIR/NAME. After an interruption, even by a kill, repeat the command: finished runs are
    read, not trained again, and an unfinished one continues from its last checkpoint.
    """
    from moeport.files import check_output
    from moeport.pages.console import PlainConsole
    from moeport.studies.compare.compare import compare as run_comparison
    from moeport.studies.compare.compare import train_here
    from moeport.studies.compare.on_ranks import Ranks as OnRanks
    from moeport.studies.compare.page import PAGE_FILE, write_page
    from moeport.studies.compare.plan import plan
    from moeport.studies.compare.table import terminal

    check_output(output_dir / PAGE_FILE)
    console = PlainConsole(highlight=True)
    given = [*(overrides or ()), *([] if steps is None else [f"training.steps={steps}"])]
    planned = plan(
        files,
        output_dir,
        given,
        seeds=_numbers(trials.seeds),
        sweeps=trials.sweep or (),
        chosen_on=trials.chosen_on,
        baseline=baseline,
        allowed=allowed or (),
    )
    is_here = job == Job()
    comparison = run_comparison(
        planned,
        ranks=ranks,
        console=console,
        train_run=train_here if is_here else OnRanks(job.nodes, job.ranks_per_node, job.inter),
        after_each=lambda found: write_page(found, output_dir),
    )
    console.print(terminal(comparison), crop=False)
    _write(comparison, out)
    console.print(f"page: {write_page(comparison, output_dir)}", highlight=False, soft_wrap=True)
    comparison.raise_for_problems()


def _write(comparison: Comparison, out: Files) -> None:
    from moeport.files import write_json, write_text
    from moeport.studies.compare.export import to_json, write_csv
    from moeport.studies.compare.plot import write_plot
    from moeport.studies.compare.table import markdown

    if out.json_file:
        write_json(out.json_file, to_json(comparison))
    if out.markdown_file:
        write_text(out.markdown_file, markdown(comparison))
    if out.csv_file:
        write_csv(out.csv_file, comparison)
    if out.plot_file:
        write_plot(out.plot_file, comparison)


def _numbers(text: str | None) -> list[int]:
    from moeport.errors import UserError

    try:
        numbers = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise UserError(f"--seeds {text}: not a list of seeds; expected whole numbers from 0, as in --seeds 0,1,2")
    return numbers
