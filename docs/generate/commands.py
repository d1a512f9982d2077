"""What the documentation lists about every command: what it does, its arguments and its options.

It is made from the annotations of the functions, not from what `--help` prints, which changes with releases of typer.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from moeport.cli.main import COMMANDS, app

EXAMPLE = re.compile(r"^Examples?: (?P<command>(?:.+\n?)+)", re.MULTILINE)
TAG = re.compile(r"(?<!`)<([^>\s`]+)>")
BRACKET = re.compile(r"(```.*?```|`[^`]*`)|\[", re.DOTALL)
"""A bracket outside code, where [A][B] would be a link."""
VALUES = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def reference() -> str:
    """A section per command, in the order of `moeport --help`."""
    found = sorted(_commands(app, "moeport"), key=lambda each: COMMANDS.index(each[0].split()[1]))
    return "\n\n".join(_section(*each) for each in found)


def _commands(group: typer.Typer, path: str) -> Iterator[tuple[str, Callable[..., Any], str | None]]:
    """Name, function and help of every command below a group."""
    for each in group.registered_commands:
        if not each.hidden and each.callback:
            name = each.name or each.callback.__name__.replace("_", "-")
            yield f"{path} {name}", each.callback, each.help
    for inner in group.registered_groups:
        nested = inner.typer_instance
        assert nested is not None
        own = f"{path} {nested.info.name}"
        callback = nested.registered_callback
        if callback and callback.callback and (nested.info.invoke_without_command or callback.invoke_without_command):
            texts = (each for each in (callback.help, nested.info.help) if isinstance(each, str))
            yield own, callback.callback, next(texts, None)
        yield from _commands(nested, own)


def _section(path: str, callback: Callable[..., Any], text: str | None) -> str:
    hints = get_type_hints(callback, include_extras=True)
    usage, rows, options = [path], [], []
    for parameter in inspect.signature(callback).parameters.values():
        kind, *extras = get_args(hints.get(parameter.name)) or [None]
        info = next((each for each in extras if isinstance(each, ArgumentInfo | OptionInfo)), None)
        if info is None or info.hidden:
            continue
        name = _name(parameter, kind, info)
        row = f"| `{_cell(name)}` | {_cell(_text(parameter, info))} |"
        if isinstance(info, ArgumentInfo):
            usage.append(name if parameter.default is parameter.empty else f"[{name}]")
            rows.append(row)
        else:
            options.append(row)
    table = "\n".join(["| Argument or option | |", "|---|---|", *rows, *options])
    line = " ".join([*usage, *(["[OPTIONS]"] if options else [])])
    said = _prose(inspect.cleandoc(text or callback.__doc__ or ""))
    return "\n\n".join([f"### `{path}`", f"```text\n{line}\n```", said, *([table] if rows or options else [])])


def _name(parameter: inspect.Parameter, kind: Any, info: ArgumentInfo | OptionInfo) -> str:
    """`NAME`, `NAME...`, `--name` or `--name VALUE`."""
    kind, many = _single(kind)
    if isinstance(info, ArgumentInfo):
        word = (info.metavar or parameter.name.upper()).strip("[].")
        return f"{word}..." if many else word
    declared = (info.default, *(info.param_decls or ()))  # an annotation has its first name in the place of a default
    given = [each for each in declared if isinstance(each, str) and each.startswith("-")]
    names = ", ".join(given or ["--" + parameter.name.replace("_", "-")])
    if kind is bool:
        return names
    choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else None
    return f"{names} {info.metavar or choices or VALUES.get(kind, 'TEXT')}"


def _single(kind: Any) -> tuple[Any, bool]:
    """The type of one value, without `None`; and whether there may be several."""
    several = [each for each in get_args(kind) if each is not NoneType]
    if get_origin(kind) is list:
        return several[0], True
    if NoneType in get_args(kind) and len(several) == 1:
        return _single(several[0])
    return kind, False


def _text(parameter: inspect.Parameter, info: ArgumentInfo | OptionInfo) -> str:
    """The help of a parameter, and its default."""
    parts, default = [_prose(info.help or "")], parameter.default
    plain = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    if plain and default != "" and info.show_default:
        parts.append(f"Default: {getattr(default, 'value', default)}.")
    elif default is parameter.empty and isinstance(info, OptionInfo):
        parts.append("Required.")
    return " ".join(filter(None, parts))


def _prose(text: str) -> str:
    """A help text as Markdown."""
    text = EXAMPLE.sub(lambda found: f"\n```console\n$ {' '.join(found['command'].split())}\n```\n", text)
    text = BRACKET.sub(lambda found: found[1] or r"\[", text)
    return re.sub(r"\n{3,}", "\n\n", TAG.sub(r"`<\1>`", text.replace("\b\n", ""))).strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
