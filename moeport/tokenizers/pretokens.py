"""Text cut into pre-tokens, which merges never cross, and how often each occurs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from moeport.errors import DataError
from moeport.processes import usable_cores
from moeport.tokenizers.counting import Counted, counting, counts_of
from moeport.tokenizers.patterns import PATTERNS
from moeport.tokenizers.splitting import splitter
from moeport.tokenizers.streaming import as_bytes, as_text

__all__ = ["PATTERNS", "count_words", "cut"]

BATCH = 2**21
"""Characters that are counted at once."""

_ALIKE = re.compile("[A-Za-z0-9\u4e00-\u9fff](?=[\\s.,;:!?()\u3001\u3002\uff0c])")
"""Ends of letters or numbers, where every pattern with a name ends a pre-token, whatever stands before and after."""

_LINE_END = re.compile("\n")


def count_words(
    texts: Iterable[str | bytes],
    pattern: str = "digits",
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[bytes, int]:
    """How often each pre-token occurs, in the order in which they first occur; the same with any number of workers.

    It holds a few MB of text per worker, and the distinct pre-tokens.

    Args:
        texts: no pre-token crosses from one to the next. For files that are larger than memory see `cut`.
        pattern: a name from `PATTERNS`, or a regular expression. Texts of several MB are cut at line ends beforehand
            where it is not a name.
        workers: processes; None: one per processor, if there is enough text. With 1 it counts in this process.
        progress: called with the number of characters counted since the last call.

    Raises:
        DataError: the pattern is not a regular expression, or there is one text in place of several.
        RunError: a worker ended or could not start.
    """
    if isinstance(texts, str | bytes):
        raise DataError("texts: got a single text; expected several: put it in a list")
    batches = in_batches(_limited(texts, pattern), BATCH)
    words: Counter[bytes] = Counter()
    for size, counted in _counted(batches, pattern, usable_cores() if workers is None else workers):
        words.update(counted)
        if progress is not None:
            progress(size)
    return dict(words)


def cut(chunks: Iterable[str | bytes], pattern: str = "digits", size: int = BATCH) -> Iterator[str]:
    """A long text in parts that no pre-token crosses, so that their pre-tokens are those of the whole.

    Args:
        chunks: the text in chunks of any size, which may begin and end within characters.
        pattern: a name from `PATTERNS`. With any other regular expression the parts end at line ends, which it may
            not respect.
        size: characters of a part, or more where there is no place to cut.
    """
    end_of = _ALIKE if pattern in PATTERNS else _LINE_END
    waiting: list[bytes] = []
    held, enough = 0, size
    for chunk in chunks:
        waiting.append(as_bytes(chunk))
        held += len(waiting[-1])
        if held <= enough:
            continue
        whole = b"".join(waiting)
        complete = _complete(whole)
        text, rest = as_text(whole[:complete]), whole[complete:]
        place = _last(end_of, text)
        if place:
            yield from _parts(text[:place], end_of, size)
            rest = text[place:].encode("utf-8", "surrogateescape") + rest
        else:
            rest = whole
        waiting, held = [rest], len(rest)
        enough = max(size, 2 * held) if not place else size + held
    if held:
        yield from _parts(as_text(b"".join(waiting)), end_of, size)


def _complete(data: bytes) -> int:
    """Bytes without a character at the end that has only begun."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return len(data) if needed <= back else len(data) - back
    return len(data)


def _parts(text: str, end_of: re.Pattern[str], size: int) -> Iterator[str]:
    """A text in parts of about `size` characters."""
    start = 0
    while len(text) - start > size:
        found = end_of.search(text, start + size)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]


def _last(end_of: re.Pattern[str], text: str) -> int:
    """The last place at which a text can be cut; 0: there is none."""
    window = 2**12
    while True:
        start = max(0, len(text) - window)
        places = [found.end() for found in end_of.finditer(text, start)]
        if places or not start:
            return places[-1] if places else 0
        window *= 4


def _limited(texts: Iterable[str | bytes], pattern: str) -> Iterator[str]:
    end_of = _ALIKE if pattern in PATTERNS else _LINE_END
    for text in texts:
        yield from _parts(as_text(as_bytes(text)), end_of, BATCH)


def in_batches(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts in order, in batches of at least this many characters, but for the last."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(batches: Iterator[list[str]], pattern: str, workers: int) -> Iterator[Counted]:
    """What is counted in each batch, in order; processes are started where there is more than one batch."""
    split = splitter(pattern)
    first = list(islice(batches, 2))
    if workers > 1 and len(first) > 1:
        with counting(pattern, workers) as pool:
            yield from pool.answers(chain(first, batches))
    else:
        for batch in chain(first, batches):
            yield counts_of(batch, split)
