"""Ranks that cannot meet: each ends in one sentence that says what is waited for or wrong, and with exit code 2."""

import itertools
import re
import socket

import pytest
import yaml

from tests.jobs.ports import free_port
from tests.jobs.ranks import start_all
from tests.training.tiny import tiny_values

TIMEOUT = 8.0
"""comm.timeout of the ranks; mostly waited out."""

ABSENT = r"rank {} of {} has not come to 127\.0\.0\.1:\d+ within 8 s \(comm\.timeout\); {} came, from \S+"
NOT_FOUND = r"rank 1 of 2 has not found rank 0 at 127\.0\.0\.1:\d+ within [\d.]+ s \({}\)"
IN_USE = r"MASTER_PORT: rank 0 cannot listen on port \d+ of \S+ \(Address already in use\); {}"
STRANGER = NOT_FOUND.format("what answers there is not a moeport process that waits for ranks")
NO_NAME = r"MASTER_ADDR: the host name 'nowhere\.invalid' does not resolve on \S+ \(.+\); expected the name or address"
SIZES = (
    r"the ranks disagree on WORLD_SIZE, their number: 2 on rank 0 \(host \S+, pid \d+\), 3 on rank 1 \(host \S+, pid "
    r"\d+\); start every rank of the job with the same number"
)
TWICE = r"host \S+, pid \d+ too says that it is rank {0}, as host \S+, pid \d+ does"
FAULT = r"--set training\.step=2 training\.step: unknown key"
DOES_NOT_START = r"rank {} of 2 \(host \S+, pid \d+\) does not start: " + FAULT

CASES = {
    "foreign program": ([(0, 2), (1, 2)], {}, [IN_USE.format("end what uses it"), STRANGER]),
    "no such host": ([(0, 2)], {"MASTER_ADDR": "nowhere.invalid"}, [NO_NAME]),
    "rank 1 absent": ([(0, 2)], {}, [ABSENT.format(1, 2, "rank 0")]),
    "rank 0 absent": ([(1, 2)], {}, [NOT_FOUND.format("Connection refused")]),
    "two of rank 0": ([(0, 2), (0, 2)], {}, [ABSENT.format(1, 2, "rank 0"), IN_USE.format("other ranks meet there")]),
    "two of rank 1": (
        [(0, 3), (1, 3), (1, 3)],
        {},
        [ABSENT.format(2, 3, "ranks 0, 1") + "; " + TWICE.format(1)] * 2 + [TWICE.format(1) + "; give every process"],
    ),
    "other sizes": ([(0, 2), (1, 3)], {}, [SIZES] * 2),
    "rank 0 refused": ([(0, 2), (1, 2)], {}, [FAULT, DOES_NOT_START.format(0)]),
    "rank 1 refused": ([(0, 2), (1, 2)], {}, [DOES_NOT_START.format(1), FAULT]),
}
"""By what is wrong: rank and size of each process, variables of all, and the start of each's sentence."""


def environment(rank, size, port, variables):
    """As torchrun would give it, without torchrun's store."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    found = place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | variables
    return {name: str(value) for name, value in found.items()}


def start(name, config, port, folder):
    """The ranks of a case, and where they write."""
    ranks, variables, _ = CASES[name]
    folder.mkdir()
    own = [environment(rank, size, port, variables) for rank, size in ranks]
    command = ["-m", "moeport", "train", str(config)]
    commands = [command + ["--set", "training.step=2"] * (name == f"rank {rank} refused") for rank, _ in ranks]
    return start_all("torch", commands, own, folder)


def test_each_process_says_in_one_sentence_why_they_do_not_meet(tmp_path):
    """All cases at the same time: they mostly wait."""
    pytest.importorskip("torch")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_values(tmp_path, comm={"timeout": TIMEOUT})))
    with socket.create_server(("127.0.0.1", 0)) as foreign:  # accepts, and says nothing
        ports = {"foreign program": foreign.getsockname()[1]}
        jobs = {}
        try:
            for name in CASES:
                jobs[name] = start(name, config, ports.get(name) or free_port(), tmp_path / name)
            codes = {name: [rank.wait(100) for rank in job.ranks] for name, job in jobs.items()}
        finally:
            for job in jobs.values():
                job.kill()
    for name, (_, _, expected) in CASES.items():
        said = sorted(file.read_text() for file in (tmp_path / name).iterdir())
        assert codes[name] == [2] * len(said), (name, said)
        assert matches(said, expected), (name, said)


def matches(said, expected):
    """Whether each sentence is said once, by whichever process: two with one rank may come in any order."""
    return any(
        all(re.fullmatch(f"error: {one}.*\n", text) for one, text in zip(expected, order, strict=True))
        for order in itertools.permutations(said)
    )
