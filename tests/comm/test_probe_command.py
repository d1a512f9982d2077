"""`moeport probe` as a user starts it."""

import os
import subprocess
import sys

import pytest

from moeport.comm.check import COLLECTIVES
from tests.comm.jobs import launch, start

HOW = """error:
probe runs in the processes of a job, and this process was started by itself; start it with one of
  torchrun --nproc-per-node 2 -m moeport probe
  msrun --worker_num 2 --local_worker_num 2 --join True --log_dir logs python -m moeport probe
"""


def test_without_a_launcher_it_says_how():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "MS_ROLE")}
    command = [sys.executable, "-m", "moeport", "probe"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", HOW)


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_in_a_job(tmp_path, backend):
    """MindSpore under its launcher; tests/training and tests/launch have torch under torchrun."""
    pytest.importorskip(backend)
    module = ["-m", "moeport", "probe", "--device", "cpu"]
    job = (launch if backend == "mindspore" else start)(backend, 2, module, tmp_path / "job")
    try:
        assert job.wait(120) == 0, job.output()
    finally:
        job.end()
    out = job.output()
    assert f"{backend} on cpu" in out
    assert "2 ranks on 1 node\n" in out
    rows = [line.split() for line in out.splitlines() if " all " in line]
    dtypes = ["bfloat16"] * (backend == "torch") + ["float32", "float64", "index"]
    names = [(name, dtype) for dtype in dtypes for name in COLLECTIVES if (name, dtype) != (COLLECTIVES[5], "index")]
    assert [(" ".join(row[:-4]), row[-4]) for row in rows] == names
    assert all(row[-3:-1] == ["all", "right"] for row in rows)
    assert out.count("every value is right") == 1
