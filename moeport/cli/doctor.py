"""`moeport doctor`."""

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which backends, devices, types and kernels work on this machine, and how to install the others."""
    from moeport.backends.doctor import report

    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        from moeport.backends.doctor import render
        from moeport.pages.console import PlainConsole

        PlainConsole().print(render(found))
