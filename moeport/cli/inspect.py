"""`moeport inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from moeport.cli.options import Flags, grouped, output_file
from moeport.facts import BACKENDS
from moeport.studies.inspect.options import Options

DROPS = ("position", "probability")
Looked = Annotated[
    Options,
    Flags(
        checkpoint=typer.Option(metavar="latest|best|step-N", help="Checkpoint to inspect: latest, best or step-N."),
        tokens=typer.Option(min=1, help="Maximum number of tokens of text; their hidden states are kept in memory."),
        context=typer.Option(min=1, help="Tokens per sequence. Default: data.sequence_length.", show_default=False),
        batch_size=typer.Option(min=1, help="Sequences that share the capacity of the experts."),
        least=typer.Option(
            min=1, help="Number of assignments that a token id, or a range of positions, must have to be included."
        ),
        checkpoints=typer.Option(
            min=1, help="Maximum number of checkpoints of the run to compare, including the inspected one."
        ),
        compared=typer.Option(min=0, help="Tokens that every expert is given; 0: do not compare the experts."),
        robustness=typer.Option(
            "--robustness/--no-robustness", help="Also measure the loss without every token's first choice."
        ),
        backend=typer.Option(help=f"{', '.join(BACKENDS)}. Default: the run's.", show_default=False),
        factor=typer.Option(min=0.01, max=1e6, help="Inspect with this capacity factor instead of the run's capacity."),
        drop=typer.Option(metavar="|".join(DROPS), help="Inspect with this drop policy instead of the run's."),
    ),
]


@grouped
def inspect(
    place: Annotated[
        Path,
        typer.Argument(metavar="RUN|HF_FOLDER", help="A run, or a folder of the Hugging Face hub.", show_default=False),
    ],
    looked: Looked,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="FILES",
            help="File, folder or glob of texts. Repeatable: each is a dataset. Default: the run's held-out text.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json, if HF_FOLDER has none.", show_default=False)
    ] = None,
    json_file: Annotated[Path | None, output_file("--json", help="Write all figures as JSON.")] = None,
    output: Annotated[
        Path | None,
        output_file(
            "--output", metavar="FILE.html", help="Where to write the page. Default: inspect.html in the folder."
        ),
    ] = None,
) -> None:
    """Show what the routers have learned: what experts read, when they learned it, and which tokens are dropped."""
    from moeport.cli.progress import FileProgress
    from moeport.convert.evaluation import is_of_hub, run_of
    from moeport.errors import UserError
    from moeport.files import check_output, write_json
    from moeport.pages.console import wide_console
    from moeport.studies.inspect.export import as_json
    from moeport.studies.inspect.inspect import inspect_run
    from moeport.studies.inspect.page import PAGE_FILE, write_page
    from moeport.studies.inspect.text import render

    if looked.backend is not None and looked.backend not in BACKENDS:
        raise UserError(f"--backend {looked.backend}: is not a backend; expected one of {', '.join(BACKENDS)}")
    if looked.drop is not None and looked.drop not in DROPS:
        raise UserError(
            f"--drop {looked.drop}: is not a drop policy of this command; expected one of {', '.join(DROPS)}"
        )
    page = output or place / PAGE_FILE
    if page.suffix != ".html":
        raise UserError(f"--output {page}: expected a name that ends in .html")
    if output is None and place.is_dir():
        check_output(page)
    if is_of_hub(place) and not text:
        raise UserError(f"{place}: a folder of the Hugging Face hub has no held-out text; expected --text FILES")
    with FileProgress() as progress, run_of(place, tokenizer, looked.checkpoint) as run_dir:
        found = inspect_run(run_dir, looked, text, place, report=progress.show)
    console = wide_console()
    console.print(render(found))
    write_page(found, page)
    console.print(f"page: {page}", soft_wrap=True)
    if json_file is not None:
        write_json(json_file, as_json(found))
