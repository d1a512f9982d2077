"""What the cache holds of a config's data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moeport.config.data import SEQUENCES_PER_CYCLE, DataConfig, MixedSource
from moeport.data.documents import Corpus, size_label
from moeport.data.entry import SIDES, Entry
from moeport.data.left_out import LeftOut
from moeport.data.prepare_mixture import known_tokenizer, read_sources
from moeport.data.sampler import apportioned
from moeport.data.scans import scanned
from moeport.data.split import Progress
from moeport.data.token_files import read_metadata
from moeport.data.tokenizer_file import given_tokenizer
from moeport.errors import DataError
from moeport.pages.words import counted


def described(config: DataConfig, progress: Progress = lambda what, done, total: None) -> list[str]:
    """Lines that say how far the data of a config have been ingested; nothing is written but what was scanned.

    Args:
        config: the data.
        progress: is told how much was read.

    Raises:
        DataError: the data cannot be used.
    """
    if config.streams:
        return _of_mixture(config, progress)
    left_out = LeftOut()
    corpus = scanned(config, left_out, progress)
    entry = Entry(config, corpus, given_tokenizer(config))
    return [*_of_entry(entry, corpus), *left_out.lines()]


def _of_mixture(config: DataConfig, progress: Progress) -> list[str]:
    left_out: list[str] = []
    corpora, _ = read_sources(config, left_out.append, progress)
    tokenizer = known_tokenizer(config, corpora)

    def of_sources(sources: Sequence[MixedSource]) -> Iterator[str]:
        per_cycle = apportioned([each.weight for each in sources], SEQUENCES_PER_CYCLE).tolist()
        for each, number in zip(sources, per_cycle, strict=True):
            if len(sources) > 1 or not config.domains:
                yield f"source      {each.name}: {number:,} of every {SEQUENCES_PER_CYCLE:,} sequences"
            corpus = corpora[each.name]
            if tokenizer:
                yield from _of_entry(Entry(config, corpus, tokenizer), corpus)
            else:
                yield from (_line(name, corpus, "not ingested") for name in SIDES)

    lines = [*of_sources(config.sources)]
    for number, domain in enumerate(config.domains):
        lines += [dealt_label(number, domain.name, len(config.domains)), *of_sources(domain.streams)]
    return lines + left_out


def dealt_label(number: int, name: str, domains: int) -> str:
    """A line that says which nodes train on a domain, such as `domain      c: nodes 1, 3, 5, ..`."""
    nodes = ", ".join(str(node) for node in range(number, 3 * domains, domains))
    return f"domain      {name}: nodes {nodes}, .."


def _of_entry(entry: Entry, corpus: Corpus) -> list[str]:
    lines, shards = [f"folder      {entry.folder}"], entry.shards()
    for name in SIDES:
        if entry.is_complete:
            state = _complete(entry, name)
        elif name in shards:
            tokens = sum(shard.num_tokens for shard in shards[name])
            state = f"interrupted: {tokens:,} tokens in {_shards(len(shards[name]))}"
        else:
            state = "not ingested"
        lines.append(_line(name, corpus, state))
    return lines


def _line(name: str, corpus: Corpus, state: str) -> str:
    return f"{name:<12}{size_label(corpus[SIDES.index(name)])}; {state}"


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
    return counted(number, "shard")
