"""What a rule over several keys is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A condition over the values of some keys."""

    reads: tuple[str, ...]
    """The keys, that to change first. Where the chosen router, tokenizer or source lacks one, the rule is skipped."""
    holds: Callable[..., bool]
    """Whether their values, in this order, are right."""
    wrong: str | Callable[..., str]
    """What is wrong; {0}, {1} are the values. Or a function of the values."""
    expected: str | Callable[..., str]
    """What the first key should be, likewise."""


@dataclass(frozen=True)
class Effect:
    """An option that has an effect only under some values of another."""

    option: str
    selector: str
    values: tuple[str, ...]
    """The values of the selector under which the option has an effect."""
