"""Reads files of other frameworks: YAML, TOML, JSON, and shell scripts with command-line options."""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moeport.config.yaml_text import MOST_BYTES, MOST_VALUES, expanded
from moeport.errors import UserError
from moeport.reading import read_text

ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::?[-=]([^{}]*))?\})")
"""With its name, or in braces with its name and the default that `:-` gives."""
ARITHMETIC = re.compile(r"\$\(\(([^()]*)\)\)")
SUM = re.compile(r"\d+(?:[+*-]\d+)*")


def read(path: Path) -> str:
    """The text of a file. Raises UserError if it cannot be read."""
    try:
        return read_text(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, dotted. Raises UserError."""
    text = read(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: is not a mapping of keys to values")
        if expanded(root, {}) > MOST_VALUES:
            raise UserError(f"{path}: has more than {MOST_VALUES:,} keys and values, with those that aliases repeat")
        return flat(loader.construct_document(root))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path}: is not valid YAML: nested too deeply") from error
    except ValueError as error:  # such as a date in a thirteenth month
        raise UserError(f"{path}: is not valid YAML: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file, dotted. Raises UserError."""
    text = read(path)
    try:
        return flat(tomllib.loads(text))
    except RecursionError as error:
        raise UserError(f"{path}: is not valid TOML: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys with dots for sections; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = scalar(value) if isinstance(value, str) else value
    return found


def scalar(text: str) -> Any:
    """A number, true or false if the text is one, otherwise the text; YAML takes 1e-5 for text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def read_options(path: Path) -> dict[str, Any]:
    """The options of a command in a shell script, without their dashes: `--num-layers 24` is num_layers, 24.

    An option without a value is True, one with several has a list. Variables that the script sets or gives a default
    (`${X:-1}`), and sums of products of whole numbers, are filled in; others stay as they are written.

    Raises UserError if the script cannot be read.
    """
    text = ARITHMETIC.sub(lambda match: match[0].replace(" ", ""), read(path).replace("\\\n", " "))
    try:
        words = _words(text, {})
    except ValueError as error:
        raise UserError(f"{path}: no shell script: {error}") from error
    return _options(words)


def _words(text: str, variables: dict[str, str]) -> list[str]:
    """The words of a script in order, with variables filled in; those that it sets are added to `variables`.

    The end of a line is a word.
    """
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n")
    lexer.whitespace, lexer.whitespace_split = " \t\r", True
    words = []
    for word in lexer:
        assignment = ASSIGNMENT.fullmatch(word)
        if assignment is None or word.startswith("--"):
            filled = _filled(word, variables)
            # A variable stands for all of its words; its options were read where it is set.
            words += filled.split() if VARIABLE.fullmatch(word) else [filled]
            continue
        value = _filled(assignment[2], variables)
        if len(value) > MOST_BYTES:
            raise ValueError(f"the value of {assignment[1]} is longer than {MOST_BYTES:,} characters")
        variables[assignment[1]] = value
        if "--" in value:
            words += _words(value, variables)
    return words


def _filled(word: str, variables: Mapping[str, str]) -> str:
    """A word with the variables that are known, and with sums and products computed."""

    def computed(match: re.Match[str]) -> str:
        inner = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), match[1])
        return str(_value(inner)) if SUM.fullmatch(inner) else match[0]

    def value(match: re.Match[str]) -> str:
        known = variables.get(match[1] or match[2])
        if match[3] is None:
            return match[0] if known is None else known
        return known or match[3].strip("\"'")

    word = VARIABLE.sub(value, word)
    return ARITHMETIC.sub(computed, word)


def _value(text: str) -> int:
    """A sum of products of whole numbers, without spaces."""
    total = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", text):
        product = math.prod(int(factor) for factor in term.split("*"))
        total += -product if sign == "-" else product
    return total


def _options(words: list[str]) -> dict[str, Any]:
    """Options by name; words that belong to none are left out."""
    found: dict[str, list[Any]] = {}
    values: list[Any] | None = None
    for word in words:
        name = word.removeprefix("(")
        if name.startswith("--") and len(name) > 2:
            key, equals, value = name[2:].partition("=")
            values = found[key.replace("-", "_")] = [scalar(value)] if equals else []
        elif not word.strip("\n();|&") or word.endswith(".py") or "[@]" in word:
            values = None
        elif values is not None:
            values.append(scalar(word.removesuffix(")") if "(" not in word else word))
    return {key: True if not given else given[0] if len(given) == 1 else given for key, given in found.items()}
