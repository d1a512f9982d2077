"""Options that several commands share, and groups of options.

A command with many options takes frozen dataclasses instead: `grouped` turns each field into an option and passes on
the whole object. The dataclasses are defined where the work is done; flags and help texts are defined here or next to
the command.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from moeport.errors import UserError
from moeport.files import check_folder, check_output
from moeport.paths import expanded

SET = typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set training.steps=100. Repeatable.")


def _refuse_standard_input(value: Path) -> Path:
    if str(value) == "-":
        raise UserError("CONFIG -: other processes read the config too; expected a file")
    return value


ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML config; - is standard input.", show_default=False)
]
SharedConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="The YAML config, which other processes read too.",
        show_default=False,
        callback=_refuse_standard_input,
    ),
]
Overrides = Annotated[list[str] | None, SET]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")]


def output_file(*names: str, help: str, metavar: str = "FILE", check: Callable[[Path], None] = check_output) -> Any:  # noqa: A002
    """An option that names a file to write, which is refused before the command starts if it cannot be written.

    Args:
        names: as of `typer.Option`.
        help: as of `typer.Option`.
        metavar: as of `typer.Option`.
        check: raises UserError for a path that cannot be written.
    """

    def checked(context: typer.Context, value: Path | None) -> Path | None:
        if value is not None and writes_files():
            check(_expanded(value))
            _refuse_twice(context, _expanded(value))
        return value

    return typer.Option(*names, metavar=metavar, help=help, callback=checked, show_default=False)


def output_folder(*names: str, help: str, metavar: str = "DIR", show_default: bool = True) -> Any:  # noqa: A002
    """An option that names a folder to write files to, checked as by `output_file`."""

    def checked(value: Path) -> Path:
        if writes_files():
            check_folder(_expanded(value))
        return value

    return typer.Option(*names, metavar=metavar, help=help, callback=checked, show_default=show_default)


def check_plot(path: Path) -> None:
    """Raises UserError for a plot that cannot be written."""
    from moeport.bench.output import check_plot as check

    check(path)


def writes_files() -> bool:
    """Whether this process writes the files of a command, as the first rank of a job does."""
    from moeport.errors import UserError
    from moeport.launch.launcher import launched

    try:
        launch = launched()
    except UserError:  # the command itself will say so, if it asks
        return True
    return launch is None or launch.rank <= 0


def _refuse_twice(context: typer.Context, path: Path) -> None:
    """Raises UserError if another option names the same file, which one of them would overwrite."""
    from moeport.errors import UserError

    named: dict[str, str] = context.meta.setdefault("moeport.outputs", {})
    place = os.path.realpath(path)
    if place in named and os.path.isfile(place) | (not os.path.exists(place)):
        raise UserError(f"{path}: two options name it, and each would overwrite what the other writes; name two files")
    named[place] = str(path)


def expands_paths(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take paths with `~` and environment variables, also where no shell has expanded them."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        command(*args, **{name: _expanded(value) for name, value in given.items()})

    return run


def _expanded(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(expanded(str(value)))
    return [_expanded(each) for each in value] if isinstance(value, list) else value


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
