"""Checks, before a job computes anything, that its communication library delivers the right values.

A wrong all-to-all is replaced if the backend can compose one from messages between pairs of ranks. Any other wrong
value ends the job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeport.comm.check import COLLECTIVES, check_collectives, described, first_wrong, wrong_values
from moeport.comm.communicator import Communicator

EXCHANGE = ("all_to_all", "all_to_all gradient")
"""Collectives that a composition of messages can replace."""
REST = tuple(name for name in COLLECTIVES if name not in EXCHANGE)


def check_start(
    world: Communicator,
    dtypes: Sequence[str],
    value_and_grad: Callable[..., Any] | None,
    versions: Mapping[str, str],
    groups: Sequence[Communicator] = (),
) -> str | None:
    """Check the values of every collective once; every rank of the job calls it.

    Args:
        world: all ranks.
        dtypes: those in use, as for `check_collectives`.
        value_and_grad: a backend's; None if it does not differentiate.
        versions: a backend's, for the messages.
        groups: further communicators, of some ranks each, that exchange rows; the same number on every rank.

    Returns: a sentence on what takes the place of a wrong all-to-all; None if every value was right.

    Raises RunError for a wrong value, with the collective, the ranks and the versions.
    """
    if world.size == 1:
        return None
    exchanging = [group for group in dict.fromkeys((world, *groups)) if group.size > 1]
    problem = next(filter(None, [first_wrong(group, dtypes, value_and_grad, EXCHANGE) for group in exchanging]), None)
    said = None
    if world.on_any_rank(problem is not None):
        library = described(world, versions)
        composed = [group.compose_all_to_all() for group in exchanging]
        if problem and not all(composed):
            raise wrong_values(problem, library)
        for group in exchanging:
            check_collectives(group, dtypes, value_and_grad, EXCHANGE, versions)
        where = problem or "all_to_all gives wrong values on other ranks"
        said = f"{where} ({library}); sends and receives take its place"
    check_collectives(world, dtypes, value_and_grad, REST, versions)
    return said
