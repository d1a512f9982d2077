"""Time of an exchange and the experts in it, whose tokens travel in chunks while experts compute on others.

The schedule is that of `moeport.comm.exchange`: chunks take turns, a stage each; experts compute when a chunk has come,
then it starts back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeport.comm.load import Load
from moeport.plan.cost import Links


@dataclass(frozen=True)
class Stage:
    """Seconds of one stage for one chunk."""

    processor: float
    """During which the processor is busy before the chunk is under way."""
    link: float
    """After that, while the processor is free."""
    crosses: bool
    """Whether the link between nodes carries it."""


def overlapped(links: Links, loads: Sequence[Load], experts: float, chunks: int, is_shared: bool) -> float:
    """Seconds of one layer's exchange and of its experts; with one chunk the sum of both.

    Each chunk has all messages and its part of the bytes and of what experts compute; copies hide nothing. The links
    inside nodes and between them carry chunks at once, one each. Where ranks share a processor, messages and the bytes
    that it carries keep it, and only the time that the link takes longer is free for experts.

    Args:
        links: of the cluster.
        loads: of `moeport.plan.cost.loads`, forward or both passes.
        experts: seconds that they compute in those passes; backward takes twice as long as forward.
        chunks: of a rank's tokens.
        is_shared: whether ranks share a processor.
    """
    copies = links.cost([load for load in loads if load.stage == "copies"]).copies

    def stages(is_backward: bool, is_combine: bool) -> list[Stage]:
        return [
            _stage(links, load, chunks, is_shared)
            for load in loads
            if load.stage != "copies" and (load.is_backward, load.stage == "combine") == (is_backward, is_combine)
        ]

    there, back = stages(False, False), stages(False, True)
    if not any(load.is_backward for load in loads):
        return copies + _pass(there, back[::-1], experts, chunks)
    forward = _pass(there, back[::-1], experts / 3, chunks)
    return copies + forward + _pass(stages(True, True), stages(True, False)[::-1], experts * 2 / 3, chunks)


def _stage(links: Links, load: Load, chunks: int, is_shared: bool) -> Stage:
    latency, (inside, between) = links.cost([load]).latency, links.transfers(load)
    longer = max(0.0, between - inside) / chunks
    carried = latency + inside / chunks
    crosses = between > inside
    return Stage(carried, longer, crosses) if is_shared else Stage(0.0, carried + longer, crosses)


def _pass(there: Sequence[Stage], back: Sequence[Stage], work: float, chunks: int) -> float:
    """Seconds of the stages to the experts, of the work there, and of the stages back."""
    processor, link = 0.0, {False: 0.0, True: 0.0}
    arrived = [0.0] * chunks
    for number, stage in enumerate([*there, *back]):
        for chunk in range(chunks):
            processor = max(processor, arrived[chunk]) + stage.processor
            if number == len(there):
                processor += work / chunks
            link[stage.crosses] = max(link[stage.crosses], processor) + stage.link
            arrived[chunk] = link[stage.crosses]
    return max(arrived)
