"""From a config to cached token files: read, tokenize, pack."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from moeport.config.data import DataConfig
from moeport.data.documents import check_split
from moeport.data.entry import Entry, PreparedData, Work, check_length
from moeport.data.left_out import LeftOut
from moeport.data.prepare_mixture import prepare_mixture
from moeport.data.scans import forgotten_if_changed, scanned
from moeport.data.sources import split_rule
from moeport.data.split import Progress
from moeport.data.tokenizer_file import given_tokenizer

SECONDS_BETWEEN_LINES = 15.0


def prepare_data(
    config: DataConfig,
    *,
    report: Callable[[str], None],
    progress: Progress | None = None,
    workers: int | None = None,
) -> PreparedData:
    """The tokens that the config describes, taken from the cache if they are there.

    Memory does not depend on the size of the source, but on its longest document and on the number of workers.

    Args:
        config: source, tokenizer and sequence length.
        report: receives messages and warnings.
        progress: is told how much was done; None: `report` is, now and then.
        workers: processes that encode; None: one per core, unless there is little text.

    Raises:
        DataError: the data or the tokenizer cannot be used, or the training text is shorter than one sequence.
        WriteError: the cache cannot be written.
    """
    work = Work(report, progress or _lines(report), workers)
    if config.streams:
        return prepare_mixture(config, work)
    left_out = LeftOut()
    corpus = scanned(config, left_out, work.progress)
    check_split(corpus, split_rule(config), left_out)
    for line in left_out.lines():
        report(line)
    entry = Entry(config, corpus, given_tokenizer(config))
    with forgotten_if_changed(config):
        data = replace(entry.load(report) or entry.build(work), unreadable=left_out.unreadable)
    check_length(data.train, config.sequence_length)
    return data


def _lines(report: Callable[[str], None]) -> Progress:
    """Progress as a line now and then."""
    last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            report(f"{what}: {done / 1e9:.2f}{f' of {total / 1e9:.2f}' if total else ''} GB")

    return tell
