"""Processes that encode texts. Each is `python -m moeport.data.encoder`, and talks with pickles over its pipes.

Threads of one process would wait for each other: the ids come out of the library as Python objects, under the lock that
all threads share.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

import numpy as np

from moeport.data.tokenizer import Tokenizer
from moeport.errors import DataError
from moeport.processes import ending_of, python_path

BATCHES_PER_WORKER = 2
"""Batches that are read ahead for each process: one that it encodes, and the next."""
FEWER = "; if the memory was full, start fewer (moeport data ingest CONFIG --workers N)"
"""What helps where a process cannot start or ends."""

Encoded = list[np.ndarray]
"""The ids of each text of a batch, uint32."""


class Encoders:
    """Encodes batches of texts in order; a context manager.

    Args:
        tokenizer: encodes them.
        workers: number of processes; 1: this process, in the threads of the library.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._tokenizer = tokenizer
        self._count = workers if workers > 1 else 0
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(max(1, self._count), "encode")

    def __enter__(self) -> Encoders:
        try:
            for _ in range(self._count):
                self._workers.append(_Worker(self._tokenizer))
                self._idle.put(self._workers[-1])
        except BaseException as error:
            self._end()
            if not isinstance(error, OSError):
                raise
            raise DataError(
                f"cannot start {self._count} processes that encode text ({error.strerror}){FEWER}"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    def encode(self, batches: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        """The ids of each batch.

        Raises:
            DataError: a pattern of the tokenizer fails, or a process ended.
        """
        if not self._workers:
            yield from map(self._tokenizer.encode_batch, batches)
            return
        ahead: deque[Future[Encoded]] = deque()
        for texts in batches:
            ahead.append(self._threads.submit(self._encode, texts))
            if len(ahead) >= BATCHES_PER_WORKER * self._count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _encode(self, texts: Sequence[str]) -> Encoded:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process and its pipes."""

    def __init__(self, tokenizer: Tokenizer):
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "moeport.data.encoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": python_path(), "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._send(tokenizer)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of each text; raises DataError."""
        assert self._process.stdout
        self._send(texts)
        try:
            lengths, ids = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._ended() from error
        if isinstance(lengths, str):
            raise DataError(lengths)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def end(self) -> None:
        """End the process, whatever it does."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.kill()
        self._process.wait()
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _send(self, value: object) -> None:
        assert self._process.stdin
        try:
            pickle.dump(value, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error

    def _ended(self) -> DataError:
        ending = ending_of(self._process.wait())
        return DataError(f"a process that encodes text ended with {ending}{FEWER}")
