"""A line of metrics.jsonl as a record, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_origin, get_type_hints

from moeport.training.metrics_table import ROWS, EvaluationMetrics, Kind, Record, StepMetrics

_NUMBERS = {int, float, type(None)}
_LIMIT = 2**63
"""Integers below it in magnitude are numbers of 64 bits."""


@dataclass(frozen=True)
class _Known:
    """What a field of a record may be."""

    name: str
    is_needed: bool
    is_valid: Callable[[Any], bool]
    """Whether a value is of its type."""
    expected: str
    null: float | None
    """What null means."""


def _known(kind: Kind) -> list[_Known]:
    hints, rows = get_type_hints(kind), ROWS[kind]
    return [
        _Known(
            each.name,
            each.default is MISSING and each.default_factory is MISSING,
            *_kind(hints[each.name]),
            None if rows[each.name].null_is_none else math.nan,
        )
        for each in fields(kind)
    ]


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record is that of an evaluation rather than of a step."""
    return "val_loss" in record


def parsed(record: Any) -> Record | None:
    """The record; None for a step that was skipped.

    Raises ValueError, which says what is wrong, for what is none.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a metrics record: expected an object")
    step = record.get("step")
    if type(step) is not int or not 1 <= step < _LIMIT:
        raise ValueError(f"is not a metrics record: step is {_short(step)}, expected an integer of at least 1")
    if record.get("skipped") is True:
        return None
    kind: Kind = EvaluationMetrics if is_evaluation(record) else StepMetrics
    values: dict[str, Any] = {}
    for known in _KNOWN[kind]:
        name = known.name
        if name not in record:
            if known.is_needed:
                raise ValueError(f"has no {name}, which every record of its kind needs")
            continue
        value = record[name]
        if not known.is_valid(value):
            raise ValueError(f"{name} is {_short(value)}, expected {known.expected}")
        values[name] = known.null if value is None else value
    return kind(**values)


def _kind(hint: Any) -> tuple[Callable[[Any], bool], str]:
    """Whether a value is of the type of a field, and what that is."""
    if get_origin(hint) is list:
        (entry,) = get_args(hint)
        if get_origin(entry) is list:
            return _is_list_of_lists, "a list of lists of numbers"
        return (_is_list_of_counts, "a list of integers") if entry is int else (_is_list, "a list of numbers")
    if any(get_origin(choice) is dict for choice in get_args(hint)):
        return _is_mapping, "a mapping of numbers"
    return _is_number, "a number"


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS and (type(value) is not int or abs(value) < _LIMIT)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_list(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    kinds = set(map(type, value))
    return kinds <= _NUMBERS and (int not in kinds or all(map(_is_number, value)))


def _is_list_of_counts(value: Any) -> bool:
    return _is_list(value) and None not in value


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_list, value))


def _short(value: Any) -> str:
    return json.dumps(value)[:40]


_KNOWN = {kind: _known(kind) for kind in (StepMetrics, EvaluationMetrics)}
