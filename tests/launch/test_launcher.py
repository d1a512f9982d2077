"""What the launchers put into the environment."""

import os
import subprocess
import sys

import pytest

from moeport.errors import UserError
from moeport.launch.launcher import Launch, launched
from moeport.launch.slurm import expand_hosts, tasks_per_node
from tests.comm.jobs import ROOT, free_port
from tests.jobs.ranks import start_all

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
SLURM = {
    "SLURM_JOB_ID": "1720714",
    "SLURM_JOB_NODELIST": "gpu[003-005,07]",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[005,07]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "16",
    "SLURM_TASKS_PER_NODE": "4(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
"""As srun's manual page describes it, in a step on two of the four nodes of a job."""
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-node-0-4242@1",
    "MASTER_ADDR": "node-0",
}
"""As Open MPI's manual describes it, in the second of two nodes, with `-x MASTER_ADDR`."""


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


@pytest.mark.parametrize(
    ("environment", "name", "text", "wanted"),
    [
        (environment, name, text, wanted)
        for environment, rank, size, host, port in (
            (TORCHRUN, "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
            (MSRUN, "MS_NODE_ID", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT"),
        )
        for name, text, wanted in (
            (rank, "one", "an integer (got 'one')"),
            (rank, "", "an integer (got '')"),
            (rank, "-1", f"0 to {int(environment[size]) - 1}, since {size} is {environment[size]} (got -1)"),
            (rank, environment[size], f"0 to {int(environment[size]) - 1}, since {size} is {environment[size]} (got "),
            (size, "2.0", "an integer (got '2.0')"),
            (size, "0", "at least 1 (got 0)"),
            (port, "http", "an integer (got 'http')"),
            (port, "70000", "1 to 65535 (got 70000)"),
            (port, "9" * 20, "an integer (got '9999"),
            (host, " ", "a host name or address (got ' ')"),
        )
    ],
)
def test_garbled_variables(environment, name, text, wanted):
    with pytest.raises(UserError) as error:
        launched(environment | {name: text})
    assert str(error.value).startswith(f"environment variable {name}: expected {wanted}")


def test_slurm():
    port = 15000 + 1823  # the CRC-32 of "1720714.2"
    assert launched(SLURM) == Launch("slurm", 5, 8, 1, host="gpu005", port=port, local_size=4)
    assert launched(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) == Launch(
        "slurm", 5, 8, 1, host="10.0.0.1", port=29500, local_size=4
    )


def test_slurm_with_the_variables_of_the_job_alone():
    step = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    job = without(SLURM, *step) | {"SLURM_NTASKS_PER_NODE": "4"}
    assert launched(job) == Launch("slurm", 5, 16, 1, host="gpu003", port=16823, local_size=4)


@pytest.mark.parametrize(
    "environment",
    [
        without(SLURM, "SLURM_STEP_ID"),  # the script of sbatch
        SLURM | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # the shell of salloc
        without(SLURM, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1"},
        without(OPENMPI, "MASTER_ADDR") | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_alone_under_slurm_or_open_mpi(environment):
    assert launched(environment) is None


def test_who_started_the_process_itself_wins():
    assert launched(SLURM | OPENMPI | TORCHRUN) == launched(TORCHRUN)
    assert launched(SLURM | OPENMPI | MSRUN) == launched(MSRUN)
    assert launched(SLURM | OPENMPI) == launched(OPENMPI)


def test_openmpi():
    port = 15000 + 8273  # the CRC-32 of the namespace
    assert launched(OPENMPI) == Launch("openmpi", 5, 8, 1, host="node-0", port=port, local_size=4)
    assert launched(OPENMPI | {"MASTER_PORT": "29500"}).port == 29500


def test_openmpi_on_one_node():
    one = without(OPENMPI, "MASTER_ADDR") | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert launched(one).host == "localhost"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"},
            "srun started 3(x2),2 tasks on the nodes; expected the same number on each: use --ntasks-per-node=N",
        ),
        (
            OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "3"},
            "mpirun started 3 of 8 processes on this node; expected the same number on each node: "
            "use --map-by ppr:N:node",
        ),
        (
            without(OPENMPI, "MASTER_ADDR"),
            "mpirun started 8 processes, 4 of them on this node, and does not say where rank 0 is; "
            "pass the name of its host: mpirun -x MASTER_ADDR=HOST",
        ),
        (SLURM | {"MASTER_PORT": "any"}, "environment variable MASTER_PORT: expected an integer (got 'any')"),
        (
            without(SLURM, "SLURM_LOCALID"),
            "the environment is that of a process of srun in part: SLURM_PROCID, SLURM_STEP_NUM_TASKS, "
            "SLURM_STEP_TASKS_PER_NODE, SLURM_STEP_NODELIST is set, SLURM_LOCALID is not; "
            "start with srun, or unset what is set",
        ),
    ],
)
def test_what_slurm_and_open_mpi_cannot_do(environment, message):
    with pytest.raises(UserError) as error:
        launched(environment)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("node-0", ["node-0"]),
        ("gpu[003-005,07],login1", ["gpu003", "gpu004", "gpu005", "gpu07", "login1"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("a[09-11]-ib,b", ["a09-ib", "a10-ib", "a11-ib", "b"]),
        ("r[1-2]n[0,3]", ["r1n0", "r1n3", "r2n0", "r2n3"]),
        ("x,y[1,2],z", ["x", "y1", "y2", "z"]),
    ],
)
def test_hosts_of_slurm(names, hosts):
    assert expand_hosts(names) == hosts


@pytest.mark.parametrize(
    ("counts", "tasks"), [("4", [4]), ("4(x2)", [4, 4]), ("2,1", [2, 1]), ("12(x2),3,1(x3)", [12, 12, 3, 1, 1, 1])]
)
def test_tasks_of_slurm(counts, tasks):
    assert tasks_per_node(counts) == tasks


def slurm(rank, size):
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost,unused[1-2]",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def openmpi(rank, size):
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(size),
        "PMIX_NAMESPACE": f"prterun-test-{os.getpid()}@1",
    }


@pytest.mark.parametrize(("environment", "size"), [(slurm, 4), (openmpi, 2)])
def test_torch_communicates_in_their_environment(tmp_path, environment, size):
    """Neither Slurm nor Open MPI runs here: processes get the variables that they set."""
    pytest.importorskip("torch")
    arguments = ["-m", "moeport", "probe", "--device", "cpu"]
    job = start_all("torch", [arguments] * size, [environment(rank, size) for rank in range(size)], tmp_path)
    try:
        code = job.wait(240)
    finally:
        job.kill()
    outputs = [(tmp_path / f"worker_{rank}.log").read_text() for rank in range(size)]
    assert code == 0, outputs
    assert f": {size} ranks on 1 node\n" in outputs[0]
    assert ["every value is right" in output for output in outputs] == [True] + [False] * (size - 1)


def test_mindspore_communicates_under_msrun_alone():
    pytest.importorskip("mindspore")
    command = [sys.executable, "-m", "moeport", "probe", "--backend", "mindspore", "--device", "cpu"]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | alone | place
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "backend.name: mindspore communicates under msrun (started by torchrun)" in done.stderr
