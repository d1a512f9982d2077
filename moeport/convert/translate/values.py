"""From the values of another framework's keys to ours; each raises ValueError, with the reason, for any other value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LEAST, MOST = -1e30, 1e30
"""Numbers are between them; NaN is not."""


def choice(**values: Any) -> Callable[[Any], Any]:
    """Converts named values; others have no counterpart."""

    def convert(value: Any) -> Any:
        if str(value) not in values:
            raise ValueError(f"moeport has {', '.join(values)} only")
        return values[str(value)]

    return convert


def integer(value: Any) -> int:
    """Converts whole numbers."""
    if number(value) % 1:
        raise ValueError(f"no whole number: {value}")
    return int(value)


def number(value: Any) -> float:
    """Converts numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST < value < MOST:
        raise ValueError(f"no number: {value}")
    return float(value)


def name(value: Any) -> str:
    """Converts names."""
    if not isinstance(value, str):
        raise ValueError(f"no name: {value}")
    return value


def switch(value: Any) -> bool:
    """Converts true and false."""
    if value not in (True, False):
        raise ValueError(f"neither true nor false: {value}")
    return bool(value)
