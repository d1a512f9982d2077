"""Reads where the time went from a Chrome trace of torch.profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moeport.backends.profiler import WorkTimes
from moeport.backends.torch.profiling.attribution import BACKWARD, Attribution, Event, State, gradient_key
from moeport.backends.torch.profiling.marks import PAUSE, STEP
from moeport.core.parts import KINDS, Part

Span = tuple[float, float]
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
THREAD = ("cpu_op", "user_annotation", *LAUNCHES)
NAMED = 5
"""Number of operations that are named of those that belong to no part."""


def times_of(trace: Mapping[str, Any]) -> WorkTimes | None:
    """Where the time of the profiled steps went; None if the trace has no whole step.

    Args:
        trace: a trace in the Trace Event Format, times in microseconds.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation"]
    if not steps:
        return None
    spans = _counted(steps, [event for event in events if event["name"] == PAUSE])
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in THREAD:
            threads[event["tid"]].append(event)
    for nested in threads.values():
        nested.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    attribution = Attribution(_forward_parts(threads, trace["traceEvents"]))
    device = [event for event in events if event.get("cat") in DEVICE]
    tally = _Tally(spans)
    if device:
        _add_device(tally, device, _launchers(threads, attribution))
        clock = "device"
    else:
        main = steps[0]["tid"]
        _sweep(threads[main], attribution, tally.add)
        tally.add_overlap(
            [_span(event) for tid, nested in threads.items() if tid != main for event in nested if _is_transfer(event)]
        )
        clock = "cpu"
    return tally.times(clock)


def _is_transfer(event: Event) -> bool:
    return event["name"].startswith(("gloo:", "nccl:"))


def _counted(steps: Sequence[Event], pauses: Sequence[Event]) -> list[Span]:
    """From the beginning of the first step to the end of the last one, without pauses."""
    start, end = min(step["ts"] for step in steps), max(_span(step)[1] for step in steps)
    spans = []
    for pause_start, pause_end in sorted(map(_span, pauses)):
        if start < pause_start < end:
            spans.append((start, pause_start))
            start = max(start, pause_end)
    return [*spans, (start, end)]


def _span(event: Event) -> Span:
    return event["ts"], event["ts"] + event.get("dur", 0)


def _states(nested: Sequence[Event], attribution: Attribution) -> Iterator[tuple[Event, State]]:
    """Every event of a thread with the state inside it."""
    stack: list[tuple[float, State]] = []
    for event in nested:
        start, end = _span(event)
        while stack and stack[-1][0] <= start:
            stack.pop()
        state = attribution.inside(stack[-1][1] if stack else State(), event)
        stack.append((end, state))
        yield event, state


def _forward_parts(threads: Mapping[Any, Sequence[Event]], events: Sequence[Event]) -> dict[tuple[int, int], Part]:
    """The part of each operation that autograd recorded, by its thread's number and its sequence number.

    An operation that needs no gradient carries the number of the next one that does: the last one made the node.
    """
    numbers = _thread_numbers(threads, events)
    parts: dict[tuple[int, int], Part] = {}
    for tid, nested in threads.items():
        for event, state in _states(nested, Attribution()):
            args = event.get("args", {})
            sequence = args.get("Sequence number", -1)
            if sequence < 0 or args.get("Fwd thread id") or state.part is None or event["name"].startswith(BACKWARD):
                continue
            parts[numbers.get(tid, 1), sequence] = state.part
    return parts


def _thread_numbers(threads: Mapping[Any, Sequence[Event]], events: Sequence[Event]) -> dict[Any, int]:
    """The number by which the profiler calls each thread that ran operations forward, from the arrows it draws."""
    backward = {
        (tid, event["ts"]): gradient_key(event)[0]
        for tid, nested in threads.items()
        for event in nested
        if event.get("args", {}).get("Fwd thread id")
    }
    arrows = [event for event in events if event.get("cat") == "fwdbwd"]
    ends = {event["id"]: (event["tid"], event["ts"]) for event in arrows if event["ph"] == "f"}
    return {
        event["tid"]: backward[ends[event["id"]]]
        for event in arrows
        if event["ph"] == "s" and ends.get(event["id"]) in backward
    }


