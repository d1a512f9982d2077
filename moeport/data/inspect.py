"""What the cache holds of a config's data."""

from __future__ import annotations

from moeport.config.data import DataConfig
from moeport.data.documents import size_label
from moeport.data.entry import SIDES, Entry
from moeport.data.left_out import LeftOut
from moeport.data.prepare import given_tokenizer
from moeport.data.scans import scanned
from moeport.data.split import Progress
from moeport.data.token_files import read_metadata
from moeport.errors import DataError


def described(config: DataConfig, progress: Progress = lambda what, done, total: None) -> list[str]:
    """Lines that say how far the data of a config have been ingested; nothing is written but what was scanned.

    Args:
        config: the data.
        progress: is told how much was read.

    Raises:
        DataError: the data cannot be used.
    """
    left_out = LeftOut()
    corpus = scanned(config, left_out, progress)
    entry = Entry(config, corpus, given_tokenizer(config))
    lines = [f"folder      {entry.folder}", *(f"            {line}" for line in left_out.lines())]
    shards = entry.shards()
    for name, documents in zip(SIDES, corpus, strict=True):
        if entry.is_complete:
            state = _complete(entry, name)
        elif name in shards:
            tokens = sum(shard.num_tokens for shard in shards[name])
            state = f"interrupted: {tokens:,} tokens in {_shards(len(shards[name]))}"
        else:
            state = "not ingested"
        lines.append(f"{name:<12}{size_label(documents)}; {state}")
    return lines


def _complete(entry: Entry, name: str) -> str:
    try:
        metadata = read_metadata(entry.folder / f"{name}.tokens")
    except DataError as error:
        return f"damaged ({error})"
    return (
        f"{metadata.num_tokens:,} tokens in {_shards(len(metadata.files))} of {metadata.dtype.itemsize} bytes per "
        f"token, vocabulary of {metadata.vocab_size:,}"
    )


def _shards(number: int) -> str:
    return f"{number:,} shard{'' if number == 1 else 's'}"
