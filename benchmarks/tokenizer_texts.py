"""Texts for benchmarks of tokenizers: files of the user, or the sources that are installed here."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

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
