"""YAML text as a tree of nodes.

Scalars follow YAML 1.1, with three differences: numbers may be written `3e-3`, a leading zero does not mean octal, and
dates and times stay strings.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from moeport.config.problem import NOWHERE, Place, Problem
from moeport.config.tree import Node, in_64_bits, merge
from moeport.reading import read_bytes

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _TooLongError(Exception):
    """The document has more than MOST_VALUES keys and values; line and column are those of the first too many."""

    def __init__(self, mark: Any):
        super().__init__()
        self.line, self.column = mark.line, mark.column


MOST_VALUES = 20_000
"""Keys and values in a document; those that an alias repeats count each time."""
MOST_BYTES = 1 << 20
"""Size of a file."""
STANDARD_INPUT = Path("-")


class Loader(yaml.SafeLoader):
    """A safe loader with this module's scalar syntax, for documents of a config's size."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, as the base class composes it; raises an error after too many."""
        self.composed += 1
        if self.composed > MOST_VALUES:
            raise _TooLongError(self.get_mark())
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """A dumper that quotes strings which `Loader` would read as another type."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for _name, (_pattern, _first) in _RESOLVERS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def plain_scalar(text: str) -> Any:
    """The value of `text` as an unquoted scalar."""
    loader = Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


def parse(
    text: str, place: Callable[[int, int], Place], whole: Place, key: str = ""
) -> tuple[Node | None, list[Problem]]:
    """Parses YAML.

    Args:
        text: one document.
        place: maps line and column, both counted from 0, to the place to report.
        whole: the place of the root's key.
        key: dotted path of the text.

    Returns:
        The root and the problems found. The root is None if the text is not YAML, and a null node if it is empty.
    """
    try:
        loader = Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line, column = _line_and_column(text[: error.position])
        wrong = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        return None, [Problem(key, wrong, place=place(line, column))]
    except _TooLongError as error:
        return None, [_too_long(key, place(error.line, error.column))]
    except yaml.MarkedYAMLError as error:
        return None, [_syntax_problem(error, place, key)]
    except RecursionError:
        return None, [Problem(key, "not valid YAML: nested too deeply", place=whole)]
    if root is None:
        return Node(None, whole, whole, ""), []
    if expanded(root, {}) > MOST_VALUES:
        return None, [_too_long(key, whole)]
    reader = _Reader(text, loader, place)
    return reader.node(root, key, whole), reader.problems


def read(path: Path) -> tuple[Node | None, list[Problem]]:
    """Parses a YAML file in UTF-8; `-` is standard input.

    The root is None on failure, and an empty mapping for an empty file.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    whole = Place((0, 0, 0), name)

    def place(line: int, column: int) -> Place:
        return Place((0, line, column), f"{name}:{line + 1}:{column + 1}")

    data, wrong = _bytes(path)
    if wrong:
        return None, [Problem("", wrong, expected="a YAML file", place=whole)]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _line_and_column(data[: error.start].decode())
        wrong = f"byte 0x{data[error.start]:02x} is not UTF-8"
        return None, [Problem("", wrong, expected="text in UTF-8", place=place(line, column))]
    root, problems = parse(text, place, whole)
    if root is not None and root.text == "" and root.value is None:
        root = Node({}, whole, whole, "")
    return root, problems


def _bytes(path: Path) -> tuple[bytes, str]:
    """What the file holds, and what is wrong with it, if anything."""
    try:
        data = sys.stdin.buffer.read(MOST_BYTES + 1) if path == STANDARD_INPUT else read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        return b"", "no such file"
    except IsADirectoryError:
        return b"", "is a folder"
    except (OSError, ValueError) as error:
        return b"", f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return data, f"is larger than {MOST_BYTES:,} bytes" if len(data) > MOST_BYTES else ""


