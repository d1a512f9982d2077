"""The text that a model is inspected on: whole sequences, each of one dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from moeport.config.data import FilesSource
from moeport.config.schema import Config
from moeport.data import DomainTokens, MixedTokens, PackedTokens, Tokenizer
from moeport.data.document_starts import document_starts
from moeport.data.files import FileReader
from moeport.data.find import find_files
from moeport.data.left_out import LeftOut
from moeport.errors import UserError
from moeport.model.batch import Batch
from moeport.training.task import TextTask, build_task

HELD_OUT = "held-out text"


@dataclass(frozen=True)
class Portion:
    """Sequences that are computed together, all of one dataset."""

    dataset: str
    batch: Batch[np.ndarray]


def held_out_portions(
    config: Config, tokenizer: Tokenizer, tokens: int, batch_size: int, report: Callable[[str], None]
) -> list[Portion]:
    """Sequences that lie evenly spread over the held-out text of a run, the same number from each of its domains.

    Args:
        config: of the run, whose data is prepared if it is not yet.
        tokenizer: of the run.
        tokens: most of them in all, but at least one batch from each domain.
        batch_size: sequences that are computed together.
        report: is given a sentence on what is being prepared.

    Raises: UserError or DataError if the text is no longer that of the run.
    """
    task = build_task(config, report=report)
    assert isinstance(task, TextTask)  # a model of images is refused before
    if task.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{config.run.dir}: its data now gives another tokenizer than the one that it was trained with; expected "
            "the same data, or --text FILES"
        )
    held_out = task.data.validation
    has_domains = isinstance(held_out, DomainTokens)
    parts = held_out.parts if isinstance(held_out, DomainTokens) else {HELD_OUT: held_out}
    found = []
    for number, (name, stream) in enumerate(parts.items()):
        domain = number if has_domains else None
        for token_BS, target_BS in _spread(stream, tokens // len(parts), batch_size, config.data.sequence_length):
            found.append(portion(name, token_BS, target_BS, task.first_token, domain))
    return found


def file_portions(
    paths: Sequence[str], tokenizer: Tokenizer, config: Config, tokens: int, batch_size: int
) -> tuple[list[Portion], list[str]]:
    """Sequences of the texts in files, packed as in training: documents one after the other, between ends of text.

    Each of `paths` is a dataset; of a single one, each kind of file is.

    Args:
        paths: files, folders or globs.
        tokenizer: of the model.
        config: of the model.
        tokens: most of them in all, the first of each dataset, but at least one sequence.
        batch_size: sequences that are computed together.

    Returns: (the sequences, a sentence on each file or dataset that was left out).

    Raises: UserError or DataError for files that cannot be used.
    """
    reader, left_out = FileReader(FilesSource(paths=tuple(paths))), LeftOut()
    datasets: dict[str, list[str]] = {}
    for pattern in paths:
        for path in find_files([pattern], (), reader.is_readable, reader.kinds, "--text", left_out):
            name = pattern if len(paths) > 1 else Path(path).suffix or Path(path).name
            datasets.setdefault(name, []).append(path)
    length, end = config.data.sequence_length, tokenizer.end_of_text
    sequences = max(1, tokens // len(datasets) // length)
    found = []
    for name, files in datasets.items():
        stream = np.array([end, *islice(_ids(reader, files, tokenizer, left_out), sequences * length)], np.int64)
        if len(stream) <= length and len(stream) > 1:  # not even one whole sequence
            found.append(portion(name, stream[None, :-1], stream[None, 1:], _first(config, end), None))
        if len(stream) == 1:
            left_out.notes.append(f"--text: there is no text in {name}")
        starts = np.arange((len(stream) - 1) // length) * length
        for rows in (starts[i : i + batch_size] for i in range(0, len(starts), batch_size)):
            token_BS = np.stack([stream[start : start + length] for start in rows])
            target_BS = np.stack([stream[start + 1 : start + length + 1] for start in rows])
            found.append(portion(name, token_BS, target_BS, _first(config, end), None))
    reader.refuse_faults(left_out)
    if not found:
        raise UserError(f"--text: there is no text in {', '.join(paths)}")
    return found, left_out.lines()


def portion(
    dataset: str, token_BS: np.ndarray, target_BS: np.ndarray, first_token: int | None, domain: int | None
) -> Portion:
    """A portion of whole sequences.

    Args:
        dataset: its name.
        token_BS: inputs.
        target_BS: the ids that follow.
        first_token: id at which documents begin that attention stays within; None: it crosses them.
        domain: number of the domain in `data.domains`; None: there are none.
    """
    domain_B = None if domain is None else np.full(len(token_BS), domain)
    return Portion(dataset, Batch(token_BS, target_BS, {}, document_starts(token_BS, first_token), domain_B))


def _spread(
    stream: PackedTokens | MixedTokens, tokens: int, batch_size: int, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of full sequences; of a stream that has none, what there is."""
    count = stream.num_sequences
    if count == 0:
        yield from stream.windows(1)
        return
    wanted = min(count, max(batch_size, tokens // length))
    index = np.unique(np.linspace(0, count - 1, wanted).astype(np.int64))
    for first in range(0, len(index), batch_size):
        yield stream.batch(index[first : first + batch_size])


def _ids(reader: FileReader, files: Sequence[str], tokenizer: Tokenizer, left_out: LeftOut) -> Iterator[int]:
    for document in reader.read(files, left_out):
        if document.text:
            yield from tokenizer.encode_batch([document.text])[0].tolist()
            yield tokenizer.end_of_text


def _first(config: Config, end_of_text: int) -> int | None:
    return end_of_text if config.data.document_mask else None
