"""`moeport capacity`."""

from pathlib import Path
from typing import Annotated

import typer

from moeport.cli.options import output_file


def capacity(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a training run.", show_default=False)],
    layer: Annotated[
        int | None, typer.Option(metavar="N", help="Show only this block, with the bounds at every delta.")
    ] = None,
    target: Annotated[
        float, typer.Option(min=0, max=1, help="Drop rate to recommend a capacity for, as a fraction.")
    ] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="Number of last steps to analyse.")] = 100,
    json_file: Annotated[Path | None, output_file("--json", help="Write the numbers as JSON.")] = None,
    output: Annotated[
        Path | None,
        output_file("--output", metavar="FILE.html", help="Where to write the page. Default: RUN_DIR/capacity.html."),
    ] = None,
) -> None:
    """Show loads, drop rates by capacity, and the capacity bounds derived from cosines of tokens and gate rows."""
    from moeport.errors import UserError
    from moeport.files import check_output, write_json
    from moeport.pages.console import wide_console
    from moeport.studies.capacity import capacity as measure
    from moeport.studies.capacity.page import PAGE_FILE, write_page
    from moeport.studies.capacity.text import render

    page = output or run_dir / PAGE_FILE
    if page.suffix != ".html":
        raise UserError(f"--output {page}: expected a name that ends in .html")
    if output is None and run_dir.is_dir():
        check_output(page)
    if layer is not None:
        measure.check_layer(run_dir, layer)
    console = wide_console()
    found = measure.run_capacity(run_dir, steps, lambda text: console.print(text))
    layers = found.layers if layer is None else measure.select_layer(found, layer)
    console.print(render(found, layers, target, all_estimators=layer is not None))
    write_page(found, layers, target, page)
    console.print(f"page: {page}", soft_wrap=True)
    if json_file is not None:
        write_json(json_file, measure.as_json(found, layers, target))
