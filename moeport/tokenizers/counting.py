"""Processes that count pre-tokens.

They are programs of their own: a fork would copy the threads of a framework, and a process of `multiprocessing` would
import the caller's script anew.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from moeport.errors import RunError
from moeport.processes import ending_of, python_path
from moeport.tokenizers.splitting import splitter

FEWER = "use fewer workers if memory ran out"
"""What helps where a process cannot start or ends."""

Counted = tuple[int, dict[bytes, int]]
"""Characters of a batch, and how often each of its pre-tokens occurs."""


def counts_of(texts: Sequence[str], split: Callable[[str], list[str]]) -> Counted:
    """How often each pre-token of the texts occurs.

    Args:
        texts: as `as_text` gives them.
        split: what `splitter` gives.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update(split(text))
    return sum(map(len, texts)), {word.encode("utf-8", "surrogateescape"): count for word, count in words.items()}


class Counting:
    """Several processes that count batches of texts. Each is started when a batch finds the others busy.

    Args:
        pattern: a name or a regular expression, which `splitter` has taken.
        workers: the largest number of processes.
    """

    def __init__(self, pattern: str, workers: int):
        self._command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()", pattern]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._workers, self._threads = workers, ThreadPoolExecutor(workers, "count")

    def __enter__(self) -> Counting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes."""
        for process in self._processes if kind is not None else ():
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()

    def counts(self, batches: Iterable[list[str]]) -> Iterator[Counted]:
        """What `counts_of` gives for each batch, in order. Two batches per process are held."""
        underway: deque[Future[Counted]] = deque()
        for batch in batches:
            underway.append(self._threads.submit(self._count, batch))
            if len(underway) > 2 * self._workers:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": python_path(), "OPENBLAS_NUM_THREADS": "1"}
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise RunError(f"cannot start a process that counts pre-tokens ({error.strerror}); {FEWER}") from error
        self._processes.append(process)
        return process

    def _count(self, batch: list[str]) -> Counted:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:  # a thread has one process at a time, so there are never more than threads
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(batch, process.stdin)
            process.stdin.flush()
            counted: Counted = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            ending = ending_of(process.wait())
            raise RunError(f"a process that counts pre-tokens ended: {ending}; {FEWER}") from error
        finally:
            self._idle.put(process)  # even one that ended, so that no thread waits for it
        return counted


def main() -> None:
    """Counts the batches that come in until there are no more, by the pattern that is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to the whole group; the one who started this decides
    split = splitter(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what others print is no answer
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the one who started this has ended
        while True:
            pickle.dump(counts_of(pickle.load(sys.stdin.buffer), split), answers)
            answers.flush()
