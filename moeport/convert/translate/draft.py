"""What becomes of the keys of a file: a config in the making, and a verdict on every key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["understood", "ignored", "not expressible", "unknown"]
Typed = Mapping[Callable[[Any], Any], tuple[str, ...]]
"""Keys with which something is computed, by what converts their values (`Draft.require`)."""
ABSENT: Any = object()
"""The default of a key that has none, or whose default changes nothing."""


@dataclass(frozen=True)
class Entry:
    """The verdict on one key of the file, or on the default of one that it leaves out."""

    key: str
    value: Any
    state: State
    note: str
    """Where its value went, or why it has no effect here or cannot be expressed."""
    given: bool = True
    """Whether the file has the key."""


@dataclass(frozen=True)
class Rule:
    """What becomes of a key."""

    path: str = ""
    """The key of moeport's config that gets the value; empty if there is none."""
    convert: Callable[[Any], Any] | None = None
    """From its value to moeport's; raises ValueError, with the reason, for a value that has no counterpart."""
    only: tuple[Any, ...] | None = None
    """Values with which the framework does what moeport does; others cannot be expressed. None: no matter which."""
    why: str = ""
    """Why it has no effect, or why other values cannot be expressed."""
    default: Any = ABSENT
    """What the framework takes where the file leaves the key out, if moeport's own default may differ."""


def to(path: str, convert: Callable[[Any], Any] | None = None, default: Any = ABSENT) -> Rule:
    """The value goes to a key of the config."""
    return Rule(path, convert, default=default)


def only(*values: Any, why: str, default: Any = ABSENT) -> Rule:
    """Only these values can be expressed."""
    return Rule(only=values, why=why, default=default)


def ignored(why: str) -> Rule:
    """No effect on what is trained."""
    return Rule(why=why)


class Draft:
    """A config in the making.

    Args:
        values: the keys of the file, dotted where it has sections.
        ranks: how many ranks the file is for; None: unknown.
    """

    def __init__(self, values: Mapping[str, Any], ranks: int | None = None):
        self.values, self.ranks = dict(values), ranks
        self.sections: dict[str, Any] = {}
        self.entries: list[Entry] = []
        self.told: set[str] = set()
        self.refused: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or a default where the key is missing, empty (null) or refused by `require`."""
        value = self.values.get(key)
        return default if value is None or key in self.refused else value

    def require(self, convert: Callable[[Any], Any], *keys: str) -> None:
        """Convert the values of keys with which something is computed; refuse those that cannot be, such as `$LAYERS`.

        Args:
            convert: raises ValueError, with the reason.
            keys: those that the file lacks are passed over.
        """
        for key in keys:
            value = self.get(key)
            if value is None:
                continue
            try:
                self.values[key] = convert(value)
            except ValueError as error:
                self.tell(key, "not expressible", str(error))
                self.refused.add(key)

    def put(self, path: str, value: Any) -> None:
        """Set a key of the config."""
        *parents, last = path.split(".")
        section = self.sections
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value

    def tell(self, key: str, state: State, note: str, value: Any = ABSENT) -> None:
        """Say what became of a key; the first verdict stays."""
        if key not in self.told:
            self.told.add(key)
            shown = self.values.get(key) if value is ABSENT else value
            self.entries.append(Entry(key, shown, state, note, key in self.values))

    def understood(self, path: str, value: Any, *keys: str) -> None:
        """Set a key of the config from several keys of the file."""
        self.put(path, value)
        for key in keys:
            if key in self.values:
                self.tell(key, "understood", path)

    def apply(self, rules: Mapping[str, Rule], prefixes: Mapping[str, str]) -> None:
        """Judge every key that nobody has judged, and the defaults of those that the file leaves out.

        Args:
            rules: by key.
            prefixes: why keys that begin so are ignored.
        """
        for key, value in self.values.items():
            rule = rules.get(key)
            prefix = next((each for each in prefixes if key.startswith(each)), None)
            if key in self.told:
                continue
            if rule is not None:
                self._judge(key, value, rule)
            elif prefix is not None:
                self.tell(key, "ignored", prefixes[prefix])
            else:
                self.tell(key, "unknown", "not a key that moeport knows of; what it does is not in the config")
        for key, rule in rules.items():
            if rule.default is not ABSENT and key not in self.told:
                self._judge(key, rule.default, rule)

    def _judge(self, key: str, value: Any, rule: Rule) -> None:
        if rule.only is not None:
            is_same = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in rule.only)
            note = rule.why if not is_same else "as here"
            self.tell(key, "ignored" if is_same else "not expressible", note, value)
        elif not rule.path:
            self.tell(key, "ignored", rule.why, value)
        else:
            try:
                self.put(rule.path, value if rule.convert is None else rule.convert(value))
            except ValueError as error:
                self.tell(key, "not expressible", str(error), value)
                return
            self.tell(key, "understood", rule.path, value)
