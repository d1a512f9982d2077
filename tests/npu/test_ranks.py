"""Two and three ranks on the real torch_npu front end with emulated kernels, whose `hccl` is gloo."""

import re

import numpy as np
import pytest

from moeport.comm.check import COLLECTIVES
from moeport.comm.single import SingleProcess
from moeport.config import resolved_yaml
from moeport.training.run import train
from tests.comm.jobs import ROOT, start
from tests.npu.test_training import CLOSE, losses, quickstart
from tests.training import ranks

WRONG_EXCHANGE = """
import sys
from tests.npu.emulation.collectives import Hccl
real = Hccl.alltoall_base
def zeros(self, output, *given, **more):
    work = real(self, output, *given, **more)
    if self.others > 2:
        output.zero_()
    return work
Hccl.alltoall_base = Hccl.all_to_all_single = zeros
sys.argv = ["moeport", *sys.argv[1:]]
from moeport.cli.main import main
main()
"""
"""An `hccl` whose all-to-all silently delivers zeros, as that of CANN 8.3.RC2 is said to among more than two ranks."""

SWAPPED = """
import sys
from moeport.backends.torch.communicator import TorchCommunicator
from moeport.comm.communicator import Transfer
real = TorchCommunicator._native_all_to_all
def swapped(self, x, send, receive):
    return real(self, x, receive, send)
def not_reversed(self):
    return Transfer(self.communicator, self.traffic, self.send, self.receive)
if sys.argv[1] == "forward":
    TorchCommunicator._native_all_to_all = swapped
else:
    Transfer.back = property(not_reversed)
sys.argv = ["moeport", *sys.argv[2:]]
from moeport.cli.main import main
main()
"""


def finished(folder, size, arguments):
    """What a job says that ends well."""
    job = start("torch", size, arguments, folder)
    try:
        assert (job.wait(280), job.left()) == (0, []), job.output()[-4000:]
        return job.output()
    finally:
        job.end()


def test_ranks_compute_what_one_process_does_on_the_cpu(tmp_path):
    """Losses, gradients, parameters, moments: FSDP2, experts over the ranks, micro-batches, a state loaded again."""
    finished(tmp_path / "job", 2, [str(ROOT / "tests/training/ranks.py"), "torch", str(tmp_path / "job"), "npu"])
    results = {path.stem: dict(np.load(path)) for path in (tmp_path / "job").glob("*.npz")}
    assert set(results) == set(ranks.ON_NPU)
    faults = []
    for case, found in results.items():
        config = ranks.one_process(ranks.config_of("torch", case, 2, tmp_path), 2)
        want = ranks.run(config, SingleProcess(ranks.backend_of(config.backend).ops))
        faults += ranks.faults_of(case, found, want)
    assert not faults, "\n".join(faults)
    assert (results["experts on all ranks"]["exchanged"][0] > 0).any(), "no row went to another rank"


def test_the_quickstart_on_two_ranks(tmp_path):
    """The command, with the experts over both ranks, has the losses of one process on the CPU."""
    steps = {"training.steps": 3}
    config = quickstart(tmp_path, "npu", **steps, **{"parallelism.expert": 2, "comm.algorithm": "flat"})
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    said = finished(tmp_path / "job", 2, ["-m", "moeport", "train", str(tmp_path / "config.yaml")])
    assert "ranks       2 on 1 node: the experts over 2 ranks each, all-to-all flat" in said
    alone = quickstart(tmp_path / "alone", "cpu", **steps, **{"training.gradient_accumulation": 2})
    train(alone)
    assert [len(each) for each in losses(alone)] == [3, 1]
    for found, want in zip(losses(config), losses(alone), strict=True):
        np.testing.assert_allclose(found, want, rtol=CLOSE)


def test_the_probe(tmp_path):
    said = finished(tmp_path / "job", 2, ["-m", "moeport", "probe", "--device", "npu"])
    assert re.search(r"torch on npu \(Ascend910\w*\): 2 ranks on 1 node", said)
    rows = [line.split() for line in said.splitlines() if " all " in line]
    dtypes = ("bfloat16", "float32", "float64", "index")
    names = [(name, dtype) for dtype in dtypes for name in COLLECTIVES if (name, dtype) != (COLLECTIVES[5], "index")]
    assert [(" ".join(row[:-4]), row[-4]) for row in rows] == names
    assert said.count("every value is right") == 1


def test_the_benchmark_of_an_exchange(tmp_path):
    sizes = ["-b", "1K", "-e", "1K", "-n", "2", "-w", "1", "--experts", "8", "--top-k", "3", "--width", "16"]
    said = finished(tmp_path / "job", 2, ["-m", "moeport", "bench", "comm", "all_to_all", "flat", *sizes])
    assert re.search(r"torch on npu \(Ascend910\w*\): 2 ranks on 1 node", said)
    rows = [line.split() for line in said.splitlines() if " float32 " in line]
    assert [row[0] for row in rows] == ["all_to_all", "flat"]
    assert "# Out of bounds values : 0 OK" in said


@pytest.mark.parametrize("command", ["probe", "train"])
def test_an_all_to_all_of_zeros_is_noticed_and_replaced(tmp_path, command):
    (tmp_path / "wrong.py").write_text(WRONG_EXCHANGE)
    script = [str(tmp_path / "wrong.py"), command]
    if command == "train":
        config = quickstart(tmp_path, "npu", **{"training.steps": 2, "training.batch_size": 6})
        (tmp_path / "config.yaml").write_text(resolved_yaml(config))
        script += [str(tmp_path / "config.yaml"), "--set", "parallelism.expert=3", "--set", "model.moe.num_experts=9"]
    said = finished(tmp_path / "job", 3, [*script, *["--device", "npu"] * (command == "probe")])
    assert re.search(
        r"all_to_all \(uneven\) of \w+ on rank 0 of ranks 0-2 gives wrong values, the first of \d+ at \(0, 0\): "
        r"expected [\d.]+, received 0.0 \(hccl; torch 2.*, torch_npu 2.*\); sends and receives take its place",
        said,
    ), said


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_swapped_sizes_of_an_all_to_all_are_found(tmp_path, direction):
    """A planted fault: sizes of what is sent and received change places. It ends the job before a step is trained."""
    (tmp_path / "swapped.py").write_text(SWAPPED)
    config = quickstart(tmp_path, "npu", **{"parallelism.expert": 2})
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    script = [str(tmp_path / "swapped.py"), direction, "train", str(tmp_path / "config.yaml")]
    job = start("torch", 2, script, tmp_path / "job")
    try:
        assert job.wait(280) == 1, job.output()[-4000:]
        assert job.left() == []
    finally:
        job.end()
    said = re.findall(r"^moeport: rank \d of 2 .*", job.output(), re.MULTILINE)
    assert said
    assert all("all_to_all" in line and "every rank stops" in line for line in said), said
    assert not (config.run.dir / "metrics.jsonl").exists()
