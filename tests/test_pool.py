"""Processes that answer questions: order, number, faults, and that none is left."""

import os
import signal
import time

import pytest

from moeport.errors import DataError, RunError
from moeport.pool import Pool, Program, serve

PROGRAM = Program(__name__, "multiplies", "use fewer", RunError)


def main():
    """What the processes run: they multiply by what they are opened with."""
    serve(lambda factor: lambda number: _product(factor, number))


def _product(factor, number):
    if number is None:
        raise DataError("nothing to multiply")
    if number == "print":
        print("no answer", flush=True)
        return 0
    return factor * number, os.getpid()


def test_answers_are_in_the_order_of_the_questions():
    with Pool(PROGRAM, 3, 2) as pool:
        assert [product for product, _ in pool.answers(range(50))] == [3 * number for number in range(50)]


def test_only_as_many_processes_are_started_as_there_are_questions():
    with Pool(PROGRAM, 3, 50) as pool:
        assert len({process for _, process in pool.answers([1, 2])}) <= 2
        assert len(pool._processes) <= 2


def test_what_is_printed_is_no_answer(capfd):
    with Pool(PROGRAM, 3, 1) as pool:
        assert list(pool.answers(["print"])) == [0]
    assert capfd.readouterr().err == "no answer\n"


def test_a_fault_of_the_data_is_raised_and_the_process_goes_on():
    with Pool(PROGRAM, 3, 1) as pool:
        with pytest.raises(DataError, match=r"^nothing to multiply$"):
            list(pool.answers([None]))
        assert next(pool.answers([5]))[0] == 15
        assert len(pool._processes) == 1


def test_a_process_that_cannot_start_is_named(monkeypatch):
    monkeypatch.setattr("sys.executable", "/absent/python")
    cannot = r"^cannot start a process that multiplies \(No such file or directory\); use fewer$"
    with pytest.raises(RunError, match=cannot), Pool(PROGRAM, 3, 2) as pool:
        list(pool.answers([1]))


def test_a_process_that_ends_is_named():
    def questions(pool):
        yield 1
        while not pool._processes:  # a thread starts it
            time.sleep(0.01)
        for process in pool._processes:
            process.kill()
            process.wait()
        yield from range(20)

    with (
        pytest.raises(RunError, match=r"^a process that multiplies ended with SIGKILL; use fewer$"),
        Pool(PROGRAM, 3, 2) as pool,
    ):
        list(pool.answers(questions(pool)))


def test_processes_leave_interrupts_to_the_one_that_started_them(capfd):
    """Also those that are only starting."""

    def questions(pool):
        yield 1
        while not pool._processes:  # a thread starts it
            time.sleep(0.001)
        pool._processes[0].send_signal(signal.SIGINT)
        yield 2

    with Pool(PROGRAM, 3, 1) as pool:
        assert [product for product, _ in pool.answers(questions(pool))] == [3, 6]
        pool._processes[0].send_signal(signal.SIGINT)
        assert next(pool.answers([4]))[0] == 12
    assert capfd.readouterr().err == ""


def test_none_is_left():
    with Pool(PROGRAM, 3, 2) as pool:
        next(pool.answers(range(100)))
    assert pool._processes
    assert all(process.returncode in (0, -signal.SIGKILL) for process in pool._processes)
