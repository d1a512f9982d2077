"""The long form of the tests of reliability, which prints the table of docs/reliability.md: python -m tests.faults.

Parts may be named, and the others then do not run. Exit code 1: something was lost, hung, or ended in a traceback.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from moeport.stopping import SIGNALS
from tests.faults import damages, disks, saves, strikes, together
from tests.faults.outcome import Reference
from tests.faults.tally import Tally

KILLS, RANDOM_KILLS, DAMAGED, PAIRS, SAVES = 90, 40, 322, 5, 20
SIZES = [4096 * pages for pages in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 33, 40, 48, 60, 75, 100)]
IN_CACHE = 1000
"""Added to the number of an operation that is one of the cache."""


def evenly(count, of):
    """At most `count` whole numbers from 1 to `of`."""
    return sorted({1 + index * (of - 1) // max(min(count, of) - 1, 1) for index in range(min(count, of))})


def moments(folder, count):
    """Operations of a run before which to strike: mostly of the run folder, some of the cache."""
    cache, run = (strikes.operations(folder / f"count-{under}", under) for under in ("cache", "run"))
    return [IN_CACHE + at for at in evenly(count // 4, cache)] + evenly(count - count // 4, run)


def kills(folder, reference):
    places, row = moments(folder, KILLS), "SIGKILL before a file operation"
    return strikes.at_operations(row, "SIGKILL", places, folder, reference, strikes.KILLED)


def signals(folder, reference):
    tally = Tally(", ".join(number.name for number in SIGNALS) + " before a file operation")
    for number in SIGNALS:
        places = moments(folder / f"{number.name}-operations", 6)
        tally.add(strikes.at_operations("", number.name, places, folder, reference, strikes.ASKED))
    return tally


def refusals(folder, reference):
    tally = Tally("a file operation fails: ENOSPC, EDQUOT, EROFS, EACCES, EIO")
    for number in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO"):
        places = moments(folder / f"{number}-operations", 8)
        tally.add(strikes.at_operations("", number, places, folder, reference, strikes.REFUSED))
    return tally


def full_disks(folder, reference):
    if not disks.can_make_disks(folder / "trial"):
        raise SystemExit("this user may not mount a tmpfs in a namespace, which the tests of full disks need")
    return disks.of_sizes(SIZES, folder, reference)


PARTS = {
    "kills": kills,
    "random": lambda folder, reference: strikes.at_random(RANDOM_KILLS, folder, reference),
    "saves": lambda folder, reference: saves.killed(SAVES, folder / "1", 1),
    "saves of ranks": lambda folder, reference: saves.killed(SAVES, folder / "4", 4),
    "signals": signals,
    "refusals": refusals,
    "disks": full_disks,
    "damages": lambda folder, reference: damages.of_every_kind(DAMAGED, folder, reference),
    "folder": lambda folder, reference: together.in_one_folder(PAIRS, folder, reference),
    "cache": lambda folder, reference: together.in_one_cache(PAIRS, folder, reference),
}
FILES = {"ranks": ("ranks that disagree", "test_ranks_*.py"), "hostile": ("hostile input", "test_hostile*.py")}
"""Parts that are tests: the row of the table, and the files beside this one."""


def tested(fault, pattern):
    """A row that counts tests; one that fails counts as lost."""
    files = sorted(map(str, Path(__file__).parent.glob(pattern)))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    said = subprocess.run(command, capture_output=True, text=True).stdout if files else ""
    tally = Tally(fault)
    for count, result in re.findall(r"(\d+) (passed|failed|error)", said):
        tally.tries += int(count)
        if result != "passed":
            tally.lost += [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return tally


def main(names):
    wrong = []
    print(f"| Fault | Tries | Lost | Hangs | Tracebacks |\n|---|{'---:|' * 4}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(Path(folder, "reference"))
        for name in names or (*PARTS, *FILES):
            own = Path(folder, name)
            tally = tested(*FILES[name]) if name in FILES else PARTS[name](own, reference)
            print(tally.row(), flush=True)
            wrong += tally.wrong
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
