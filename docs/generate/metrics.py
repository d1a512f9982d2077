"""The tables of docs/training.md: what each line of metrics.jsonl holds."""

from collections.abc import Mapping

from moeport.training.metric import Metric
from moeport.training.metrics_table import DERIVED, ROWS, EvaluationMetrics, StepMetrics


def steps() -> str:
    """Keys of a step."""
    return _table("Key", {name: row for name, row in ROWS[StepMetrics].items() if name not in DERIVED})


def evaluations() -> str:
    """Keys of an evaluation."""
    return _table("Key", ROWS[EvaluationMetrics])


def derived() -> str:
    """What follows from the keys of a step."""
    return _table("Name", DERIVED)


def _table(head: str, rows: Mapping[str, Metric]) -> str:
    lines = [f"| `{name}` | {row.doc} | {f'`{row.tag}`' if row.tag else ''} |" for name, row in rows.items()]
    return "\n".join([f"| {head} | Meaning | TensorBoard |\n|---|---|---|", *lines])
