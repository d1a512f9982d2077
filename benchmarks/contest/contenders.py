"""The table of all contenders."""

from __future__ import annotations

from collections.abc import Sequence

from contest.contender import Contender
from contest.ours import LIMITS, ours
from contest.peers import PEERS


def contenders(device: str, wanted: Sequence[str] = ()) -> dict[str, Contender]:
    """All contenders of a device by name.

    Args:
        device: its type.
        wanted: texts in the names of those that take part, besides the limits; a text that begins with = is the whole
            name. Empty: all take part.
    """
    found = [*LIMITS, *ours(device), *PEERS]
    return {each.name: each for each in found if not wanted or each.group == "limit" or is_wanted(each.name, wanted)}


def is_wanted(name: str, wanted: Sequence[str]) -> bool:
    """Whether one of the texts is in a name, or is the whole of it after a =."""
    return any(name == text[1:] if text.startswith("=") else text.lower() in name.lower() for text in wanted)