def parse_overrides(overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """Merges overrides `a.b.c=value` into one mapping; later ones take precedence."""
    root = Node({}, NOWHERE, NOWHERE, "")
    problems = []
    for index, text in enumerate(overrides):
        whole = Place((1, index, 0), f"--set {text}")

        def place(line: int, column: int, whole: Place = whole) -> Place:
            return Place((*whole.order[:2], column), whole.text)

        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            wrong = "has an empty key" if equals else 'has no "="'
            problems.append(Problem("", wrong, expected="section.key=value", place=whole))
            continue
        node, found = parse(value, place, whole, key.strip())
        problems += found
        if node is not None:
            for part in reversed(parts):
                node = Node({part: node}, whole, whole, "")
            root = merge(root, node)
    return root, problems


def expanded(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Number of keys and values at and below a node; a node that contains itself counts there as one."""
    if node not in known:
        known[node] = 1
        if isinstance(node, yaml.MappingNode):
            known[node] += sum(expanded(child, known) for pair in node.value for child in pair)
        elif isinstance(node, yaml.SequenceNode):
            known[node] += sum(expanded(child, known) for child in node.value)
    return known[node]


class _Reader:
    """Turns composed YAML nodes into `Node`s and collects their problems."""

    def __init__(self, text: str, loader: Loader, place: Callable[[int, int], Place]):
        self.problems: list[Problem] = []
        self._text = text
        self._loader = loader
        self._place = place
        self._values: dict[yaml.Node, Any] = {}
        self._open: set[yaml.Node] = set()

    def node(self, node: yaml.Node, key: str, key_place: Place) -> Node:
        """The tree of `node`, which is at the dotted path `key`."""
        if node not in self._values:
            self._open.add(node)
            self._values[node] = self._value(node, key)
            self._open.remove(node)
        written = self._text[node.start_mark.index : node.end_mark.index]
        block = isinstance(node, yaml.CollectionNode) and not node.flow_style
        return Node(self._values[node], self._at(node), key_place, "" if block else _shortened(written))

    def _value(self, node: yaml.Node, key: str) -> Any:
        scalar = isinstance(node, yaml.ScalarNode)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if node.tag != self._loader.resolve(type(node), node.value if scalar else None, (plain, not plain)):
            self._report(node, key, f"the tag {node.tag} is not allowed")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            children = [self._child(child, f"{key}[{i}]", child) for i, child in enumerate(node.value)]
            return [child for child in children if child is not None]
        if not _is_unicode(node):
            self._report(node, key, "is not valid Unicode")
            return None
        try:
            return in_64_bits(self._loader.construct_object(node))
        except ValueError:  # Python refuses to parse integers with thousands of digits
            return math.inf

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Node]:
        children: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for base in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    child = self._child(base, f"{key}.<<".lstrip("."), key_node)
                    if child is None or not isinstance(child.value, dict):
                        self._report(base, key, "<< merges something else", "a mapping or a list of mappings")
                    else:
                        inherited = child.value | inherited
                continue
            if not isinstance(key_node, yaml.ScalarNode) or not _is_unicode(key_node):
                self._report(key_node, key, "has a key that is no string")
                continue
            name = key_node.value
            path = f"{key}.{name}".lstrip(".")
            if name in children:
                first = children[name].key_place.text
                self._report(key_node, path, f"given twice, first at {first}", "each key once")
            child = self._child(value_node, path, key_node)
            if child is not None:
                children[name] = child
        return inherited | children

    def _child(self, node: yaml.Node, key: str, key_node: yaml.Node) -> Node | None:
        if node in self._open or len(self._open) > 32:
            self._report(node, key, "contains itself" if node in self._open else "nested too deeply")
            return None
        return self.node(node, key, self._at(key_node))

    def _at(self, node: yaml.Node) -> Place:
        return self._place(node.start_mark.line, node.start_mark.column)

    def _report(self, node: yaml.Node, key: str, wrong: str, expected: str = "") -> None:
        self.problems.append(Problem(key, wrong, expected=expected, place=self._at(node)))


def _syntax_problem(error: yaml.MarkedYAMLError, place: Callable[[int, int], Place], key: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    assert mark is not None
    here = place(mark.line, mark.column)
    if "'\\t'" in (error.problem or ""):
        return Problem(key, "not valid YAML: a tab", expected="spaces", place=here)
    context = ""
    if error.context and error.context_mark:
        context = f"{error.context} at {error.context_mark.line + 1}:{error.context_mark.column + 1}, "
    return Problem(key, f"not valid YAML: {context}{error.problem}", place=here)


def _too_long(key: str, place: Place) -> Problem:
    wrong = f"more than {MOST_VALUES:,} keys and values, counting those that aliases repeat"
    return Problem(key, wrong, expected="fewer; a pattern such as text/*.txt names many files", place=place)


def _line_and_column(before: str) -> tuple[int, int]:
    return before.count("\n"), len(before) - before.rfind("\n") - 1


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def _is_unicode(scalar: yaml.Node) -> bool:
    """Whether the text has no lone surrogates, which only escape sequences can produce."""
    return not any("\ud800" <= character <= "\udfff" for character in scalar.value)
