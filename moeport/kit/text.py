"""A file of the kit in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from moeport.kit.read import KitFile
from moeport.kit.result import WORDS
from moeport.pages.tables import Table
from moeport.version import described

STYLES = {"pass": "bold green", "warn": "bold yellow", "fail": "bold red", "skipped": "yellow"}


def render(kit: KitFile) -> Group:
    """For `rich.console.Console.print`: the machine, the verdicts, then the tables of what has not passed."""
    results = kit.results
    parts: list[RenderableType] = [Text(headline(results), style=STYLES.get(results["verdict"], ""))]
    parts += [Text(f"{label}: {value}") for label, value in facts(results)]
    verdicts = RichTable(box=None, padding=(0, 2, 0, 0), show_header=False)
    for part in results["parts"]:
        style = STYLES.get(part["verdict"], "")
        verdicts.add_row(
            part["name"], Text(part["verdict"], style=style), f"{part['seconds']:.0f} s", Text(part["summary"])
        )
    parts += [Text(), verdicts]
    for part in results["parts"]:
        if part["verdict"] in ("warn", "fail"):
            parts += [Text(), Text(f"{part['name']}: {part['title']}", style="bold"), *_tables(part)]
    return Group(*parts)


def _tables(part: Mapping[str, Any]) -> Iterator[RenderableType]:
    for table in part["tables"]:
        yield Table(table["title"], table["header"], table["rows"]).drawn()


def headline(results: Mapping[str, Any]) -> str:
    """The verdict in a line."""
    verdicts = [part["verdict"] for part in results["parts"]]
    words = [f"{verdicts.count(verdict)} {word}" for verdict, word in WORDS.items()]
    end = ", interrupted" if results["interrupted"] else ""
    return f"moeport kit of {results['date']}: {results['verdict']} ({', '.join(words)}{end})"


def facts(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was examined: labels and values."""
    yield "moeport", f"{results['moeport']} ({described(results.get('commit'))})"
    for label, value in results["machine"].items():
        yield str(label), as_text(value)
    yield "asked for", as_text(results["asked"])


def as_text(value: Any) -> str:
    """A value of JSON in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
