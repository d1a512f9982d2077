"""What runs on the device: contenders compared with the reference, and timed in rounds.

Results are plain dicts that are handed to `say` whenever there is more to tell, so that what ends a process early, a
kernel's illegal access or a deadline, loses nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from contest.clock import device_name, free_bytes, held_bytes, host_waits, milliseconds, peak_bytes, synchronize
from contest.contender import Contender, Layer
from contest.problem import TOLERANCE, Problem, draw, draw_decided, errors, loads, redraw, reference
from contest.shapes import Shape

Say = Callable[[dict[str, Any]], None]
FEWEST_ROUNDS = 3
READY_SHARE = 0.65
"""Of the time of a shape; after it no contender is prepared any more, so that those that are have their rounds."""
ROOM = 2.25
"""A contender that copies the weights takes part only if at least this many times their bytes are free, for the copy,
the gradients of the contender whose turn it is, and activations. Otherwise contenders that copy nothing would run out
of memory.
"""
LONGEST_CALL_S = 20.0
"""A contender whose call takes longer is not timed in rounds."""


@dataclass(frozen=True)
class Terms:
    """How is measured."""

    device: str
    dtype: torch.dtype
    rounds: int
    backward: bool = True
    """Whether the backward pass is timed too."""
    forward: bool = True
    """Whether the forward pass alone is timed too."""


def short(error: BaseException) -> str:
    """An error in one line."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[0][:160]


def check(contender: Contender, shape: Shape, terms: Terms) -> dict[str, Any]:
    """Compare a contender with the reference on a small layer of this kind.

    Returns: `error`, the worst relative error, and `reason` if it may not be timed.
    """
    if contender.differs:
        return {"differs": contender.differs}
    problem = draw_decided(shape.small(), terms.device, terms.dtype)
    want = reference(problem)
    layer = contender.build(problem)
    y_TD = layer.run(problem.x_TD)
    found = torch.autograd.grad(y_TD, [problem.x_TD, *layer.parameters], problem.grad_TD)
    by_part = errors([y_TD.detach(), found[0], *layer.common(found[1:])], want)
    part = max(by_part, key=lambda name: by_part[name] if by_part[name] == by_part[name] else float("inf"))
    worst = by_part[part]
    result: dict[str, Any] = {"error": worst, "errors": by_part}
    if not worst <= TOLERANCE[terms.dtype]:
        result["reason"] = f"wrong: {part} off by {worst:.1e}, at most {TOLERANCE[terms.dtype]:.0e} expected"
    return result


def warm_up(contender: Contender, shapes: Sequence[Shape], terms: Terms, deadline: float) -> None:
    """Call a contender on layers of other widths with few tokens, so that its kernels for them are compiled."""
    for shape in shapes:
        if time.time() < deadline:
            problem = draw(shape, terms.device, terms.dtype)
            forward, both = passes(contender.build(problem), problem)
            (both or forward)()
            synchronize(terms.device)
            del problem, forward, both
            free(terms.device)


def passes(layer: Layer, problem: Problem) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """Calls of the forward pass, and of both passes."""

    def forward() -> object:
        return layer.run(problem.x_TD)

    def both() -> object:
        y_TD = layer.run(problem.x_TD)
        return torch.autograd.grad(y_TD, [problem.x_TD, *layer.parameters], problem.grad_TD)

    return forward, both if layer.backward else None


def free(device: str) -> None:
    """Return what is no longer used to the device."""
    gc.collect()
    if torch.device(device).type != "cpu":
        torch.get_device_module(torch.device(device).type).empty_cache()


def time_shape(
    shape: Shape, chosen: Mapping[str, Contender], terms: Terms, deadline: float, say: Say
) -> dict[str, Any]:
    """Time contenders on one shape, in rounds in which each has its turn and another one is first each time.

    Args:
        shape: the layer.
        chosen: contenders by name.
        terms: device, type, rounds.
        deadline: time.time() after which no round starts, once there are FEWEST_ROUNDS.
        say: is told the result so far.

    Returns: the result: `rows`, one per contender, with times in ms, memory in bytes, host waits, or a reason.
    """
    problem = draw(shape, terms.device, terms.dtype)
    load_E = loads(problem).float()
    rows: dict[str, dict[str, Any]] = {}
    result = {
        "shape": shape.as_dict(),
        "device": device_name(terms.device),
        "busiest": float(load_E.max() / load_E.mean()),
        "rows": rows,
        "at": "",
    }
    ready: dict[str, list[Callable[[], object] | None]] = {}
    ready_by = time.time() + READY_SHARE * (deadline - time.time())
    for name, contender in chosen.items():
        row = rows[name] = {"group": contender.group, "forward_ms": [], "both_ms": []}
        result["at"] = name
        say(result)
        if time.time() > ready_by:
            row["reason"] = "no time left"
            continue
        if contender.copies and free_bytes(terms.device) < ROOM * sum(x.nbytes for x in problem.weights):
            row["reason"] = "no room for its copy of the weights beside the others"
            continue
        try:
            ready[name] = list(_prepare(contender, problem, terms, row))
        except Exception as error:
            row["reason"] = short(error)
        if "reason" in row:
            ready.pop(name, None)
        free(terms.device)
    seeds = count(1)
    for index in range(terms.rounds):
        if index >= FEWEST_ROUNDS and time.time() > deadline:
            break
        _round(index, ready, rows, terms, result, lambda: redraw(problem, next(seeds)))
        say(result)
    result.pop("at")
    say(result)
    return result


def _prepare(
    contender: Contender, problem: Problem, terms: Terms, row: dict[str, Any]
) -> tuple[Callable[[], object] | None, Callable[[], object] | None]:
    """Build a contender, call it for the first time, and measure what one call shows."""
    started = time.perf_counter()
    layer = contender.build(problem)
    forward, both = passes(layer, problem)
    (both or forward)()
    synchronize(terms.device)
    row["first_call_s"] = round(time.perf_counter() - started, 3)
    if row["first_call_s"] > LONGEST_CALL_S:
        started = time.perf_counter()
        (both or forward)()
        synchronize(terms.device)
        if time.perf_counter() - started > LONGEST_CALL_S:
            row["reason"] = f"one call takes more than {LONGEST_CALL_S:g} s"
    if both is not None:
        row["held"] = held_bytes(layer.run, problem.x_TD, [*layer.parameters, *problem.weights])
        row["peak"] = peak_bytes(both, terms.device)
        row["waits"] = host_waits(both, terms.device)
    wants_forward = terms.forward or both is None
    return forward if wants_forward else None, both if terms.backward else None


def _round(
    index: int,
    ready: dict[str, list[Callable[[], object] | None]],
    rows: Mapping[str, dict[str, Any]],
    terms: Terms,
    result: dict[str, Any],
    prepare: Callable[[], None],
) -> None:
    """One turn of each, each call with tokens of its own; a contender that fails leaves."""
    names: Sequence[str] = list(ready)
    start = index % max(1, len(names))
    for name in [*names[start:], *names[:start]]:
        result["at"] = name
        try:
            for fn, key in zip(ready[name], ("forward_ms", "both_ms"), strict=True):
                if fn is not None:
                    prepare()
                    rows[name][key].append(milliseconds(fn, terms.device))
        except Exception as error:
            rows[name]["reason"] = short(error)
            del ready[name]
            free(terms.device)
