"""What the ranks of a job must have alike, compared: a sentence that names each difference with the ranks' values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 3
"""Number of differences that are spelt out."""
LONGEST = 80
"""Characters of a value that are shown."""
ABSENT = "absent"


@dataclass(frozen=True)
class Topic:
    """Values of one kind that ranks must have alike."""

    remedy: str
    """What to do if they differ, as an imperative."""
    values: Mapping[str, Any]
    """By key; of JSON."""

    def sent(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def disagreement(topics: Sequence[Sequence[Mapping[str, Any]]]) -> str | None:
    """What the ranks do not have alike, in one sentence; None if there is nothing.

    Args:
        topics: of each rank, as JSON.
    """
    remedies: dict[str, str] = {}
    values: list[dict[str, str]] = []
    for own in topics:
        flat: dict[str, str] = {}
        for topic in own:
            for key, value in topic["values"].items():
                flat[key] = json.dumps(value, sort_keys=True, ensure_ascii=False)
                remedies.setdefault(key, topic["remedy"])
        values.append(flat)
    different = [key for key in remedies if len({flat.get(key) for flat in values}) > 1]
    if not different:
        return None
    if len(different) == 1:
        key = different[0]
        return f"the ranks disagree on {key}: {_by_rank(key, values)}; {remedies[key]}"
    named = ", ".join(f"{key} ({_by_rank(key, values)})" for key in different[:SHOWN])
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    todo = "; ".join(dict.fromkeys(remedies[key] for key in different))
    return f"the ranks disagree on {len(different)} things: {named}{more}; {todo}"


def _by_rank(key: str, values: Sequence[Mapping[str, str]]) -> str:
    ranks: dict[str | None, list[int]] = {}
    for rank, flat in enumerate(values):
        ranks.setdefault(flat.get(key), []).append(rank)
    texts = _short([ABSENT if value is None else value for value in ranks])
    return ", ".join(f"{text} on {name_ranks(found)}" for text, found in zip(texts, ranks.values(), strict=True))


def _short(values: Sequence[str]) -> list[str]:
    """Values cut to a readable length, around the first character in which they differ."""
    first = next((i for i, letters in enumerate(zip(*values, strict=False)) if len(set(letters)) > 1), 0)
    start = max(first - LONGEST // 2, 0) if any(len(value) > LONGEST for value in values) else 0
    return [
        f"{'...' if start and value else ''}{value[start : start + LONGEST]}{'...' * (len(value) > start + LONGEST)}"
        for value in values
    ]


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 2`, `ranks 0-3` or `ranks 0, 2, 5-7`; ascending."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
