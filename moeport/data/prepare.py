"""From a config to cached token files: read, tokenize, pack."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from moeport.config.data import BPETokenizer, DataConfig, FileTokenizer
from moeport.data.documents import Corpus, check_split
from moeport.data.entry import Entry, PreparedData, Work
from moeport.data.left_out import LeftOut
from moeport.data.scans import scanned
from moeport.data.sources import split_rule
from moeport.data.split import Progress
from moeport.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moeport.data.tokenizer_file import tokenizer_file
from moeport.errors import DataError
from moeport.launch.machine import cores_per_rank

MIN_BYTES_FOR_WORKERS = 2**25
"""Less text is encoded before processes would have started."""
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
    progress = progress or _lines(report)
    left_out = LeftOut()
    corpus = scanned(config, left_out, progress)
    check_split(corpus, split_rule(config), left_out)
    for line in left_out.lines():
        report(line)
    entry = Entry(config, corpus, given_tokenizer(config))
    work = Work(report, progress, workers or _workers(config, corpus))
    data = replace(entry.load(report) or entry.build(work), unreadable=left_out.unreadable)
    if not data.train.num_sequences:
        raise DataError(
            f"the training text is too short: it has {data.train.num_tokens:,} tokens and one sequence of "
            f"data.sequence_length {config.sequence_length:,} needs {config.sequence_length + 1:,}; "
            "add documents or lower data.sequence_length"
        )
    return data


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer, or None if it has to be trained.

    Raises:
        DataError: it cannot be found or used.
    """
    if isinstance(config.tokenizer, BPETokenizer):
        return None
    if isinstance(config.tokenizer, FileTokenizer):
        return load_tokenizer(tokenizer_file(config.tokenizer.path), config.tokenizer.end_of_text)
    return ByteTokenizer()


def _workers(config: DataConfig, corpus: Corpus) -> int:
    is_little = corpus.train.num_bytes < MIN_BYTES_FOR_WORKERS
    return 1 if is_little or config.tokenizer.name == "byte" else cores_per_rank(None)


def _lines(report: Callable[[str], None]) -> Progress:
    """Progress as a line now and then."""
    last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            report(f"{what}: {done / 1e9:.2f}{f' of {total / 1e9:.2f}' if total else ''} GB")

    return tell
