"""Jobs that go wrong end, soon, with a message that names the rank, and leave no process behind."""

import fcntl
import json
import os
import re
import signal
import threading
import time

import pytest

from tests.comm.jobs import ROOT, start

JOBS = {
    "torch": {"killed-0": 3, "killed-1": 3, "mismatch": 2, "absent": 2, "exception": 2, "disagreement": 2}
    | {"exchange": 3, "messages": 3, "sum": 3},
    "mindspore": {"killed-0": 2, "killed-1": 2, "mismatch": 2, "absent": 2},
}
"""Number of processes by backend and mode; what does not depend on the backend is not repeated."""
BOTH = pytest.mark.parametrize("backend", JOBS)


@pytest.fixture(scope="session")
def outcome(tmp_path_factory, worker_id):
    """How a job has ended. The jobs of a backend run at the same time, once in a session: they mostly wait."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def of(backend, mode):
        pytest.importorskip(backend)
        file = shared / f"failures-{backend}.json"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                outcomes = {}
                threads = [
                    threading.Thread(target=run, args=(backend, name, shared / f"{backend}-{name}", outcomes))
                    for name in JOBS[backend]
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                file.write_text(json.dumps(outcomes))
        found = json.loads(file.read_text())[mode]
        assert "error" not in found, found["error"]
        return found

    return of


def run(backend, name, folder, outcomes):
    """Start a job, kill a rank where its mode is to be killed, and write down what happens."""
    outcomes[name] = ended(backend, name, folder)


def ended(backend, name, folder):
    mode, _, victim = name.partition("-")
    script = str(ROOT / "tests/comm/failing.py")
    # msrun waits for its scheduler, which takes this time, 30 s by default, to see that the workers have gone.
    quick = {} if victim else {"MS_NODE_TIMEOUT": "10"}
    job = start(backend, JOBS[backend][name], [script, mode, backend, str(folder)], folder, **quick)
    try:
        if victim:
            while not (folder / f"ready.{victim}").exists():
                if job.launcher.poll() is not None:
                    return {"error": f"the job ended before a rank was killed\n{job.output()}"}
                time.sleep(0.05)
            os.kill(job.pids()[int(victim)], signal.SIGKILL)
        killed = time.monotonic()
        code = job.wait(200)
        return {
            "code": code,
            "seconds": time.monotonic() - killed,
            "left": job.left(),
            "pids": {str(rank): pid for rank, pid in job.pids().items()},
            "output": job.output(),
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}\n{job.output()}"}
    finally:
        job.end()


def lines(found):
    """The messages of moeport; every process has written at most one."""
    assert found["code"] != 0
    assert found["left"] == []
    written = re.findall(r"moeport: .*", found["output"])
    assert 0 < len(written) <= len(found["pids"]), found["output"]
    return written


@BOTH
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_within_60_seconds(outcome, backend, victim):
    found = outcome(backend, f"killed-{victim}")
    size, pid = len(found["pids"]), found["pids"][str(victim)]
    expected = re.compile(
        rf"moeport: rank {victim} of {size} \(host \S+, pid {pid}\) died; rank \d was (in|outside collectives \(last:) "
        rf"(all_to_all|all_reduce), call \d+ of ranks 0-{size - 1}\)?; every rank stops"
    )
    for line in lines(found):
        assert expected.fullmatch(line), found["output"]
    assert found["seconds"] < 60


@BOTH
def test_splits_that_do_not_match_are_named(outcome, backend):
    found = outcome(backend, "mismatch")
    for line in lines(found):
        assert "failed in all_to_all, call 1 of ranks 0-" in line
        assert line.endswith("ValueError: rank 1 sends 2 rows to rank 0, which expects 3; every rank stops")
    assert "the exchange went through" not in found["output"]


@BOTH
def test_a_rank_that_does_not_come_is_named(outcome, backend):
    found = outcome(backend, "absent")
    size, pid = len(found["pids"]), found["pids"]["1"]
    for line in lines(found):
        assert re.fullmatch(
            rf"moeport: rank [^1] of {size} \(host \S+, pid \d+\) has waited 8 s in all_gather, call 2 of ranks "
            rf"0-{size - 1}; not there: rank 1 of {size} \(host \S+, pid {pid}\), last collective: barrier, "
            rf"call 1 of ranks 0-{size - 1}; every rank stops",
            line,
        ), found["output"]


def test_an_exception_reaches_every_rank(outcome):
    found = outcome("torch", "exception")
    pid = found["pids"]["1"]
    for line in lines(found):
        assert re.fullmatch(
            rf"moeport: rank 1 of 2 \(host \S+, pid {pid}\) failed outside collectives: "
            r"ValueError: the file is not there; every rank stops",
            line,
        )
    assert found["output"].count('raise ValueError("the file is not there")') == 1


def test_ranks_that_name_different_groups_are_told(outcome):
    for line in lines(outcome("torch", "disagreement")):
        assert "failed in group, call 1 of ranks 0-" in line
        assert line.endswith(
            "ValueError: the ranks passed different partitions; pass the same one on every rank; every rank stops"
        )


FIRST = "gives wrong values, the first of 14 at (0, 0): expected 1.000244140625, received 0.0"
LIBRARY = "(gloo; one package 1.2, another 8.3)"


def test_an_all_to_all_of_zeros_is_replaced(outcome):
    """CANN 8.3.RC2 is said to deliver them. Groups formed later do without it, too, and so do gradients."""
    found = outcome("torch", "exchange")
    assert (found["code"], found["left"]) == (0, []), found["output"]
    said = re.findall(r"said: (.*)", found["output"])
    elsewhere = f"all_to_all gives wrong values on other ranks {LIBRARY}; sends and receives take its place"
    here = f"all_to_all (uneven) of float32 on rank 1 of ranks 0-2 {FIRST} {LIBRARY}; sends and receives take its place"
    assert said == [elsewhere, here, elsewhere]
    assert found["output"].count("all exchanges are right") == 3


@pytest.mark.parametrize(
    ("mode", "collective", "first"),
    [
        ("messages", "all_to_all (uneven)", FIRST),
        ("sum", "all_reduce (sum)", FIRST.replace("14 at", "21 at").replace("1.000244140625", "114.02783203125")),
    ],
)
def test_a_wrong_library_ends_the_job(outcome, mode, collective, first):
    """Before anything is computed, with the collective, the ranks and the versions."""
    found = outcome("torch", mode)
    for line in lines(found):
        assert re.fullmatch(
            r"moeport: rank 1 of 3 \(host \S+, pid \d+\) failed outside collectives: RunError: probe: .*", line
        ), line
        assert line.endswith(
            f"probe: {collective} of float32 on rank 1 of ranks 0-2 {first}; do not train on this communication "
            f"library {LIBRARY}: update it, or use another backend; every rank stops"
        )
    assert "are right" not in found["output"]
