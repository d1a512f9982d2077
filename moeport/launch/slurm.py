"""Slurm's compact notation for hosts and task counts."""

from __future__ import annotations

import re
from itertools import product

_NUMBERS = r"\[\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?)*\]"
_NAME = rf"(?:[^][,\s]|{_NUMBERS})+"
_HOSTS = re.compile(rf"{_NAME}(?:,{_NAME})*")
_TASKS = re.compile(r"\d{1,6}(?:\(x\d{1,6}\))?(?:,\d{1,6}(?:\(x\d{1,6}\))?)*")


def expand_hosts(names: str) -> list[str]:
    """The host names in a list such as SLURM_JOB_NODELIST: `gpu[09-10,3],login1` is gpu09, gpu10, gpu3, login1.

    A name may contain several brackets; the last varies fastest. Empty for what is no such list.
    """
    hosts: list[str] = []
    if not _HOSTS.fullmatch(names):
        return hosts
    for name in re.findall(r"(?:\[[^]]*\]|[^,[])+", names):
        parts = re.split(r"\[(.*?)\]", name)  # every second part was in brackets
        choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in product(*choices)]
    return hosts


def _numbers(ranges: str) -> list[str]:
    """The numbers in `003-005,07`, keeping leading zeros."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def tasks_per_node(counts: str) -> list[int]:
    """The number of tasks on each node in SLURM_STEP_TASKS_PER_NODE: `4(x2),3` is 4, 4, 3; empty for anything else."""
    if not _TASKS.fullmatch(counts):
        return []
    return [int(count) for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
