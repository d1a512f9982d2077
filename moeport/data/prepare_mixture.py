"""From several sources, or several domains, to their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moeport.config.data import DataConfig, MixedSource
from moeport.data.cache import cache_dir
from moeport.data.documents import Corpus, Document, Documents, Tally, check_split
from moeport.data.domains import DomainTokens
from moeport.data.entry import Entry, PreparedData, Work, check_length
from moeport.data.left_out import LeftOut
from moeport.data.mixture import MixedTokens
from moeport.data.packed import PackedTokens
from moeport.data.scans import MIN_BYTES, forgotten_if_changed, scanned
from moeport.data.shared import Marks, TextHashes, text_digest
from moeport.data.sources import split_rule
from moeport.data.split import TRAIN, VALIDATION, Progress
from moeport.data.tokenizer import Tokenizer, load_tokenizer
from moeport.data.tokenizer_file import given_tokenizer
from moeport.data.trained_tokenizer import train_tokenizer, training_key
from moeport.errors import DataError
from moeport.files import make_folder, write_text

Say = Callable[[str], None]


def prepare_mixture(config: DataConfig, work: Work) -> PreparedData[MixedTokens]:
    """The tokens of all sources of a config; see `prepare_data`."""
    corpora, unreadable = read_sources(config, work.report, work.progress)
    tokenizer = known_tokenizer(config, corpora) or _trained(config, corpora, work.report)
    parts = {}
    for each in config.streams:
        with _naming(config, each), forgotten_if_changed(_own(config, each)):
            entry = Entry(config, corpora[each.name], tokenizer)
            parts[each.name] = entry.load(work.report) or entry.build(work)
            check_length(parts[each.name].train, config.sequence_length)
    return PreparedData(
        _together(config, {name: data.train for name, data in parts.items()}),
        _together(config, {name: data.validation for name, data in parts.items()}),
        tokenizer,
        _baselines(parts),
        unreadable,
    )


def _together(config: DataConfig, streams: Mapping[str, PackedTokens]) -> MixedTokens:
    """One side of the split."""
    if not config.domains:
        return _mixed(config.sources, streams)
    return DomainTokens(
        {
            domain.name: _mixed(domain.streams, streams) if domain.sources else streams[domain.name]
            for domain in config.domains
        }
    )


def _mixed(sources: Sequence[MixedSource], streams: Mapping[str, PackedTokens]) -> MixedTokens:
    return MixedTokens(
        {each.name: streams[each.name] for each in sources}, {each.name: each.weight for each in sources}
    )


def read_sources(config: DataConfig, report: Say, progress: Progress) -> tuple[dict[str, Corpus], int]:
    """The documents of each source, by name, of which none is held out in one and trained on in another.

    Returns them and the number of files and rows that cannot be read.
    """
    corpora, unreadable = {}, 0
    for each in config.streams:
        left_out = LeftOut()
        with _naming(config, each):
            corpora[each.name] = _read(config, each, left_out, progress)
        unreadable += left_out.unreadable
        for line in left_out.lines():
            report(f"{each.name}: {line}")
    return _apart(config, corpora, report, progress), unreadable


def known_tokenizer(config: DataConfig, corpora: Mapping[str, Corpus]) -> Tokenizer | None:
    """The tokenizer of the config, or the one that was trained on these documents before."""
    given = given_tokenizer(config)
    if given:
        return given
    try:
        return load_tokenizer(_tokenizer_path(config, corpora))
    except DataError:
        return None


def _own(config: DataConfig, source: MixedSource) -> DataConfig:
    """The config of one source."""
    return config.model_copy(update={"source": source.source, "sources": (), "domains": ()})


def _read(config: DataConfig, source: MixedSource, left_out: LeftOut, progress: Progress) -> Corpus:
    own = _own(config, source)
    corpus = scanned(own, left_out, progress)
    check_split(corpus, split_rule(own), left_out)
    return corpus


@contextmanager
def _naming(config: DataConfig, source: MixedSource) -> Iterator[None]:
    """Errors of the block name the source."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{_key(config)}, {source.name}: {error}") from error


def _key(config: DataConfig) -> str:
    """The key that lists the sources."""
    return "data.domains" if config.domains else "data.sources"


def _apart(config: DataConfig, corpora: dict[str, Corpus], report: Say, progress: Progress) -> dict[str, Corpus]:
    """The sources without the held-out texts that another one trains on."""
    folder = cache_dir(config.cache_dir)
    key = json.dumps([[side.fingerprint for side in corpus] for corpus in corpora.values()])
    found_apart = folder / f"apart-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if found_apart.exists():
        return corpora
    is_large = sum(side.num_bytes for corpus in corpora.values() for side in corpus) >= MIN_BYTES
    if is_large:
        make_folder(folder)
    shared = _shared(corpora, folder if is_large else None, progress)
    if not shared.count:
        if is_large:
            write_text(found_apart, "{}\n")
        return corpora
    report(f"{shared.count:,} held-out documents left out, since another source trains on the same text")
    first, apart = 0, {}
    for name, corpus in corpora.items():
        held_out = _unmarked(corpus.validation, shared, first)
        if not len(held_out):
            raise DataError(
                f"{_key(config)}, {name}: no text is left for validation, since other sources train on all that was "
                "held out; name validation data of its own"
            )
        apart[name] = Corpus(corpus.train, held_out)
        first += len(corpus.validation)
    return apart


def _shared(corpora: Mapping[str, Corpus], folder: Path | None, progress: Progress) -> Marks:
    """The held-out texts, counted over all sources, that some source trains on."""
    done = 0
    with TextHashes(folder) as hashes:
        for side in (TRAIN, VALIDATION):
            for corpus in corpora.values():
                for document in corpus[side]:
                    data = document.text.encode()
                    hashes.add(side, text_digest(data))
                    done += len(data)
                    progress("comparing sources", done, 0)
        return hashes.shared(VALIDATION)


def _unmarked(documents: Documents, marks: Marks, first: int) -> Documents:
    """The documents that are not marked; `first` is the mark of the first one."""

    def read() -> Iterator[Document]:
        return (document for ordinal, document in enumerate(documents, first) if ordinal not in marks)

    tally = Tally()
    for document in read():
        tally.add(document.key, document.text.encode())
    return Documents(read, tally.count, tally.num_bytes, tally.fingerprint)


def _trained(config: DataConfig, corpora: Mapping[str, Corpus], report: Say) -> Tokenizer:
    tokenizer = train_tokenizer(config, [corpus.train for corpus in corpora.values()], report)
    tokenizer.save(_tokenizer_path(config, corpora))
    return tokenizer


def _tokenizer_path(config: DataConfig, corpora: Mapping[str, Corpus]) -> Path:
    trained_on = [corpus.train.fingerprint for corpus in corpora.values()]
    key = json.dumps([*training_key(config.tokenizer), trained_on])
    return cache_dir(config.cache_dir) / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _baselines(parts: Mapping[str, PreparedData[PackedTokens]]) -> dict[str, float]:
    """Bits per byte of all held-out documents, from those of each source."""
    total = sum(data.validation.num_bytes for data in parts.values())
    names = next(iter(parts.values())).baselines
    return {
        name: sum(data.baselines[name] * data.validation.num_bytes for data in parts.values()) / total for name in names
    }
