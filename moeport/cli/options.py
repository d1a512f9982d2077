"""Options that several commands share, and groups of options.

A command with many options takes frozen dataclasses instead: `grouped` turns each field into an option and passes on
the whole object. The dataclasses are defined where the work is done; flags and help texts are defined here or next to
the command.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

SET = typer.Option(
    "--set", metavar="KEY=VALUE", help="Override a key, as in --set optimizer.learning_rate=3e-4. Repeatable."
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML config.", show_default=False)]
Overrides = Annotated[list[str] | None, SET]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")]


class Flags:
    """Annotates a parameter whose type is a frozen dataclass with a `typer.Option` for each of its fields."""

    def __init__(self, **options: Any):
        self.options = options


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses annotated with `Flags`, each field of which becomes an option.

    Options are listed in the order of the parameters and fields. Defaults come from the parameter's default, or else
    from the fields. No name may occur twice.
    """
    groups: dict[str, tuple[type, list[str]]] = {}
    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, flags = _flags_of(parameter.annotation)
        if flags is None:
            shown.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        spread = _spread(kind, flags, parameter.default)
        groups[parameter.name] = (kind, [each.name for each in spread])
        shown += spread

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (kind, names) in groups.items():
            given[name] = kind(**{each: given.pop(each) for each in names})
        command(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def _flags_of(annotation: Any) -> tuple[type, Flags | None]:
    """The type of a parameter and the flags of its fields; None for a parameter that is not a group."""
    if get_origin(annotation) is Annotated:
        kind, *notes = get_args(annotation)
        return kind, next((note for note in notes if isinstance(note, Flags)), None)
    return annotation, None


def _spread(kind: type, flags: Flags, default: Any) -> list[inspect.Parameter]:
    """A parameter for each field of a dataclass."""
    types = get_type_hints(kind)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field, default),
            annotation=Annotated[types[field.name], flags.options[field.name]],
        )
        for field in fields(kind)
    ]


def _default(field: Any, group: Any) -> Any:
    if group is not inspect.Parameter.empty:
        return getattr(group, field.name)
    return inspect.Parameter.empty if field.default is MISSING else field.default
