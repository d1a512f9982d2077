"""Problems in a config, and where they are."""

from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Place:
    """Where a key or value was given; places sort in reading order, the file before the overrides."""

    order: tuple[int, int, int]
    """(0, line, column) in the file, (1, index, column) in an override; all from 0."""
    text: str = field(default="", compare=False)
    """`config.yaml:3:5` or `--set a.b=c`; empty for values given in Python."""

    @property
    def is_override(self) -> bool:
        """Whether it was given on the command line."""
        return self.order[0] == 1


NOWHERE = Place((0, 0, 0))
LONGEST_KEY = 200
"""Characters up to which a message shows a key whole."""


@dataclass(frozen=True)
class Problem:
    """One fault of a config. Converted to a string, it is one line of the error message."""

    key: str
    """Dotted path of the key to change; empty for the file as a whole."""
    wrong: str
    """What is wrong."""
    got: str = ""
    """The value as it was written."""
    expected: str = ""
    """Describes correct values."""
    hint: str = ""
    """The key or value that was probably meant."""
    place: Place = NOWHERE
    related: tuple[str, ...] = ()
    """Other keys that the fault depends on or casts doubt on."""

    def __str__(self) -> str:
        key = self.key if len(self.key) <= LONGEST_KEY else f"{self.key[: LONGEST_KEY // 2]}...{self.key[-20:]}"
        where = " ".join(part for part in (self.place.text, key) if part)
        got = f" (got {self.got})" if self.got else ""
        expected = f"; expected {self.expected}" if self.expected else ""
        hint = f"; did you mean {self.hint}?" if self.hint else ""
        return f"{where}: {self.wrong}{got}{expected}{hint}"
