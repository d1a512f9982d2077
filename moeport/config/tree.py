"""A tree of config values, each with the place where it was given."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeport.config.problem import NOWHERE, Place


@dataclass(frozen=True)
class Node:
    """A value and where it was given."""

    value: Any
    """A scalar, a list of nodes or a dictionary of nodes. A number outside 64 bits becomes an infinity."""
    place: Place
    key_place: Place
    """Where its key was given; for the root, the file as a whole."""
    text: str
    """The value as it was written; empty for a mapping or list over several lines."""

    def find(self, *parts: str | int) -> "Node | None":
        """The node at a path of keys and list indices, or None."""
        node = self
        for part in parts:
            children = node.value
            if isinstance(children, dict):
                known = part in children
            else:
                known = isinstance(children, list) and isinstance(part, int) and 0 <= part < len(children)
            if not known:
                return None
            node = children[part]
        return node

    def at(self, *parts: str | int) -> "Node":
        """The node at a path that exists."""
        node = self.find(*parts)
        assert node is not None
        return node


def python_node(value: Any) -> Node:
    """The tree of a Python value that consists of dictionaries, lists, tuples, paths and scalars."""
    text = ""
    if isinstance(value, Mapping):
        value = {str(key): python_node(child) for key, child in value.items()}
    elif isinstance(value, list | tuple):
        value = [python_node(child) for child in value]
    else:
        value = in_64_bits(str(value) if isinstance(value, Path) else value)
        text = shown(value)
    return Node(value, NOWHERE, NOWHERE, text)


def shown(value: Any) -> str:
    """A scalar as written in YAML; strings are unquoted."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool | float) else str(value)


def merge(base: Node, over: Node) -> Node:
    """`over` merged into `base`: mappings are merged, anything else is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, base.place, base.key_place, base.text)


def without(node: Node, paths: Iterable[Sequence[str | int]]) -> Node:
    """The tree without the nodes at some paths, as far as they exist; a path into a list removes the whole list."""
    doomed: dict[str | int, Any] = {}
    for path in paths:
        level = doomed
        for part, following in zip(path, (*path[1:], None), strict=True):
            if not isinstance(following, str):
                level[part] = None
                break
            level = level.setdefault(part, {})
            if level is None:
                break
    return _cut(node, doomed)


def _cut(node: Node, doomed: Mapping[str | int, Any]) -> Node:
    """The tree without the children in `doomed`: whole where their value is None, else without those below."""
    if not isinstance(node.value, dict) or not doomed:
        return node
    children = {}
    for key, child in node.value.items():
        below = doomed.get(key, {})
        if below is not None:
            children[key] = _cut(child, below)
    return replace(node, value=children)


def in_64_bits(value: Any) -> Any:
    """The value, or an infinity for an integer outside 64 bits."""
    return math.inf if isinstance(value, int) and not -(2**63) <= value < 2**63 else value
