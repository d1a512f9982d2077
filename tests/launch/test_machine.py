"""What is read of the machine's processor, and how ranks share its cores."""

import os

import pytest

from moeport.errors import UserError
from moeport.launch import machine, network
from moeport.launch.launcher import Launch
from moeport.launch.machine import Processor, accelerators_seen, cores_per_rank, processor
from moeport.processes import usable_cores

X86 = "processor\t: {n}\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx512f {flag}\n\n"
ARM = (
    "processor\t: {n}\nFeatures\t: fp asimd {flag}\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: 0xd40\n\n"
)


@pytest.mark.parametrize(
    ("text", "flag", "expected"),
    [
        (X86, "avx512_bf16", Processor("Some CPU @ 2 GHz", True)),
        (X86, "amx_bf16", Processor("Some CPU @ 2 GHz", True)),
        (X86, "avx2", Processor("Some CPU @ 2 GHz", False)),
        (ARM, "bf16", Processor("0x41 0xd40 0x1", True)),
        (ARM, "sve", Processor("0x41 0xd40 0x1", False)),
    ],
)
def test_the_processor_says_what_it_multiplies_in(tmp_path, text, flag, expected):
    file = tmp_path / "cpuinfo"
    file.write_text("".join(text.format(n=n, flag=flag) for n in range(2)))
    assert processor(file) == expected


def test_elsewhere_it_is_not_known(tmp_path):
    found = processor(tmp_path / "absent")
    assert found.bfloat16 is None
    assert found.model


def launch(local_size):
    return Launch("openmpi", 0, 8, 0, "127.0.0.1", 1, local_size)


@pytest.mark.parametrize(
    ("own", "launcher", "local_size", "expected"),
    [
        (8, 8, 2, 4),  # ranks that share the cores of their node
        (8, 8, 3, 2),
        (2, 2, 4, 1),
        (4, 16, 4, 4),  # a launcher that gives each rank its own
        (4, 64, 4, 4),
        (8, 8, None, 8),  # msrun does not say how many ranks a node has
        (8, 0, 2, 4),  # a launcher that has ended
    ],
)
def test_ranks_share_the_cores_of_their_node(monkeypatch, own, launcher, local_size, expected):
    monkeypatch.setattr(machine, "cores_of", lambda pid: {*range(own if pid == 0 else launcher)})
    assert cores_per_rank(launch(local_size)) == expected
    assert cores_per_rank(None) == own


def test_usable_cores():
    assert 1 <= usable_cores() <= os.cpu_count()
    assert usable_cores(2**22 + 1) in (0, os.cpu_count())  # no such process


def test_accelerators_are_seen_without_a_framework(tmp_path):
    for bus, text in (("0000:17:00.0", "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 31\n"), ("0000:65:00.0", "IRQ: 32\n")):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        (tmp_path / "gpus" / bus / "information").write_text(text)
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    found = ["NVIDIA H100 80GB HBM3", "NVIDIA GPU", "Ascend NPU davinci0", "Ascend NPU davinci1"]
    assert accelerators_seen(tmp_path / "gpus", tmp_path) == found
    assert accelerators_seen(tmp_path / "absent", tmp_path / "gpus") == []


def test_the_network_is_described(monkeypatch):
    def refuse():
        raise UserError("no root")

    monkeypatch.setattr(network, "require", refuse)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = network.network()
    loopback = next(each for each in found["interfaces"] if each["address"] == "127.0.0.1")
    assert loopback["up"]
    assert found["chosen"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert found["emulation"]["problem"] == "no root"
    assert set(found["launchers"]) == {"torchrun", "msrun", "mpirun", "srun"}


def test_an_interface_of_which_nothing_is_said(monkeypatch):
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(9, "absent9")])
    assert network.interfaces() == [{"name": "absent9", "address": None, "up": True, "mbit_per_second": None}]
