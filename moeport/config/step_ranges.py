"""Ranges of steps, such as `120-125`, as a config lists them."""

import re
from collections.abc import Iterable

_RANGE = re.compile(r"(\d{1,15})(?:-(\d{1,15}))?")


def is_range(text: str) -> bool:
    """Whether a text is a step or a range of steps, counted from 1, such as `120` or `120-125`."""
    return _ends(text) is not None


def merged(ranges: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """First and last step of each stretch of steps, ascending; stretches that meet or overlap are one."""
    stretches: list[tuple[int, int]] = []
    for first, last in sorted(ends for text in ranges if (ends := _ends(text))):
        if stretches and first <= stretches[-1][1] + 1:
            stretches[-1] = (stretches[-1][0], max(last, stretches[-1][1]))
        else:
            stretches.append((first, last))
    return tuple(stretches)


def shown(stretches: Iterable[tuple[int, int]]) -> str:
    """Stretches as text, such as `7, 120-125`."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in stretches)


def up_to(stretches: Iterable[tuple[int, int]], step: int) -> tuple[tuple[int, int], ...]:
    """The parts of stretches that lie at `step` or before."""
    return tuple((first, min(last, step)) for first, last in stretches if first <= step)


def count(stretches: Iterable[tuple[int, int]]) -> int:
    """Number of steps in stretches."""
    return sum(last - first + 1 for first, last in stretches)


def _ends(text: str) -> tuple[int, int] | None:
    found = _RANGE.fullmatch(text)
    if found is None:
        return None
    first, last = int(found[1]), int(found[2] or found[1])
    return (first, last) if 1 <= first <= last else None
