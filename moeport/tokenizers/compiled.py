"""Encoding by compiled code, on all processors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import numpy as np

from moeport.processes import usable_cores
from moeport.tokenizers import kernel
from moeport.tokenizers.definition import Definition
from moeport.tokenizers.plain import CACHED_LENGTH
from moeport.tokenizers.programs import Program

GROUP = 2**20
"""Bytes of texts that a thread takes at once."""

WORDS = 2**17
"""Words whose ids a thread remembers, in about 12 MB."""


class CompiledEngine:
    """Ids of many texts, several at once. Each thread has a memory of its own for words seen before."""

    def __init__(self, definition: Definition, program: Program):
        self._kind = kernel.LONGEST if definition.encoding == "longest_first" else kernel.MERGES
        self._symbol = program.symbol
        self._cut = kernel.Cut(*(getattr(program, name) for name in kernel.Cut._fields))
        self._coding = _longest_coding(definition) if self._kind == kernel.LONGEST else _merge_coding(definition)
        self._memories: SimpleQueue[kernel.Memory] = SimpleQueue()

    def threads(self, workers: int | None, size: int) -> int:
        """As many as asked for, or one per processor."""
        return usable_cores() if workers is None else max(1, workers)

    def encode(self, texts: Sequence[bytes], workers: int | None) -> list[np.ndarray]:
        """The ids of each text, uint32."""
        groups = _groups(texts)
        threads = min(self.threads(workers, 0), len(groups))
        if threads <= 1:
            return [ids for group in groups for ids in self._encode_group(group)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for group in pool.map(self._encode_group, groups) for ids in group]

    def encode_until(self, text: bytes, limit: int) -> tuple[np.ndarray, int]:
        """The ids of the pre-tokens that end at or before this byte, and the end of the last one."""
        ids, _, end = self._run(text, np.array([len(text)]), limit)
        return ids, end

    def _encode_group(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        ids, counts, _ = self._run(b"".join(texts), np.cumsum([len(text) for text in texts]))
        return np.split(ids, np.cumsum(counts)[:-1])

    def _run(self, data: bytes, ends: np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray, int]:
        try:
            memory = self._memories.get_nowait()
        except Empty:
            memory = _memory()
        out, counts = np.empty(len(data), np.uint32), np.zeros(len(ends), np.int64)
        end = kernel.encode(
            np.frombuffer(data, np.uint8),
            ends,
            len(data) if limit is None else limit,
            self._kind,
            self._symbol,
            self._cut,
            self._coding,
            memory,
            CACHED_LENGTH,
            out,
            counts,
        )
        self._memories.put(memory)
        return out[: counts.sum()].copy(), counts, end


def _groups(texts: Sequence[bytes]) -> list[Sequence[bytes]]:
    """The texts in order, in groups of about `GROUP` bytes."""
    groups: list[Sequence[bytes]] = []
    first = size = 0
    for number, text in enumerate(texts, 1):
        size += len(text)
        if size >= GROUP or number == len(texts):
            groups.append(texts[first:number])
            first, size = number, 0
    return groups


def _memory() -> kernel.Memory:
    return kernel.Memory(
        np.zeros((2 * WORDS, 4), np.int64),
        np.empty(16 * WORDS, np.uint8),
        np.empty(4 * WORDS, np.uint32),
        np.zeros(3, np.int64),
    )


def _table(entries: int) -> tuple[np.ndarray, np.ndarray]:
    """An empty hash table for this many entries, at most half full."""
    size = 2 ** (2 * entries + 2).bit_length()
    return np.full(size, -1, np.int64), np.zeros(size, np.int64)


def _merge_coding(definition: Definition) -> kernel.Coding:
    """Tokens are numbered as in the expanded vocabulary; scaffolds stand for the ids of their pieces."""
    vocabulary, ids = definition.vocabulary, definition.ids
    number = {token: place for place, token in enumerate(vocabulary.expanded)}
    longest = max((len(token) for token in vocabulary.expanded), default=0)
    pairs = np.array([number[left] << 32 | number[right] for left, right in vocabulary.merges], np.int64)
    made = [left + right for left, right in vocabulary.merges]
    by_length = definition.encoding == "longest_merge"
    priority = [longest - len(token) if by_length else rank for rank, token in enumerate(made)]
    values = [first << 32 | number[token] for first, token in zip(priority, made, strict=True)]
    keys, table = _table(len(pairs))
    kernel.fill_pairs(pairs, np.array(values, np.int64), keys, table)
    pieces = [vocabulary.demolished.get(token, (token,)) for token in vocabulary.expanded]
    return kernel.Coding(keys, table, np.empty(0, np.int64), *_rows([[ids[piece] for piece in row] for row in pieces]))


def _longest_coding(definition: Definition) -> kernel.Coding:
    """A tree of the tokens; every token stands for its id."""
    tokens = list(definition.ids)
    nodes = len({token[:length] for token in tokens for length in range(1, len(token) + 1)})
    keys, table = _table(nodes)
    ends = np.full(nodes + 1, -1, np.int64)
    data = np.frombuffer(b"".join(tokens), np.uint8)
    kernel.fill_tree(data, np.cumsum([len(token) for token in tokens]), keys, table, ends)
    return kernel.Coding(keys, table, ends, *_rows([[number] for number in definition.ids.values()]))


def _rows(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each row begins, and the numbers of all rows."""
    begins = np.cumsum([0, *map(len, rows)])
    return begins, np.array([number for row in rows for number in row], np.uint32)
