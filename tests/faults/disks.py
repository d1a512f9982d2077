"""Runs on disks that are too small, which then grow."""

from tests.faults.driver import NO_DISK
from tests.faults.outcome import SMALL
from tests.faults.runs import Try, config
from tests.faults.tally import Tally


def can_make_disks(folder):
    """Whether this user may mount a disk that only one process sees."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    return Try({"do": "disk", "under": str(disk), "size": "1m"}, ["routers"], folder / "log").wait() != NO_DISK


def of_sizes(sizes, folder, reference):
    """A run on a disk of each size, in bytes, which holds run and cache.

    It ends with one sentence, leaves no litter, and is resumed once there is space.
    """
    tally = Tally("full disks")
    for size in sizes:
        place = folder / f"disk-{size}"
        (place / "disk").mkdir(parents=True)
        file = config(
            place, run={"dir": str(place / "disk/run")}, data={"cache_dir": str(place / "disk/cache")}, **SMALL
        )
        tally.tries += 1
        name = f"disk of {size} bytes"
        run = Try({"do": "disk", "under": str(place / "disk"), "size": str(size)}, ["train", file], place / "log")
        code = tally.ended(name, run, [0, 2])
        if code is None:
            continue
        said = run.said().partition("on the full disk: ")[0]
        if code == 2 and not (said.count("error:") == 1 and "the disk is full" in said):
            tally.tracebacks.append(f"{name}: not one sentence: {said[-600:]}")
        if "on the full disk: no litter" not in run.said():
            tally.lost.append(f"{name}: litter keeps the disk full: {run.said()[-300:]}")
        tally.right(name, reference.differences(place / "disk.out"))
    return tally
