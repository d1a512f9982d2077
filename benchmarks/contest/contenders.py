"""The table of all contenders."""

from __future__ import annotations

from collections.abc import Sequence

from contest.contender import Contender
from contest.ours import LIMITS, ours
from contest.peers import PEERS


def contenders(device: str, wanted: Sequence[str] = ()) -> dict[str, Contender]:
    """All contenders of a device by name; with `wanted`, those whose names contain one of its texts, and the limits."""
    found = [*LIMITS, *ours(device), *PEERS]
    kept = [
        each
        for each in found
        if not wanted or each.group == "limit" or any(text.lower() in each.name.lower() for text in wanted)
    ]
    return {each.name: each for each in kept}
