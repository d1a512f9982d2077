"""A rule that involves several keys."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A condition over the values of some keys."""

    reads: tuple[str, ...]
    """The keys, the one to change first. The rule is skipped if the chosen router, tokenizer or source lacks one."""
    holds: Callable[..., bool]
    """Whether their values, in this order, are valid."""
    wrong: str | Callable[..., str]
    """What is wrong: a text, in which {0}, {1} are the values, or a function of the values."""
    expected: str | Callable[..., str]
    """What the first key should be: a text or a function, as above."""
    recorded: bool = False
    """Whether runs were recorded that break it, before it was a rule; their configs can still be read."""


@dataclass(frozen=True)
class Effect:
    """An option that has an effect only under some values of another."""

    option: str
    selector: str
    values: tuple[str | None, ...]
    """The values of the selector under which the option has an effect."""
