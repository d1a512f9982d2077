"""`moeport doctor`."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which backends and devices this machine has."""
    from moeport.backends.doctor import report

    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        for line in _lines(found):
            typer.echo(line)


def _lines(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A nested report as indented `key: value` lines, values aligned."""
    width = max((len(key) for key, value in values.items() if not isinstance(value, Mapping)), default=0)
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key + ':':{width + 1}} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