def _sweep(nested: Sequence[Event], attribution: Attribution, add: Callable[[float, float, State], None]) -> None:
    """Call `add` for every stretch of a thread's time, with the state of the innermost event."""
    stack: list[tuple[float, State]] = []
    cursor = 0.0

    def advance(to: float) -> None:
        nonlocal cursor
        if to > cursor:
            add(cursor, to, stack[-1][1] if stack else State())
            cursor = to

    for event, state in _states(nested, attribution):
        start, end = _span(event)
        while stack and stack[-1][0] <= start:
            advance(stack[-1][0])
            stack.pop()
        advance(start)
        stack.append((end, state))
    while stack:
        advance(stack[-1][0])
        stack.pop()


def _launchers(threads: Mapping[Any, Sequence[Event]], attribution: Attribution) -> dict[int, State]:
    """Where each kernel was launched, by the number that ties it to its launch."""
    return {
        event["args"]["correlation"]: state
        for nested in threads.values()
        for event, state in _states(nested, attribution)
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }


def _add_device(tally: _Tally, device: Sequence[Event], launchers: Mapping[int, State]) -> None:
    """Give every stretch of the device's time to the kernel that computes, else to communication, else to idling."""
    ends: list[tuple[float, int, Event, State]] = []
    for number, event in enumerate(device):
        state = launchers.get(event.get("args", {}).get("correlation"), State()).on_device(event["name"])
        start, end = _span(event)
        ends += [(start, number, event, state), (end, -number - 1, event, state)]
    ends.sort(key=lambda entry: entry[0])
    running: dict[int, State] = {}
    cursor = ends[0][0]
    tally.add_idle(tally.spans[0][0], cursor)
    for time, number, _, state in ends:
        communicates = [one for one in running.values() if one.kind == "communication"]
        computes = next((one for one in running.values() if one.kind != "communication"), None)
        if computes:
            tally.add(cursor, time, computes)
            tally.overlapped += tally.counted(cursor, time) if communicates else 0.0
        elif communicates:
            tally.add(cursor, time, communicates[0])
        else:
            tally.add_idle(cursor, time)
        cursor = time
        if number >= 0:
            running[number] = state
        else:
            running.pop(-number - 1)
    tally.add_idle(cursor, tally.spans[-1][1])


class _Tally:
    """Sums up stretches of time by kind, as far as they are in the counted spans."""

    def __init__(self, spans: Sequence[Span]):
        self.spans, self.overlapped = spans, 0.0
        self._kinds: defaultdict[str, float] = defaultdict(float)
        self._others: defaultdict[str, float] = defaultdict(float)
        self._exposed: list[Span] = []

    def counted(self, start: float, end: float) -> float:
        """Microseconds of a stretch that count."""
        return sum(max(0.0, min(end, last) - max(start, first)) for first, last in self.spans)

    def add(self, start: float, end: float, state: State) -> None:
        """Count a stretch as the kind of a state."""
        time = self.counted(start, end)
        if time <= 0:
            return
        kind = state.kind
        self._kinds[kind] += time
        if kind == "other":
            self._others[state.top] += time
        elif kind == "communication":
            self._exposed.append((start, end))

    def add_idle(self, start: float, end: float) -> None:
        """Count a stretch in which nothing ran."""
        self._kinds["idle"] += self.counted(start, end)

    def add_overlap(self, transfers: Sequence[Span]) -> None:
        """Count transfers of other threads as overlapped, where this one did not wait for them."""
        cursor, exposed = 0.0, sorted(self._exposed)
        for start, end in sorted(transfers):
            start = max(start, cursor)
            if end <= start:
                continue
            cursor = end
            waited = sum(max(0.0, min(end, last) - max(start, first)) for first, last in exposed)
            self.overlapped += self.counted(start, end) - waited
        self.overlapped = max(0.0, self.overlapped)

    def times(self, clock: str) -> WorkTimes:
        """The sums in seconds."""
        return WorkTimes(
            clock=clock,
            wall=sum(end - start for start, end in self.spans) / 1e6,
            seconds={kind: self._kinds[kind] / 1e6 for kind in KINDS},
            overlapped=self.overlapped / 1e6,
            others=[
                (name, time / 1e6) for name, time in sorted(self._others.items(), key=lambda entry: -entry[1])[:NAMED]
            ],
        )
