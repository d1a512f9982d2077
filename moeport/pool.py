"""Processes that answer pickled questions over their pipes, several at once, in order.

Threads would wait for each other under the lock that all of them share. Each process is a program of its own: a fork
would copy the threads of a framework, and a process of `multiprocessing` would import the caller's script anew.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from moeport.errors import DataError, MoeportError
from moeport.processes import ending_of, python_path

Question = TypeVar("Question")
Answer = TypeVar("Answer")
AHEAD = 2
"""Questions per process that are asked ahead: the one that it answers, and the next."""
SINGLE_THREADED = {"OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
"""Variables that keep libraries in each process to one thread."""


@dataclass(frozen=True)
class Program:
    """What the processes run, and what is said where that fails."""

    module: str
    """Its function `main` calls `serve`."""
    purpose: str
    """As in "a process that counts pre-tokens"."""
    remedy: str
    """What helps where a process cannot start or ends."""
    failure: type[MoeportError]
    """Raised in both cases."""


class Pool(Generic[Question, Answer]):
    """Up to several processes, each started when a question finds the others busy; a context manager.

    Args:
        program: what they run.
        opening: what each gets before the first question.
        size: the largest number of processes.
    """

    def __init__(self, program: Program, opening: object, size: int):
        self._program, self._opening, self._size = program, opening, size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        # A process inherits the signal mask of the thread that starts it. An interrupt goes to the whole group: this
        # process decides what becomes of the others.
        self._threads = ThreadPoolExecutor(size, "pool", signal.pthread_sigmask, (signal.SIG_BLOCK, {signal.SIGINT}))

    def __enter__(self) -> Pool[Question, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes, whatever they do."""
        self._kill()
        self._threads.shutdown(cancel_futures=True)
        self._kill()  # those that a thread has started meanwhile
        for process in self._processes:
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with suppress(OSError):
                    pipe.close()

    def answers(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """The answer to each question, in order. A few questions per process are read ahead.

        Raises:
            DataError: a process has raised it.
            MoeportError: a process cannot start, or has ended; of the program's type.
        """
        underway: deque[Future[Answer]] = deque()
        for question in questions:
            underway.append(self._threads.submit(self._ask, question))
            if len(underway) >= AHEAD * self._size:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()

    def _ask(self, question: Question) -> Answer:
        try:
            process = self._idle.get_nowait()
        except queue.Empty:  # a thread has one process at a time, so there are never more than threads
            process = self._start()
        try:
            return self._answer(process, question)
        finally:
            self._idle.put(process)  # even one that ended, so that no thread starts another in its place

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-c", f"from {self._program.module} import main; main()"]
        environment = {**os.environ, "PYTHONPATH": python_path(), **SINGLE_THREADED}
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            what, why = self._program.purpose, error.strerror
            raise self._program.failure(
                f"cannot start a process that {what} ({why}); {self._program.remedy}"
            ) from error
        self._processes.append(process)
        self._send(process, self._opening)
        return process

    def _answer(self, process: subprocess.Popen[bytes], question: Question) -> Answer:
        assert process.stdout is not None
        self._send(process, question)
        try:
            answer, fault = pickle.load(process.stdout)
        except (EOFError, ValueError, pickle.UnpicklingError) as error:
            raise self._ended(process) from error
        if fault is not None:
            raise DataError(fault)
        found: Answer = answer
        return found

    def _send(self, process: subprocess.Popen[bytes], value: object) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(value, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
        except (OSError, ValueError) as error:  # the pipe is broken or closed
            raise self._ended(process) from error

    def _ended(self, process: subprocess.Popen[bytes]) -> MoeportError:
        ending = ending_of(process.wait())
        return self._program.failure(
            f"a process that {self._program.purpose} ended with {ending}; {self._program.remedy}"
        )

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


def serve(begin: Callable[[Any], Callable[[Any], Any]]) -> None:
    """What a process of a pool does until the other end closes or is gone.

    Args:
        begin: gets the opening, and gives what answers a question. It may raise DataError.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what others print is no answer
    with suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        answer = begin(pickle.load(sys.stdin.buffer))
        while True:
            pickle.dump(_answered(answer, pickle.load(sys.stdin.buffer)), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answered(answer: Callable[[Any], Any], question: object) -> tuple[Any, str | None]:
    """An answer and no fault, or the reverse."""
    try:
        return answer(question), None
    except DataError as error:
        return None, str(error)
