"""The reference of every key of the config, from its schema."""

import inspect
from collections.abc import Iterator
from html import escape
from typing import Any

from moeport.config import Config
from moeport.config.keys import Key, subsection, variants
from moeport.config.tree import shown
from moeport.core.section import Section


def keys() -> str:
    """Markdown of all sections."""
    return "\n".join(reference(Config, ""))


def reference(section: type[Section], path: str) -> Iterator[str]:
    """Markdown lines of a section, then of the sections in it."""
    keys = [Key(f"{path}.{name}".lstrip("."), section) for name in section.model_fields]
    yield from table([key for key in keys if subsection(key.field) is None and not variants(key.field)])
    for key in keys:
        below, choices = subsection(key.field), variants(key.field)
        if below:
            yield f"## `{key.path}`\n\n{text_of(below)}\n"
            yield from reference(below, key.path)
        if choices:
            yield f"## `{key.path}`\n\n{key.field.description} Default: `name: {key.field.default.name}`.\n"
        for name, choice in choices.items():
            yield f"### `{key.path}`, `name: {name}`\n\n{text_of(choice)}\n"
            options = [Key(f"{key.path}.{option}", choice, name) for option in choice.model_fields]
            yield from table([option for option in options if option.name != "name"])


def table(keys: list[Key]) -> Iterator[str]:
    """The table of some keys; nothing for no keys."""
    if keys:
        yield "| Key | Values | Default | Meaning |\n|---|---|---|---|"
        yield from map(row, keys)
        yield ""


def row(key: Key) -> str:
    """One row of the table."""
    default = "required" if key.field.is_required() else code(key.field.default)
    meaning = " ".join((key.field.description or "").split()).replace("|", "\\|")
    return f"| `{key.path}` | {key.expected} | {default} | {meaning} |"


def text_of(section: type[Section]) -> str:
    """The docstring of a section."""
    return inspect.cleandoc(section.__doc__ or "")


def code(value: Any) -> str:
    """A default as inline code; a pipe would end the cell even there."""
    text = "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else shown(value)
    return f"<code>{escape(text).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"
