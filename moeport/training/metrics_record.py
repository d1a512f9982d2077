"""A line of metrics.jsonl as a record, checked."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from typing import Any, get_origin, get_type_hints

from moeport.training.metrics_table import ROWS, EvaluationMetrics, Kind, Record, StepMetrics

_LISTS = {
    kind: {name for name, hint in get_type_hints(kind).items() if get_origin(hint) is list}
    for kind in (StepMetrics, EvaluationMetrics)
}


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
    if type(step) is not int or not 1 <= step < 2**63:
        raise ValueError(f"is not a metrics record: step is {_short(step)}, expected an integer of at least 1")
    if record.get("skipped") is True:
        return None
    kind: Kind = EvaluationMetrics if is_evaluation(record) else StepMetrics
    rows, values = ROWS[kind], dict[str, Any]()
    for known in fields(kind):
        name = known.name
        if name not in record:
            if known.default is MISSING and known.default_factory is MISSING:
                raise ValueError(f"has no {name}, which every record of its kind needs")
            continue
        value = record[name]
        if not (_is_list(value) if name in _LISTS[kind] else _is_number(value)):
            expected = "a list of numbers" if name in _LISTS[kind] else "a number"
            raise ValueError(f"{name} is {_short(value)}, expected {expected}")
        values[name] = math.nan if value is None and not rows[name].null_is_none else value
    return kind(**values)


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_list(value: Any) -> bool:
    """Whether it is a list of numbers or of lists of numbers."""
    return isinstance(value, list) and all(
        all(map(_is_number, entry)) if isinstance(entry, list) else _is_number(entry) for entry in value
    )


def _short(value: Any) -> str:
    return json.dumps(value)[:40]
