"""A model whose float32 parameters and AdamW state exceed half of this machine's memory: trained on 2 ranks, resumed.

    python benchmarks/large.py [--backend torch] [--ranks 2 4 1] [--experts 16 ...] [--small]

The ranks share the experts. The first number of ranks trains one step and saves; then every number resumes from that
checkpoint and trains two more steps, whose losses must be those of the first to 1e-6: the first of them depends on the
parameters alone, the second on the optimiser's state too. Prints the losses, the peak memory of the rank that has most
(`VmHWM`) in each phase, and how long saving and resuming took. Saving is synchronous, since an asynchronous one holds a
copy. `--folder` should have room for three checkpoints of 12 bytes per parameter. `--small` divides the hidden widths
by 10, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory import MIB
from sized_runs import Size, config_of, run

LIMIT = 1e-6
"""Relative difference of two losses."""
RATE = 1e-5
"""Of learning: at the usual one, the first steps of so large a model make its loss rise, and roundings with it."""
BALANCE = {"scope": "global"}
"""By default each rank balances the loads of its own tokens, which is another loss on another number of ranks."""
STATE_BYTES = 12
"""Of a parameter and its two moments."""


def main() -> None:
    """Train, resume and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 1])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the repository to measure")
    parser.add_argument("--folder", type=Path, help="where the runs are written; default: the temporary folder")
    parser.add_argument("--small", action="store_true")
    Size.add_options(parser)
    parser.set_defaults(layers=8, width=1024, experts=16, hidden=2720)
    given = parser.parse_args()
    size = Size.of(given)
    size = replace(size, hidden=size.hidden // 10) if given.small else size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state = STATE_BYTES * size.parameters
    print(
        f"{given.backend}: {size.parameters / 1e6:,.0f} M parameters; with AdamW's state {state / 2**30:.1f} GiB, "
        f"{state / memory:.0%} of {memory / 2**30:.1f} GiB",
        flush=True,
    )
    scratch = Path(tempfile.mkdtemp(prefix="large-", dir=given.folder))
    try:
        losses = _losses(given, size, scratch)
    finally:
        shutil.rmtree(scratch)
    wanted = losses[given.ranks[0]]
    faults = [
        f"{ranks} ranks, step {step}: {loss!r}, expected {wanted[step]!r}"
        for ranks, own in losses.items()
        for step, loss in own.items()
        if abs(loss - wanted[step]) > LIMIT * abs(wanted[step])
    ]
    print("\n".join(faults) or f"the losses after resuming agree to {LIMIT:g} on {given.ranks} ranks")
    raise SystemExit(bool(faults))


def _losses(given: argparse.Namespace, size: Size, scratch: Path) -> dict[int, dict[int, float]]:
    """By number of ranks, the losses of steps 2 and 3 after a resume."""
    first, tree = given.ranks[0], given.tree.resolve()
    config = _config(size, given.backend, first, scratch / "first", steps=1)
    started = time.perf_counter()
    found = run("memory.py", given.backend, first, config, [], tree)
    _say(f"{first} ranks, 1 step", found, time.perf_counter() - started)
    losses = {}
    for ranks in given.ranks:
        folder = scratch / f"on-{ranks}"
        shutil.copytree(scratch / "first/run", folder / "run", copy_function=_linked)
        config = _config(size, given.backend, ranks, folder, steps=3)
        started = time.perf_counter()
        found = run("memory.py", given.backend, ranks, config, ["--resume"], tree)
        _say(f"resumed on {ranks} ranks, 2 steps", found, time.perf_counter() - started)
        lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        losses[ranks] = {line["step"]: line["loss"] for line in lines if "loss" in line and line["step"] > 1}
        print(f"  losses {losses[ranks]}", flush=True)
        shutil.rmtree(folder)
    return losses


def _linked(source: str, target: str) -> None:
    """Give a file of arrays a second name, and copy any other, which the run may append to."""
    (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)


def _config(size: Size, backend: str, ranks: int, folder: Path, steps: int) -> dict[str, Any]:
    checkpoint = {"asynchronous": False, "keep_last": 1, "keep_best": False}
    rate = {"learning_rate": RATE}
    config = config_of(size, backend, ranks, folder, training={"steps": steps}, checkpoint=checkpoint, optimizer=rate)
    config["model"]["moe"]["load_balance"] = BALANCE
    return config


def _say(what: str, found: list[dict[str, int]], seconds: float) -> None:
    phases = {phase: max(each[phase] for each in found) for phase in found[0]}
    listed = ", ".join(f"{phase} {peak / MIB:,.0f} MiB" for phase, peak in phases.items())
    print(f"{what}: {seconds:.0f} s; peak of a rank: {listed}", flush=True)


if __name__ == "__main__":
    main()
