"""Options in groups: each field of a dataclass is an option."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from moeport.cli.options import Flags, grouped


@dataclass(frozen=True)
class Fruit:
    kind: str
    count: int = 2
    basket: Path | None = None


FruitFlags = Annotated[
    Fruit,
    Flags(kind=typer.Option(help="Which."), count=typer.Option("--count", "-n", min=1), basket=typer.Option()),
]
PEARS = Fruit("pear", 5)
SEEN: list[tuple] = []


@grouped
def required(price: int, fruit: FruitFlags, *, organic: bool = False) -> None:
    SEEN.append((price, fruit, organic))


@grouped
def with_defaults(fruit: FruitFlags = PEARS) -> None:
    SEEN.append((fruit,))


def run(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    SEEN.clear()
    return CliRunner().invoke(app, arguments)


def test_the_command_gets_the_dataclass():
    run(required, "--kind", "apple", "-n", "3", "--basket", "here", "--organic", "7")
    assert [(7, Fruit("apple", 3, Path("here")), True)] == SEEN


def test_defaults_are_those_of_the_fields_or_of_the_parameter():
    run(required, "--kind", "apple", "7")
    run(with_defaults)
    assert SEEN == [(PEARS,)]
    run(with_defaults, "--kind", "plum")
    assert [(Fruit("plum", 5),)] == SEEN


@pytest.mark.parametrize("arguments", [("7"), ("--kind", "a", "--price", "7", "--count", "0")])
def test_fields_without_a_default_and_limits_are_checked(arguments):
    done = run(required, *arguments)
    assert (done.exit_code, SEEN) == (2, [])


def test_help_shows_each_field_in_order():
    text = run(required, "--help").output
    places = [text.index(f"--{name}") for name in ("kind", "count", "basket", "organic")]
    assert places == sorted(places)
