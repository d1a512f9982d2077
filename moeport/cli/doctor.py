"""`moeport doctor`."""

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which backends, devices, types and kernels work here, and what installs the others."""
    from moeport.backends.doctor import report

    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        from moeport.backends.doctor import render

        Console(highlight=False).print(render(found))
