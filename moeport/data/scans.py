"""What was found when a large source was read, so that it need not be read again while its files stay the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moeport.config.data import DataConfig
from moeport.core.section import Section
from moeport.data.cache import cache_dir
from moeport.data.documents import ChangedError, Corpus
from moeport.data.left_out import LeftOut
from moeport.data.shared import Marks
from moeport.data.sources import open_source
from moeport.data.split import Progress, Stamp, restored, split
from moeport.files import make_folder, write_text
from moeport.reading import read_bytes

VERSION = 2
MIN_BYTES = 2**26
"""Smaller sources are read at every start, which takes a second at most."""
SETTLED_NS = 2 * 10**9
"""Age of a file from which a further change would show in its time of change, whose steps may be coarse."""


class _Scan(Section):
    sizes: list[tuple[int, int, str]]
    """Number, bytes and fingerprint of the documents of each side."""
    marks: str
    """`Marks.packed` of the documents that were left out, since their texts are on the other side."""
    kept_side: str
    unreadable: int
    other_names: int
    notes: list[str]
    faults: list[str]


def scanned(config: DataConfig, left_out: LeftOut, progress: Progress) -> Corpus:
    """The documents of a config's source, split; see `read_documents`.

    A source of more than `MIN_BYTES` whose files have the names, sizes, times of change and inodes that they had is
    taken to be unchanged.

    Args:
        config: source and split.
        left_out: what is left out is added to it.
        progress: is told how much was read.

    Raises:
        DataError: see `read_documents`.
    """
    source = open_source(config, left_out)
    stamp, now = source.stamp(), time.time_ns()
    if config.source.name == "huggingface" or (stamp and sum(size for _, size, *_ in stamp) >= MIN_BYTES):
        folder = cache_dir(config.cache_dir)
        make_folder(folder)
    else:
        return split(source, config.validation_fraction, left_out, None, progress)
    if not stamp or not all(changed < now - SETTLED_NS for _, _, changed, *_ in stamp):
        return split(source, config.validation_fraction, left_out, folder, progress)
    path = _path(config, stamp)
    found = _read(path)
    if found is None:
        corpus = split(source, config.validation_fraction, left_out, folder, progress)
        _keep(path, corpus, left_out)
        return corpus
    left_out.unreadable, left_out.other_names = found.unreadable, found.other_names
    left_out.notes, left_out.faults = found.notes, found.faults
    marks = Marks.unpacked(found.marks)
    left_out.shared, left_out.kept_side = marks.count, found.kept_side
    return restored(source, config.validation_fraction, marks, found.sizes)


@contextmanager
def forgotten_if_changed(config: DataConfig) -> Iterator[None]:
    """A block that reads the documents of a source; if they are not those that were split, it is split anew next time.

    For changes that no time of change shows, as on network storage.
    """
    try:
        yield
    except ChangedError:
        _path(config, open_source(config, LeftOut()).stamp()).unlink(missing_ok=True)
        raise


def _path(config: DataConfig, stamp: Stamp | None) -> Path:
    key = json.dumps([VERSION, *_asked(config), stamp])
    return cache_dir(config.cache_dir) / f"scan-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _asked(config: DataConfig) -> list[Any]:
    """What decides the split of given files."""
    root = [str(config.root)] if config.root else []
    return [config.source.model_dump(mode="json"), config.validation_fraction, *root]


def _read(path: Path) -> _Scan | None:
    try:
        return _Scan.model_validate_json(read_bytes(path))
    except (OSError, ValidationError):
        return None


def _keep(path: Path, corpus: Corpus, left_out: LeftOut) -> None:
    if left_out.marks is None or left_out.is_exchanged or not all(map(len, corpus)):
        return
    write_text(
        path,
        _Scan(
            sizes=[(len(side), side.num_bytes, side.fingerprint) for side in corpus],
            marks=left_out.marks.packed(),
            kept_side=left_out.kept_side,
            unreadable=left_out.unreadable,
            other_names=left_out.other_names,
            notes=left_out.notes,
            faults=left_out.faults,
        ).model_dump_json()
        + "\n",
    )
