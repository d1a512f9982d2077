"""Pydantic's errors, rephrased in terms of the config file and placed in it."""

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moeport.config.keys import (
    CONVERSIONS,
    VALUE_ALIASES,
    choices,
    describe,
    describe_item,
    item_section,
    keys,
    names,
    subsection,
    suggest,
    variants,
)
from moeport.config.problem import Problem
from moeport.config.schema import Config
from moeport.config.tree import Node
from moeport.config.yaml_text import plain_scalar
from moeport.core.section import Section
from moeport.errors import LONGEST_NAME

Parts = tuple[str | int, ...]
"""A path of keys and list indices."""

MOST_GUESSED = 50
"""Unknown keys for which the one that was meant is looked for; each takes milliseconds."""

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "a mapping",
}
_MEANT = {"int_type": int, "float_type": int | float, "bool_type": bool}
"""By pydantic error, the Python types that a quoted scalar may have been meant as."""


def dotted(parts: Parts) -> str:
    """A dotted path such as `data.source.paths[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def locate(loc: Sequence[str | int]) -> tuple[Parts, type[Section]]:
    """The path of a pydantic location, and the section that declares its last key.

    Pydantic inserts the chosen name after each choice of sections: `data.source.files.paths`.
    """
    parts: list[str | int] = []
    section: type[Section] = Config
    below: type[Section] | None = section
    rest = iter(loc)
    for part in rest:
        if isinstance(part, str):
            if below is None:  # the alternative of a value, such as `constrained-int`, and no key
                continue
            section = below
            field = section.model_fields.get(part)
            if field is None:
                below = None
            elif variants(field):
                below = variants(field).get(str(next(rest, "")), below)
            else:
                below = subsection(field) or item_section(field)
        parts.append(part)
    return tuple(parts), section


def non_finite(root: Node) -> list[Problem]:
    """Problems for numbers that are NaN, infinite or outside 64 bits."""
    found = []
    for key in {key.path: key for key in keys()}.values():
        node = root.find(*key.path.split("."))
        if node is not None and isinstance(node.value, float) and not math.isfinite(node.value):
            wrong = "is not a finite number of 64 bits"
            found.append(Problem(key.path, wrong, node.text, key.expected, place=node.place))
    return found


def schema_problems(root: Node, errors: Sequence[ErrorDetails]) -> Iterator[Problem]:
    """Problems for single keys.

    Args:
        root: the whole config as given.
        errors: the errors that pydantic found in it.
    """
    unknown = 0
    bad: set[str] = set()
    alternatives: dict[Parts, list[ErrorDetails]] = {}
    for error in errors:
        alternatives.setdefault(locate(error["loc"])[0], []).append(error)
    for error in errors:
        parts, section = locate(error["loc"])
        if error["type"] == "extra_forbidden":
            unknown += 1
            yield _unknown_key(root, parts, section, guess=unknown <= MOST_GUESSED)
        elif error["type"] == "missing":
            place = root.at(*parts[:-1]).key_place
            yield Problem(dotted(parts), "is missing", expected=describe(section, str(parts[-1])), place=place)
        elif error["type"].startswith("union_tag"):
            yield _bad_name(root, parts, section)
        elif dotted(parts) not in bad:
            found = [_bad_value(root, parts, section, each) for each in alternatives[parts]]
            bad.add(dotted(parts))
            yield max(found, key=lambda problem: (bool(problem.hint), len(problem.key)))


def _unknown_key(root: Node, parts: Parts, section: type[Section], *, guess: bool) -> Problem:
    key, name, place = dotted(parts), str(parts[-1]), root.at(*parts).key_place
    siblings = choices().get(dotted(parts[:-1]), {})
    owners = [tag for tag, sibling in siblings.items() if name in sibling.model_fields]
    if owners:
        chosen = section.model_fields["name"].default
        *others, last = owners
        listed = f"{', '.join(others)} and {last}" if others else last
        return Problem(key, f"is an option of {listed}, not of {chosen}", place=place)
    if "." in name:
        return Problem(key, "unknown key", expected="nested sections instead of dots", place=place)
    meant = suggest(key, section) if guess and len(name) <= LONGEST_NAME else None
    if meant is None:
        return Problem(key, "unknown key", expected=f"one of {', '.join(section.model_fields)}", place=place)
    conversion = CONVERSIONS.get(name.lower())
    wrong = f"unknown key ({conversion})" if conversion else "unknown key"
    return Problem(key, wrong, hint=meant, place=place, related=(meant,))


def _bad_name(root: Node, parts: Parts, section: type[Section]) -> Problem:
    """A choice of sections whose `name` is missing or unknown."""
    node, key = root.at(*parts), dotted((*parts, "name"))
    tags = names(section.model_fields[str(parts[-1])])
    expected = f"one of {', '.join(tags)}"
    name = node.find("name")
    if name is None:
        return Problem(key, "is missing", expected=expected, place=node.key_place)
    if name.value is None:
        return Problem(key, "is null", expected=expected, place=name.place)
    return Problem(key, "is not a choice", name.text, expected, _closest(name.value, tags), name.place)


def _bad_value(root: Node, parts: Parts, section: type[Section], error: ErrorDetails) -> Problem:
    node, name = root.at(*parts), next(str(part) for part in reversed(parts) if isinstance(part, str))
    item = isinstance(parts[-1], int)
    expected = describe_item(section, name) if item else describe(section, name)
    if error["type"] == "path":  # a path that cannot be expanded; its message says what to write
        expected = ""
    if isinstance(node.value, dict) and error["loc"][-1] in node.value:  # a value of a mapping with keys of its own
        parts, expected = (*parts, error["loc"][-1]), "a string"
        node = root.at(*parts)
    got = "" if node.value is None else node.text
    hint = _meant_value(node, dotted(parts), section.model_fields[name], error["type"])
    return Problem(dotted(parts), _wrong(node.value, error), got, expected, hint, node.place)


def _wrong(value: Any, error: ErrorDetails) -> str:
    match error["type"]:
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return "is out of range"
        case "too_short":
            return "is too short"
        case "string_too_short" if not value:
            return "is empty"
        case "literal_error" if isinstance(value, str):
            return "is not a choice"
        case kind if kind.endswith("_type") or kind == "literal_error":
            return f"is {_KINDS[type(value)]}"
    return error["msg"]


def _meant_value(node: Node, key: str, field: FieldInfo, kind: str) -> str:
    """The value that was probably meant, or an empty string."""
    value = node.value
    if isinstance(value, str):
        if value in names(field):
            return f"{key}.name: {value}"
        if kind == "literal_error":
            choices = [get_args(kind) or (kind,) for kind in get_args(field.annotation)]
            return _closest(value, [name for kind in choices for name in kind if isinstance(name, str)])
        if kind in _MEANT and isinstance(plain_scalar(value), _MEANT[kind]):
            return value
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return str(int(value))
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f'"{node.text}"'
    return ""


def _closest(value: Any, choices: list[str]) -> str:
    alias = VALUE_ALIASES.get(str(value).lower())
    if alias in choices:
        return str(alias)
    return next(iter(get_close_matches(str(value), choices, 1)), "") if len(str(value)) <= LONGEST_NAME else ""
