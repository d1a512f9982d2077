"""The watching thread, in processes that have no framework."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeport.comm.liveness import Call
from tests.comm.jobs import ROOT

SIZE = 3


class Processes:
    """Ranks of tests/comm/watched.py."""

    def __init__(self, folder, mode, ranks=range(SIZE)):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.ranks = {
            rank: subprocess.Popen(
                [sys.executable, str(ROOT / "tests/comm/watched.py"), str(rank), str(SIZE), str(folder), mode],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            for rank in ranks
        }

    def ready(self, limit=30.0):
        end = time.monotonic() + limit
        while not all((self.folder / f"ready.{rank}").exists() for rank in self.ranks):
            assert time.monotonic() < end, "the processes did not come up"
            time.sleep(0.02)

    def wait(self, limit=30.0):
        """Rank to (exit code, stdout, stderr)."""
        found = {}
        for rank, process in self.ranks.items():
            out, err = process.communicate(timeout=limit)
            found[rank] = (process.returncode, out, err)
        return found


@pytest.fixture
def start(tmp_path):
    started = []

    def of(mode, folder="job", **options):
        started.append(Processes(tmp_path / folder, mode, **options))
        return started[-1]

    yield of
    for processes in started:
        for process in processes.ranks.values():
            process.kill()
            process.communicate()


def member(processes, rank):
    return rf"rank {rank} of {SIZE} \(host \S+, pid {processes.ranks[rank].pid}\)"


def assert_line(found, ranks, pattern):
    for rank in ranks:
        code, _, err = found[rank]
        assert code == 1
        last = err.splitlines()[-1]
        assert re.fullmatch(f"moeport: {pattern}; every rank stops", last), (rank, err)
        assert err.count("moeport: ") == 1


@pytest.mark.parametrize("victim", range(SIZE))
def test_a_death_is_told_at_once(start, victim):
    processes = start("blocked")
    processes.ready()
    killed = time.monotonic()
    processes.ranks[victim].kill()
    found = processes.wait()
    assert time.monotonic() - killed < 5
    survivors = [rank for rank in range(SIZE) if rank != victim]
    assert_line(
        found,
        survivors,
        rf"{member(processes, victim)} died; rank \d was in all_to_all, call 2 of ranks 0-2",
    )
    assert [found[rank][1] for rank in survivors] == [f"written by {rank}" for rank in survivors]


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_a_goodbye_alarms_nobody(start, order):
    found = start("ending", folder=order).wait()
    assert {rank: (code, err) for rank, (code, _, err) in found.items()} == dict.fromkeys(range(SIZE), (0, ""))


def test_nodes_are_those_of_the_host_names(start):
    processes = start("ending")
    processes.wait()
    assert {Path(processes.folder / f"nodes.{rank}").read_text() for rank in range(SIZE)} == {"(0, 0, 0)"}


def test_an_absent_rank_is_named(start):
    processes = start("late")
    assert_line(
        processes.wait(),
        range(SIZE),
        rf"rank [01] of 3 \(\S+ \S+ pid \d+\) has waited 1.5 s in all_gather, call 2 of ranks 0-2; "
        rf"not there: {member(processes, 2)}, last collective: barrier, call 1 of ranks 0-2",
    )


def test_a_patient_comparison_may_take_longer_than_the_timeout(start):
    assert [code for code, _, _ in start("late_but_awaited").wait().values()] == [0] * SIZE


def test_where_all_are_there_their_arguments_are_shown(start):
    assert_line(
        start("late_together").wait(),
        range(SIZE),
        r"rank \d of 3 \(.*\) has waited 1.5 s in all_to_all, call 1 of ranks 0-2; "
        r"every rank has entered it \(rank 0: sends 0; rank 1: sends 1; rank 2: sends 2\)",
    )


def test_a_rank_that_is_in_another_group_is_named(start):
    processes = start("late_in_a_group")
    assert_line(
        processes.wait(),
        range(SIZE),
        rf"{member(processes, 2)} has waited 1.5 s in all_reduce, call 1 of ranks 0,2; "
        rf"not there: {member(processes, 0)}, last collective: none",
    )


def test_an_exception_ends_all(start):
    processes = start("error")
    found = processes.wait()
    assert_line(
        found,
        range(SIZE),
        rf"{member(processes, 1)} failed in all_reduce, call 1 of ranks 0-2 \(sum of float32 \(3,\)\): "
        r"RuntimeError: the network is down",
    )
    assert ["Traceback" in found[rank][2] for rank in range(SIZE)] == [False, True, False]


def test_a_death_comes_before_the_exceptions_that_it_causes(start):
    processes = start("echo")
    assert_line(
        processes.wait(), (0, 2), rf"{member(processes, 1)} died; rank \d was in all_reduce, call 1 of ranks 0-2"
    )


def test_a_frozen_rank_0_holds_nobody_up(start):
    processes = start("frozen")
    processes.ready()
    processes.ranks[0].send_signal(signal.SIGSTOP)
    (processes.folder / "go").touch()
    for rank in (1, 2):
        _, err = processes.ranks[rank].communicate(timeout=20)
        assert re.search(
            rf"moeport: {member(processes, rank)} failed outside collectives: RuntimeError: no memory; "
            rf"{member(processes, 0)} does not answer; every rank stops",
            err,
        )
    processes.ranks[0].kill()


def test_sigterm_ends_a_process_and_with_it_the_others(start):
    processes = start("blocked")
    processes.ready()
    processes.ranks[1].terminate()
    found = processes.wait()
    assert found[1][0] == -signal.SIGTERM
    assert_line(found, (0, 2), rf"{member(processes, 1)} died; rank \d was in all_to_all, call 2 of ranks 0-2")


def test_strangers_are_turned_away(start):
    found = start("strangers").wait()
    assert all("did not connect" not in err for _, _, err in found.values())
    assert [code for code, _, _ in found.values()] == [0] * SIZE


def test_ranks_that_do_not_connect_are_named(start):
    found = start("unconnected", ranks=[0, 2]).wait()
    assert "RunError: rank 1 did not connect to rank 0 within 2 s" in found[0][2]
    assert "RunError: rank 2 cannot reach rank 0 at 127.0.0.1" in found[2][2]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [((0, 1, 2, 3), "0-3"), ((2, 3), "2-3"), ((0, 2), "0,2"), ((1,), "1"), ((0, 1, 3), "0,1,3")],
)
def test_ranks_in_words(ranks, words):
    assert str(Call(ranks, 7, "barrier")) == f"barrier, call 7 of ranks {words}"
