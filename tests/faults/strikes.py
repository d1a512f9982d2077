"""Runs that are killed, asked to end, or refused a write, at a chosen moment, and then resumed."""

import random
import signal
import time

from tests.faults.outcome import SMALL
from tests.faults.runs import NOTHING, Try, config, litter
from tests.faults.tally import Tally


def operations(folder, under):
    """The number of file operations of a run, in its folder `run` or `cache`."""
    folder.mkdir(parents=True)
    count = folder / "count"
    fault = {"do": "SIGKILL", "under": str(folder / under), "count": str(count)}
    run = Try(fault, ["train", config(folder, **SMALL)], folder / "log")
    assert run.wait() == 0, run.said()
    return int(count.read_text())


def at_operations(kind, do, places, folder, reference, allowed):
    """A run is struck before each of these operations, then resumed.

    Args:
        kind: the row of the table.
        do: what happens; see `tests.faults.driver`.
        places: numbers of operations, counted from 1.
        folder: where to work.
        reference: what the resumed run must leave.
        allowed: exit codes of the run that is struck.
    """
    tally = Tally(kind)
    for at in places:
        place = folder / f"{do}-{at}"
        place.mkdir(parents=True)
        fault = {"do": do, "under": str(place / "run"), "at": at}
        if at > 1000:
            fault = {"do": do, "under": str(place / "cache"), "at": at - 1000}
        _strike(tally, f"{do} before operation {at}", fault, place, reference, allowed)
    return tally


def at_random(tries, folder, reference, seed=0):
    """A run is killed at a random moment, and again when it is resumed, until a third start finishes it."""
    tally, moments = Tally("SIGKILL at random moments"), random.Random(seed)
    length = 1.0
    for number in range(tries):
        place = folder / f"random-{number}"
        place.mkdir(parents=True)
        tally.tries += 1
        file = config(place, **SMALL)
        for _ in range(2):
            run = Try(NOTHING, ["train", file, "--resume"], place / "log")
            begun = time.monotonic()
            wanted = begun + moments.uniform(0, length)
            while time.monotonic() < wanted and run.process.poll() is None:
                time.sleep(0.002)
            if run.process.poll() is None:
                run.kill()
            else:
                length = 0.9 * (time.monotonic() - begun)
            run.wait()
            length = min(length * 1.05, 8.0)
        _resume(tally, f"random kill {number}", file, place, reference)
    return tally


def _strike(tally, name, fault, place, reference, allowed):
    tally.tries += 1
    file = config(place, **SMALL)
    run = Try(fault, ["train", file], place / "log")
    code = tally.ended(name, run, allowed)
    if code is None:
        return
    if code >= 0 and litter(place):
        tally.lost.append(f"{name}: left {litter(place)}")
    if code == 2 and run.said().count("error:") != 1:
        tally.tracebacks.append(f"{name}: not one sentence: {run.said()[-600:]}")
    _resume(tally, name, file, place, reference)


def _resume(tally, name, file, place, reference):
    if tally.ended(f"{name}, resumed", Try(NOTHING, ["train", file, "--resume"], place / "log2"), [0]) == 0:
        tally.right(name, reference.differences(place))


KILLED = [0, -signal.SIGKILL]
ASKED = [0, 130]
REFUSED = [0, 2]
