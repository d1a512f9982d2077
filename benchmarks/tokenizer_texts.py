"""What benchmarks of tokenizers share: texts, of the user or installed here, and contenders that take turns."""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ingest import watched

from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.pretokens import cut

SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".cpp", ".js", ".ts", ".md", ".rst", ".txt")
LONGEST_BYTES = 1_000_000
DOCUMENT = 2**16
"""Characters of a document; longer texts are cut where every pattern ends a pre-token."""


def read_texts(paths: Sequence[Path], megabytes: float) -> list[str]:
    """Documents of about this much UTF-8 in all.

    Args:
        paths: files and folders; none: the standard library and all installed packages.
        megabytes: how much to read; less if there is less.
    """
    documents: list[str] = []
    size = 0
    for text in _texts(paths):
        for document in cut([text], size=DOCUMENT):
            documents.append(document)
            size += len(document.encode())
            if size >= megabytes * 1e6:
                return documents
    return documents


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in sorted(_files(paths) if paths else _installed()):
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        yield from (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _installed() -> Iterator[Path]:
    roots = {Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib", "platlib")}
    found = {path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    yield from (path for path in found if path.stat().st_size <= LONGEST_BYTES)


def parser_of(description: str | None, contenders: Collection[str]) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="files and folders (default: what is installed)"
    )
    parser.add_argument("--megabytes", type=float, default=50.0)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--pattern", choices=PATTERNS, default="digits")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=contenders, help=argparse.SUPPRESS)
    return parser


def take_turns(contenders: Iterable[str], rounds: int) -> Iterator[tuple[int, str, dict[str, Any], float]]:
    """Runs this script with `--one` for each contender in each round.

    Yields the round, the contender, what it printed last, which is JSON, and its peak memory in MB.
    """
    for number, name in product(range(1, rounds + 1), contenders):
        _, memory, lines = watched([sys.executable, *sys.argv, "--one", name])
        yield number, name, json.loads(lines[-1][1]), sum(memory)
