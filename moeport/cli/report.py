"""`moeport report`."""

from pathlib import Path
from typing import Annotated

import typer

from moeport.cli.options import output_file


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder; the run may still train.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        output_file("-o", "--output", metavar="FILE.html", help="Where to write it. Default: RUN/report.html."),
    ] = None,
) -> None:
    """Write the report of a run, also while it trains: charts of all metrics, loads of experts, the config; one page.

    It only reads the run, which goes on undisturbed and writes its own report at the end.
    """
    from moeport.errors import UserError
    from moeport.files import check_output
    from moeport.pages.console import wide_console
    from moeport.training.report import write_report
    from moeport.training.run_dir import REPORT_FILE

    if not run.is_dir():
        raise UserError(f"{run}: {'is not a folder' if run.exists() else 'no such folder'}; expected a run folder")
    if output is not None and output.suffix != ".html":
        raise UserError(f"--output {output}: expected a name that ends in .html")
    path = output or run / REPORT_FILE
    check_output(path)
    wide_console().print(f"report: {write_report(run, path)}", soft_wrap=True)
