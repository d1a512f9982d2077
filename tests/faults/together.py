"""Two processes in one run folder, and in one cache."""

from tests.faults.outcome import SMALL
from tests.faults.runs import NOTHING, Try, config
from tests.faults.tally import Tally


def in_one_folder(tries, folder, reference):
    """Two runs are started in one folder at once: one trains, the other says who does."""
    tally = Tally("two processes in one run folder")
    for number in range(tries):
        place = folder / f"folder-{number}"
        place.mkdir(parents=True)
        file = config(place, **SMALL)
        tally.tries += 1
        more = ["--resume"] if number % 2 else []
        both = [Try(NOTHING, ["train", file, *more], place / f"log{each}") for each in range(2)]
        codes = [tally.ended(f"pair {number}", run, [0, 2]) for run in both]
        if sorted(code for code in codes if code is not None) not in ([0, 2], [0, 0]):
            tally.lost.append(f"pair {number}: exit codes {codes}: {both[0].said()[-300:]} {both[1].said()[-300:]}")
        tally.right(f"pair {number}", reference.differences(place))
    return tally


def in_one_cache(tries, folder, reference):
    """Two runs prepare the same text in one cache at once."""
    tally = Tally("two processes in one cache")
    for number in range(tries):
        place = folder / f"cache-{number}"
        own = [place / "one", place / "two"]
        for each in own:
            each.mkdir(parents=True)
        files = [config(each, data={"cache_dir": str(place / "cache")}, **SMALL) for each in own]
        tally.tries += 1
        both = [Try(NOTHING, ["train", file], file.parent / "log") for file in files]
        for run, each in zip(both, own, strict=True):
            if tally.ended(f"pair {number}", run, [0]) == 0:
                tally.right(f"pair {number}", reference.differences(each))
    return tally
