"""What the launchers put into the environment."""

import pytest

from moeport.comm.launcher import Launch, launched
from moeport.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}
"""As torchrun of PyTorch 2.13 sets it in the second of two nodes."""
MSRUN = {
    "RANK_SIZE": "4",
    "RANK_ID": "3",
    "MS_WORKER_NUM": "4",
    "MS_SCHED_HOST": "127.0.0.1",
    "MS_SCHED_PORT": "8118",
    "MS_TOPO_TIMEOUT": "60",
    "MS_ROLE": "MS_WORKER",
    "DEVICE_ID": "1",
    "MS_NODE_ID": "3",
}
"""As msrun of MindSpore 2.10 sets it."""


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


def test_alone():
    assert launched({"PATH": "/bin", "MASTER_ADDR": "node-0", "WORLD_SIZE": "2"}) is None


def test_torchrun():
    assert launched(TORCHRUN) == Launch(
        "torchrun", 5, 8, 1, host="node-0", port=29500, local_size=4, nodes=(0, 0, 0, 0, 1, 1, 1, 1)
    )


@pytest.mark.parametrize("changed", [{"GROUP_RANK": "0"}, {"LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}])
def test_nodes_of_different_sizes_are_not_guessed(changed):
    assert launched(TORCHRUN | changed).nodes is None
    assert launched(without(TORCHRUN, "GROUP_RANK")).nodes is None


def test_msrun():
    launch = launched(MSRUN)
    assert launch == Launch("msrun", 3, 4, 1, host="127.0.0.1", port=8118)
    assert not launch.is_scheduler


def test_the_scheduler_of_msrun():
    launch = launched(without(MSRUN, "MS_NODE_ID", "DEVICE_ID") | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"})
    assert launch == Launch("msrun", -1, 4, -1, host="127.0.0.1", port=8118)
    assert launch.is_scheduler


@pytest.mark.parametrize(
    "missing", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK"]
)
def test_torchrun_in_part(missing):
    with pytest.raises(UserError) as error:
        launched(without(TORCHRUN, missing))
    found = ", ".join(name for name in without(TORCHRUN, missing, "GROUP_RANK"))
    assert str(error.value) == (
        f"the environment is that of a process of torchrun in part: {found} is set, {missing} is not; "
        "start with torchrun, or unset what is set"
    )


@pytest.mark.parametrize("missing", ["MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "DEVICE_ID"])
def test_msrun_in_part(missing):
    with pytest.raises(UserError, match=f"of msrun in part: .*, {missing} is not; start with msrun"):
        launched(without(MSRUN, missing))


def test_msrun_without_ranks():
    with pytest.raises(UserError) as error:
        launched(without(MSRUN, "MS_NODE_ID") | {"RANK_ID": "0"})
    assert str(error.value) == "msrun gave this process no rank: MS_NODE_ID is not set; use --node_rank"


def test_what_is_no_number():
    with pytest.raises(UserError) as error:
        launched(TORCHRUN | {"WORLD_SIZE": "two"})
    assert str(error.value) == "environment variable WORLD_SIZE: expected an integer (got 'two')"
