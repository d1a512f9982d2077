"""`moeport kit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeport.cli.options import output_file
from moeport.facts import DEVICES, training_backends
from moeport.kit.options import PART_NAMES, KitOptions, selected

app = typer.Typer(
    name="kit",
    help="Check everything on this machine's hardware and write one file to send back. Exit code 0: no "
    "part failed; 1: one did, and the file is written all the same; 2: an error that you can fix.",
    invoke_without_command=True,
)


@app.callback()
def kit(
    context: typer.Context,
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"{' or '.join(training_backends())}; default: the first that is installed.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=f"{', '.join(('auto', *DEVICES))}.")] = "auto",
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks of parts that communicate; default: one per device, 4 on a CPU.", show_default=False
        ),
    ] = None,
    parts: Annotated[
        str, typer.Option(metavar="PART,...", help=f"Run only these parts: {', '.join(PART_NAMES)}.")
    ] = "",
    skip: Annotated[str, typer.Option(metavar="PART,...", help="Leave these parts out.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: about two minutes on two cores.")] = False,
    output: Annotated[
        Path | None,
        output_file("-o", "--output", help="The file to write; default: moeport-kit-DATE.zip.", metavar="FILE.zip"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Check everything on this machine's hardware and write one file to send back."""
    if context.invoked_subcommand is not None:
        for name in context.params:
            if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE":
                context.fail(f"--{name} says what to check; moeport kit {context.invoked_subcommand} checks nothing")
        return
    from datetime import UTC, datetime

    from moeport.errors import UserError
    from moeport.files import check_output
    from moeport.kit.kit import run_kit

    target = output or Path(f"moeport-kit-{datetime.now(UTC):%Y-%m-%d}.zip")
    options = KitOptions(target, backend or _installed(), device, ranks, selected(parts, skip), quick)
    options.check()
    check_output(target)
    if target.is_file() and not overwrite:
        raise UserError(f"{target}: already exists; name another file with -o, or replace it with --overwrite")
    from moeport.pages.console import PlainConsole

    console = PlainConsole(soft_wrap=True)
    raise typer.Exit(run_kit(options, console.print))


def _installed() -> str:
    """The first training backend whose framework is installed; without any, the first."""
    from importlib.util import find_spec

    from moeport.facts import BACKENDS

    names = training_backends()
    return next((name for name in names if find_spec(BACKENDS[name].framework)), names[0])


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of moeport kit.", show_default=False)],
    output: Annotated[
        Path | None, output_file("-o", "--output", help="Also write it as a page.", metavar="FILE.html")
    ] = None,
) -> None:
    """Show a file of moeport kit, and write it as one HTML page."""
    from moeport.files import write_text
    from moeport.kit.page import page
    from moeport.kit.read import read_kit
    from moeport.kit.text import render
    from moeport.pages.console import wide_console

    found = read_kit(file)
    wide_console().print(render(found))
    if output:
        write_text(output, page(found))
        typer.echo(f"page: {output}")


@app.command(hidden=True)
def part(folder: Annotated[Path, typer.Argument()]) -> None:
    """A process of a part; started by moeport kit."""
    from moeport.kit.worker import run_task

    run_task(folder)
