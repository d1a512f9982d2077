"""examples/jobs: the jobs start what `moeport launch` starts; none of them runs here as it is."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from moeport.cli.main import whole_command

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "examples/jobs"


def printed(words, capsys, monkeypatch):
    """What `moeport` prints."""
    monkeypatch.chdir(ROOT)
    whole_command()(words, standalone_mode=False)
    return capsys.readouterr().out


def test_the_slurm_job_is_what_the_command_in_the_readme_writes(tmp_path, capsys, monkeypatch):
    readme = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\$ moeport (launch (?s:.+?))\n```", readme, re.MULTILINE)
    *words, last = shlex.split(command.replace("\\\n", " "))
    assert last == "examples/jobs/slurm.sh"
    printed([*words, str(tmp_path / "job.sh")], capsys, monkeypatch)
    assert (JOBS / "slurm.sh").read_text() == (tmp_path / "job.sh").read_text()


def test_each_pod_starts_the_launcher_of_its_node(capsys, monkeypatch):
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text(encoding="utf-8"))
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    program, *words, run = container["command"]
    assert (program, run) == ("moeport", "--run")
    assert spec["completions"] == spec["parallelism"] == 8
    ranks = int(container["resources"]["limits"]["nvidia.com/gpu"])
    numbered = [word.replace("$(NODE_RANK)", "3") for word in words]
    assert printed(numbered, capsys, monkeypatch) == (
        "# node 3\n"
        f"torchrun --node-rank=3 --master-addr={name}-0.{pod['subdomain']} --master-port=29500 "
        f"--nnodes={spec['completions']} --nproc-per-node={ranks} -m moeport train "
        "examples/models/qwen3-30b-a3b.yaml --resume\n"
    )


def test_the_ascend_job_checks_and_then_launches_its_node(tmp_path):
    """With stand-ins for CANN and for the programs that it starts."""
    (tmp_path / "set_env.sh").write_text("export CANN_IS_SET=yes\n")
    for program in ("moeport", "torchrun"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho "$CANN_IS_SET {program} $*"\n')
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CANN_HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(JOBS / "ascend.sh"), "2", "first"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "yes moeport doctor",
        "yes torchrun --nnodes=8 --nproc-per-node=8 --node-rank=2 --master-addr=first --master-port=29501 "
        "-m moeport probe --device npu",
        "yes moeport launch examples/models/qwen3-30b-a3b.yaml --nodes 8 --ranks-per-node 8 --node-rank 2 "
        "--master-addr first --set backend.device=npu --resume --run",
    ]


def test_the_ascend_job_says_what_it_needs():
    done = subprocess.run(["bash", str(JOBS / "ascend.sh"), "2"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "the address of node 0" in done.stderr
