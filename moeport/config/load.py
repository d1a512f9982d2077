"""From a YAML file and overrides to a `Config`, or to every fault at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moeport.config.faults import Parts, dotted, locate, non_finite, schema_problems
from moeport.config.former import with_names_of_today, without_former_defaults
from moeport.config.keys import choices
from moeport.config.problem import NOWHERE, Place, Problem
from moeport.config.rules import EFFECTS, check_rules, value_at
from moeport.config.schema import Config
from moeport.config.short_forms import with_mappings
from moeport.config.tree import Node, merge, python_node, without
from moeport.config.yaml_text import parse_overrides, read
from moeport.errors import ConfigError

MOST_SHOWN = 50
"""Faults that one message lists."""


def load_config(path: Path | str | None, overrides: Sequence[str] = (), *, recorded: bool = False) -> Config:
    """Reads a config.

    Args:
        path: YAML file; None for defaults only.
        overrides: `section.key=value`, with the value in YAML. They take precedence over the file.
        recorded: whether the file is the config of a run that was recorded, maybe by an earlier version, and is to be
            read rather than trained.

    Raises:
        ConfigError: lists every fault of the file and the overrides, one per line, in reading order.
    """
    base: Node | None = Node({}, NOWHERE, NOWHERE, "")
    problems: list[Problem] = []
    if path is not None:
        base, problems = read(Path(path))
        if base is not None and not isinstance(base.value, dict):
            wrong, expected = "the top level is not a mapping", "sections, as in `model:`"
            problems.append(Problem("", wrong, base.text, expected, place=base.place))
            base = None
    over, found = parse_overrides(overrides)
    problems += found
    if base is None:
        raise _error(problems)
    return _build(_override(with_mappings(without_former_defaults(base)), with_mappings(over)), problems, recorded)


def config_from_dict(values: Mapping[str, Any], *, recorded: bool = False) -> Config:
    """Builds a config from nested dictionaries, checked by the same rules as a file.

    Args:
        values: by key; sections are dictionaries.
        recorded: as of `load_config`.

    Raises:
        ConfigError: lists every fault, one per line.
    """
    return _build(with_mappings(without_former_defaults(python_node(values))), [], recorded)


def _override(base: Node, over: Node) -> Node:
    """Merges `over` into `base`, dropping options of `base` that a choice in `over` makes meaningless."""
    for path, sections in choices().items():
        parts = tuple(path.split("."))
        old, new = base.find(*parts), over.find(*parts)
        if new is None or not isinstance(new.value, dict):
            continue
        old_name, name = base.find(*parts, "name"), new.find("name")
        if old is None and name is None:
            default = Node(value_at(Config(), f"{path}.name"), new.place, new.place, "")
            over = merge(over, _nested((*parts, "name"), default))
        elif old is not None and old_name is not None and name is not None:
            section = sections.get(str(name.value))
            if section is not None and name.value != old_name.value:
                stale = old.value.keys() - section.model_fields.keys()
                base = without(base, [(*parts, option) for option in stale])
    for effect in EFFECTS:
        selector = over.find(*effect.selector.split("."))
        if selector is not None and selector.value not in effect.values:
            base = without(base, [tuple(effect.option.split("."))])
    return merge(base, over)


def _nested(parts: Parts, node: Node) -> Node:
    """Wraps `node` in mappings that put it at a path."""
    for part in reversed(parts):
        node = Node({part: node}, node.place, node.place, "")
    return node


def _build(root: Node, problems: list[Problem], recorded: bool) -> Config:
    if recorded:
        root = with_names_of_today(root)
    problems += non_finite(root)
    faulty = {problem.key for problem in problems if problem.key}
    usable = without(root, [tuple(key.partition("[")[0].split(".")) for key in faulty])
    for problem in schema_problems(usable, _errors(usable)):
        if problem.key not in faulty:
            problems.append(problem)
            faulty |= set(problem.related)
    config = _sound_part(usable, faulty)
    problems += [_placed(problem, root) for problem in check_rules(config, faulty, recorded)]
    if problems:
        raise _error(problems)
    return config


def _error(problems: list[Problem]) -> ConfigError:
    lines = [str(problem) for problem in sorted(problems, key=lambda p: p.place)[:MOST_SHOWN]]
    more = len(problems) - len(lines)
    return ConfigError("\n".join([*lines, *([f"... and {more:,} more faults"] if more else [])]))


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value


def _errors(root: Node) -> list[ErrorDetails]:
    """Pydantic's errors about given and missing values."""
    try:
        # Strict, so that "256" is not an integer; through JSON, where a string may be a path and a list a tuple.
        Config.model_validate_json(json.dumps(_plain(root)), strict=True)
    except ValidationError as error:
        found = [(locate(item["loc"])[0], item) for item in error.errors(include_url=False)]
        # A default that is not a JSON value, such as a path, is reported as an error too.
        return [item for parts, item in found if item["type"] == "missing" or _is_about(root.find(*parts), item)]
    return []


def _is_about(node: Node | None, error: ErrorDetails) -> bool:
    """Whether an error is about a value that was given. Pydantic also calls a list short that has faulty items."""
    if node is None or error["type"] != "too_short":
        return node is not None
    return len(node.value) < error["ctx"]["min_length"]


def _sound_part(root: Node, faulty: set[str]) -> Config:
    """The config without its faulty parts, whose keys are added to `faulty`, except unknown ones."""
    while errors := _errors(root):
        doomed = []
        for error in errors:
            parts, _ = locate(error["loc"])
            parts = parts[:-1] if error["type"] == "missing" else parts
            if error["type"] != "extra_forbidden":
                faulty.add(dotted(parts))
            doomed.append(parts)
        root = without(root, doomed)
    return Config.model_validate(_plain(root))


def _placed(problem: Problem, root: Node) -> Problem:
    """Places the problem at its key or, if that was not given, at the related key that was given last."""
    parts = problem.key.split(".")
    node = root.find(*parts)
    if node is not None:
        return replace(problem, got=node.text or problem.got, place=node.place)
    related = [node.place for key in problem.related if (node := root.find(*key.split(".")))]
    return replace(problem, place=max(related, default=_nearest(root, parts)))


def _nearest(root: Node, parts: list[str]) -> Place:
    """The place of the innermost given section around a key that was not given."""
    while (node := root.find(*parts)) is None:
        parts = parts[:-1]
    return node.key_place
