"""What `moeport launch` writes for jobs on Ascend NPUs. Nothing here ran on one."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moeport.ascend.checks import findings
from moeport.ascend.installed import Machine
from moeport.errors import BackendUnavailableError, UserError
from moeport.launch import commands, npu, training
from moeport.launch.commands import LaunchSpec
from moeport.launch.npu import NpuJob, check_visible, on_node, settings
from tests.comm.jobs import ROOT
from tests.launch.test_launch_command import config, moeport  # noqa: F401  (a fixture)

TORCH = {"backend": {"device": "npu"}}
MINDSPORE = {"backend": {"name": "mindspore", "device": "npu"}}
JOB = NpuJob("torchrun", ranks_per_node=8, timeout_s=600.0, message_bytes=2**20)


def test_on_one_node_with_torch(moeport, tmp_path):  # noqa: F811
    file = config(tmp_path, **TORCH)
    assert moeport("launch", file, "--ranks-per-node", 2) == (
        0,
        "ASCEND_RT_VISIBLE_DEVICES=0,1 CPU_AFFINITY_CONF=1 HCCL_CONNECT_TIMEOUT=600 HCCL_BUFFSIZE=200 "
        f"torchrun --standalone --nnodes=1 --nproc-per-node=2 -m moeport train {file}\n",
        "",
    )


def test_on_two_nodes_with_mindspore(moeport, tmp_path):  # noqa: F811
    file = config(tmp_path, **MINDSPORE)
    wanted = ("launch", file, "--nodes", 2, "--ranks-per-node", 2, "--node-rank", 1, "--master-addr", "node-0")
    assert moeport(*wanted, "--set", "comm.timeout=60") == (
        0,
        "# node 1\n"
        "ASCEND_RT_VISIBLE_DEVICES=0,1 HCCL_CONNECT_TIMEOUT=120 HCCL_BUFFSIZE=200 "
        "msrun --node_rank=1 --master_addr=node-0 --master_port=8118 --log_dir=msrun_logs/node_1 --worker_num=4 "
        f"--local_worker_num=2 --bind_core=True --join=True python -m moeport train {file} --set comm.timeout=60\n",
        "",
    )


def test_the_device_of_the_config_decides(moeport, tmp_path):  # noqa: F811
    file = config(tmp_path)
    for device in ("auto", "cpu", "cuda"):
        _, out, _ = moeport("launch", file, "--ranks-per-node", 2, "--set", f"backend.device={device}")
        assert out.startswith("torchrun ")
    _, out, _ = moeport("launch", file, "--ranks-per-node", 2, "--set", "backend.device=npu")
    assert out.startswith("ASCEND_RT_VISIBLE_DEVICES=0,1 ")


@pytest.mark.parametrize(
    ("timeout", "connect", "execution", "event"),
    [
        (60, "120", None, None),
        (600.5, "601", None, None),
        (1836, "1836", None, None),
        (3600, "3600", "3600", "3632"),
        (10000, "7200", "10000", "10032"),
    ],
)
def test_times_that_hccl_waits(timeout, connect, execution, event):
    found = settings(NpuJob("torchrun", 8, timeout, 0))
    names = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT")
    assert tuple(map(found.get, names)) == (connect, execution, event)


@pytest.mark.parametrize(("size", "megabytes"), [(0, "200"), (200 * 2**20, "200"), (200 * 2**20 + 1, "201")])
def test_the_buffer_holds_the_hidden_states_of_a_rank(size, megabytes):
    assert settings(NpuJob("msrun", 8, 600, size))["HCCL_BUFFSIZE"] == megabytes


@pytest.mark.parametrize(("dtype", "width"), [("float64", 8), ("float32", 4), ("bfloat16", 2), ("auto", 2)])
def test_their_size_is_that_of_a_micro_batch(tmp_path, dtype, width):
    from moeport.config import config_from_dict
    from moeport.training.ranks import npu_needs
    from tests.training.tiny import tiny_values

    sections = {"backend": {"device": "npu", "dtype": dtype}, "training": {"batch_size": 8, "gradient_accumulation": 2}}
    values = tiny_values(tmp_path, **sections)
    assert npu_needs(config_from_dict(values), 2).message_bytes == 8 // 4 * 32 * 16 * width
    values["backend"] = {"device": "auto"}
    assert npu_needs(config_from_dict(values), 2) is None


@pytest.mark.parametrize("launcher", ["torchrun", "msrun"])
@pytest.mark.parametrize("timeout", [1, 600, 5000, 100000])
def test_the_doctor_finds_nothing_wrong_with_them(launcher, timeout):
    found = settings(NpuJob(launcher, 8, timeout, 2**30))
    devices = tuple(f"davinci{number}" for number in range(8))
    machine = Machine((), "25.5.0", None, None, devices, {}, None, found)
    names = {finding.subject for finding in findings(machine)}
    assert not names & (found.keys() | {"HCCL_EVENT_TIMEOUT"} if launcher == "torchrun" else found.keys())


def test_a_script_for_slurm(moeport, tmp_path):  # noqa: F811
    file = config(tmp_path, **TORCH)
    assert moeport("launch", file, "--nodes", 2, "--ranks-per-node", 2, "--slurm", "job.sh")[0] == 0
    text = Path("job.sh").read_text()
    assert "\n#SBATCH --gres=npu:2\n" in text
    assert "gpus-per-node" not in text
    for line in (
        "export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}",
        "export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-600}",
        "export HCCL_BUFFSIZE=${HCCL_BUFFSIZE:-200}",
    ):
        assert f"\n{line}\n" in text
    assert "ASCEND_RT_VISIBLE_DEVICES" not in text  # Slurm gives them out
    assert "moeport.launch.node --npus torchrun --node-rank=$SLURM_NODEID" in text
    assert subprocess.run(["bash", "-n", "job.sh"]).returncode == 0
    moeport("launch", file, "--ranks-per-node", 2, "--gpus-per-node", 8, "--slurm", "all.sh")
    assert "\n#SBATCH --gres=npu:8\n" in Path("all.sh").read_text()


SHOW = "import os; print(os.environ['HCCL_CONNECT_TIMEOUT'], os.environ['HCCL_SOCKET_IFNAME'])"


def test_what_the_user_has_set_stays(monkeypatch, capfd):
    monkeypatch.setitem(commands.MODULES, "torchrun", "code")
    monkeypatch.setattr(commands, "_ends_with_this", lambda launcher: [sys.executable, "-c", SHOW])
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "999")
    given = {"HCCL_CONNECT_TIMEOUT": "600", "HCCL_SOCKET_IFNAME": "=eth7"}
    assert commands.run(["torchrun"], given) == 0
    assert capfd.readouterr().out == "999 =eth7\n"


COMMANDS = {
    "torchrun": ["torchrun", "--node-rank=1", "--master-addr=node-0", "--master-port=29500", "--nnodes=2"],
    "msrun": ["msrun", "--node_rank=1", "--master_addr=node-0", "--worker_num=16", "--local_worker_num=8"],
}
ALONE = {
    "standalone": ["torchrun", "--standalone", "--nnodes=1"],
    "torchrun": ["torchrun", "--node-rank=0", "--master-addr=node-0", "--nnodes=1"],
    "msrun": ["msrun", "--node_rank=0", "--master_addr=node-0", "--worker_num=8", "--local_worker_num=8"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ranks_of_several_nodes_meet_at_the_interface_of_the_first(monkeypatch, name):
    monkeypatch.setattr(npu, "interface_towards", {"node-0": "enp1s0"}.get)
    assert on_node(COMMANDS[name], {}) == {"HCCL_SOCKET_IFNAME": "=enp1s0"}
    assert on_node(COMMANDS[name], {"HCCL_IF_IP": "10.0.0.1"}) == {}
    monkeypatch.setattr(npu, "interface_towards", lambda host: None)
    assert on_node(COMMANDS[name], {}) == {}


@pytest.mark.parametrize("name", ALONE)
def test_on_one_node_no_interface_is_chosen(monkeypatch, name):
    monkeypatch.setattr(npu, "interface_towards", lambda host: pytest.fail("asked"))
    assert on_node(ALONE[name], {}) == {}


def test_the_interface_towards_this_machine():
    from moeport.launch.network import interface_towards, interfaces

    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no such host.") is None
    for each in interfaces():
        if each["address"] and each["up"] and each["name"] != "lo":
            assert interface_towards(each["address"]) == each["name"]


def test_a_node_with_too_few_npus_is_refused():
    with pytest.raises(UserError, match=r"ASCEND_RT_VISIBLE_DEVICES names 2 NPUs \(4,5\); expected 8, since each rank"):
        check_visible(8, {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}, seen=8)
    with pytest.raises(UserError, match="this machine has 4 NPUs, and each rank needs its own; start at most 4"):
        check_visible(8, {}, seen=4)
    check_visible(8, {"ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, seen=8)
    check_visible(8, {}, seen=0)


def test_a_launcher_that_torch_npu_would_end_is_not_started(moeport, monkeypatch, tmp_path):  # noqa: F811
    """torchrun itself imports PyTorch."""

    def refuse(extensions):
        assert extensions == ("torch-npu",)
        raise BackendUnavailableError("PyTorch does not start: why; how")

    monkeypatch.setattr(training, "refuse_broken", refuse)
    monkeypatch.setattr(commands, "run", lambda *given: pytest.fail("started"))
    code, _, err = moeport("launch", config(tmp_path), "--ranks-per-node", 2, "--run")
    assert (code, err) == (2, "error: PyTorch does not start: why; how\n")


def test_the_documentation_shows_what_is_printed(moeport, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    block = (ROOT / "docs/ascend.md").read_text().partition("## Several NPUs")[2].partition("```console\n")[2]
    shown = [one.partition("\n") for one in block.partition("```")[0].split("$ moeport ")[1:]]
    assert len(shown) == 2
    for command, _, printed in shown:
        assert moeport(*command.split()) == (0, printed, "")


def test_the_switch_of_a_node_is_not_the_launchers(tmp_path):
    command = [sys.executable, "-m", "moeport.launch.node", "--npus", "torchrun", "--nnodes=1", "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--nproc" in done.stdout


def test_settings_need_no_quotes():
    text = " ".join(f"{name}={value}" for name, value in settings(JOB).items())
    assert shlex.join(shlex.split(text)) == text
    assert LaunchSpec("torchrun", 1, 8, ("train",)).settings == {}
