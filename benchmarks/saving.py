"""What share of the training loop's time saving takes, at an interval of 20 steps: none, synchronous, asynchronous.

    python benchmarks/saving.py [--backend torch] [--ranks 1] [--before WORKTREE] [--rounds 3] [--experts 16 ...]

Contenders run in turns, each a run of 100 steps in processes of its own; the first changes from round to round. What
counts is the time from the end of step 20 to the end of step 100: 80 steps and, with saving, the four checkpoints
(`--checkpoints`) after steps 20, 40, 60 and 80, with everything that is done for them in that time, also beside the
steps. The share is
1 - (time without saving) / (time with it), from runs of the same round. `--before` adds the commit checked out there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sized_runs import Size, config_of, run, write_found

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and print; or, in a rank, train and note the time after each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rank", nargs="*", metavar="CONFIG STEM", help="given to the ranks that this starts")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--interval", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--checkpoints", type=int, default=4, help="how many of a run are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tree", type=Path, default=HERE, help="the repository to measure")
    parser.add_argument("--before", type=Path, help="a git worktree of the commit to compare with")
    parser.add_argument("--folder", type=Path, help="where the runs are written; default: the temporary folder")
    Size.add_options(parser)
    given = parser.parse_args()
    if given.rank:
        _rank(given.rank[0], given.rank[1])
        return
    times = measured(given)
    plain = times["no saving"]
    print(f"{Size.of(given).parameters / 1e6:,.0f} M parameters, {given.backend}, {given.ranks} ranks:")
    print(f"{statistics.median(plain) / given.checkpoints:.1f} s for {given.interval} steps without saving\n")
    print("| | s for as many steps and a checkpoint | share of the loop's time, median | all rounds |")
    print("|---|--:|--:|---|")
    for name, values in times.items():
        shares = [1 - none / value for none, value in zip(plain, values, strict=True)]
        listed = ", ".join(f"{share:.1%}" for share in shares)
        each = statistics.median(values) / given.checkpoints
        print(f"| {name} | {each:.1f} | {statistics.median(shares):.1%} | {listed} |")


def measured(given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the timed steps of each run, by contender."""
    interval, size, tree = given.interval, Size.of(given), given.tree.resolve()
    never: dict[str, Any] = {"interval": 0}
    contenders: dict[str, tuple[Path, dict[str, Any]]] = {
        "no saving": (tree, never),
        "synchronous": (tree, {"interval": interval, "asynchronous": False}),
        "asynchronous": (tree, {"interval": interval, "asynchronous": True}),
    }
    if given.before:
        contenders["before"] = (given.before.resolve(), {"interval": interval})
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(given.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            own, checkpoint = contenders[name]
            scratch = Path(tempfile.mkdtemp(prefix="saving-", dir=given.folder))
            try:
                config = config_of(size, given.backend, given.ranks, scratch / "job", checkpoint=checkpoint)
                config["training"] |= {"steps": interval * (given.checkpoints + 1), "batch_size": given.batch}
                config["data"]["sequence_length"] = given.length
                ends = run("saving.py", given.backend, given.ranks, config, [], own)
            finally:
                shutil.rmtree(scratch)
            times[name].append(max(each[-1] - each[interval - 1] for each in ends))
            print(json.dumps({"contender": name, "round": number, "seconds": times[name][-1]}), flush=True)
    return times


def _rank(file: str, stem: str) -> None:
    """Train, and note when each step ended."""
    from moeport.config import load_config
    from moeport.training import run as training
    from moeport.training.trainer import Trainer

    ends: list[float] = []
    advance = Trainer.advance

    def noted(self: Trainer, waits: bool = False) -> None:
        advance(self, waits)
        ends.append(time.perf_counter())

    trainer: Any = Trainer
    trainer.advance = noted
    training.train(load_config(file))
    write_found(stem, ends)


if __name__ == "__main__":
    main()
