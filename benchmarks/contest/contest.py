"""A contest of layers: every contender is checked, those that pass are timed shape by shape, within a budget."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from contest.child import Terms, check, short, time_shape, warm_up
from contest.contender import Contender
from contest.contenders import contenders
from contest.jobs import Process, write_whole
from contest.shapes import Shape

SCRIPT = Path(__file__).parents[1] / "moe_layer.py"
CHECK_SHARE = 0.35
"""Of the budget, at most, for comparisons with the reference."""
WARM_TOKENS, WARM_BYTES, WARM_MARGIN_S = 512, 4 * 2**30, 10.0
"""Kernels are compiled beside the comparisons: with how many tokens, for weights of at most how many bytes, and at the
latest how long before the end of the comparisons.
"""
MARGIN_S = 15.0
"""A process that times is ended this long after its share, if the budget has not ended before."""
DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "sonic-moe",
    "scattermoe",
    "liger-kernel",
    "megablocks",
    "torchtitan",
    "deepspeed",
    "st-moe-pytorch",
)
"""Packages whose versions are noted."""


@dataclass(frozen=True)
class Contest:
    """What is timed."""

    shapes: Sequence[Shape]
    terms: Terms
    seconds: float
    """Budget of the whole."""
    only: Sequence[str] = ()
    """Texts in the names of the contenders that take part; empty: all."""
    isolate: bool = False
    """Whether comparisons and shapes run in processes of their own."""
    jobs: int = max(1, min(8, (os.cpu_count() or 1) // 2))
    """How many comparisons run at once, with `isolate`."""


def run(contest: Contest, folder: Path, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Hold a contest.

    Args:
        contest: shapes, device, budget.
        folder: for the files of processes.
        say: is told the results after every shape.

    Returns: `machine`, `checks` by contender, and `cells`, one per shape.
    """
    began = time.time()
    end = began + contest.seconds
    device = torch.device(contest.terms.device).type
    chosen = contenders(device, contest.only)
    found: dict[str, Any] = {"machine": machine(device), "terms": _as_json(contest.terms), "checks": {}, "cells": []}
    found["checks"] = checks(contest, chosen, folder, began + CHECK_SHARE * contest.seconds)
    passed = {name: each for name, each in chosen.items() if "reason" not in found["checks"][name]}
    say(found)
    for index, shape in enumerate(contest.shapes):
        share = (end - time.time()) / (len(contest.shapes) - index)
        if share <= 0:
            found["cells"].append({"shape": shape.as_dict(), "rows": {}, "reason": "no time left"})
            continue
        found["cells"].append(cell(contest, shape, passed, folder, time.time() + share, end))
        found["machine"]["name"] = found["cells"][-1].get("device") or found["machine"].get("name", "")
        say(found)
    found["seconds"] = round(time.time() - began, 1)
    say(found)
    return found


def checks(contest: Contest, chosen: Mapping[str, Contender], folder: Path, until: float) -> dict[str, dict[str, Any]]:
    """The verdict on every contender, with a `reason` if it is not timed."""
    terms, shape = contest.terms, contest.shapes[0]
    device = torch.device(terms.device).type
    verdicts: dict[str, dict[str, Any]] = {}
    waiting = []
    for name, contender in chosen.items():
        missing = contender.missing(device, terms.dtype)
        if missing:
            verdicts[name] = {"reason": missing}
        elif contender.differs:
            verdicts[name] = {"differs": contender.differs}
        elif contest.isolate:
            waiting.append(name)
        else:
            verdicts[name] = attempt(partial(check, contender, shape, terms))
    while waiting:
        batch, waiting = waiting[: contest.jobs], waiting[contest.jobs :]
        started = {}
        for name in batch:
            job = _job("check", name, shape, terms) | {"warm": warm_shapes(contest), "deadline": until - WARM_MARGIN_S}
            started[name] = Process(SCRIPT, job, folder, f"check {name}")
        for name, process in started.items():
            why = process.wait(until)
            verdicts[name] = process.result() or {"reason": why or "said nothing"}
    return {name: verdicts[name] for name in chosen}


def warm_shapes(contest: Contest) -> list[dict[str, Any]]:
    """The shapes with few tokens, one of each width, without those whose weights would fill a device many times."""
    item = contest.terms.dtype.itemsize
    found = {}
    for shape in contest.shapes:
        sizes = (shape.width, shape.experts, shape.hidden)
        if 3 * item * shape.width * shape.experts * shape.hidden <= WARM_BYTES:
            found[sizes] = replace(shape, tokens=min(shape.tokens, WARM_TOKENS)).as_dict()
    return list(found.values())


def attempt(fn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or the error as its reason."""
    try:
        return fn()
    except Exception as error:
        return {"reason": short(error)}


def cell(
    contest: Contest, shape: Shape, passed: Mapping[str, Contender], folder: Path, deadline: float, end: float
) -> dict[str, Any]:
    """The result of one shape; a contender that ends the process is left out, once, and the others start again."""
    if not contest.isolate:
        return attempt(lambda: time_shape(shape, passed, contest.terms, deadline, lambda result: None)) | {
            "shape": shape.as_dict()
        }
    names, culprits = list(passed), {}
    while True:
        last = min(end, deadline + MARGIN_S)
        job = _job("time", names, shape, contest.terms) | {"deadline": min(deadline, end - MARGIN_S / 3)}
        process = Process(SCRIPT, job, folder, f"time {shape.label}")
        why = process.wait(last)
        result = process.result() or {"rows": {}}
        culprit = result.get("at")
        if why and why != "out of time" and culprit in names and time.time() < deadline:
            culprits[culprit] = why
            names.remove(culprit)
            continue
        for name, reason in culprits.items():
            result["rows"][name] = {"group": passed[name].group, "reason": reason, "forward_ms": [], "both_ms": []}
        return result | ({"reason": why} if why else {}) | {"shape": shape.as_dict()}


def serve(job: Mapping[str, Any]) -> None:
    """Do the job of a process: compare one contender, or time several on one shape."""
    path = Path(job["result"])
    fields = dict(job["terms"])
    terms = Terms(**fields | {"dtype": getattr(torch, fields["dtype"])})
    shape = Shape(**job["shape"])
    table = contenders(torch.device(terms.device).type)
    if job["kind"] == "check":
        contender = table[job["contenders"]]
        write_whole(path, attempt(lambda: check(contender, shape, terms)))
        warm_up(contender, [Shape(**each) for each in job["warm"]], terms, job["deadline"])
        return
    chosen = {name: table[name] for name in job["contenders"]}
    time_shape(shape, chosen, terms, job["deadline"], lambda result: write_whole(path, result))


def machine(device: str) -> dict[str, Any]:
    """What it was measured on; does not touch an accelerator."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%F"),
    }
    if device == "cpu":
        found |= {"processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return found


def processor() -> str:
    """The name of the processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _as_json(terms: Terms) -> dict[str, Any]:
    return asdict(terms) | {"dtype": str(terms.dtype).removeprefix("torch.")}


def _job(kind: str, names: str | Sequence[str], shape: Shape, terms: Terms) -> dict[str, Any]:
    return {"kind": kind, "contenders": names, "shape": shape.as_dict(), "terms": _as_json(terms)}
