"""The script for sbatch, run with stand-ins for Slurm's commands: Slurm itself does not run here."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeport.cli.main import main
from moeport.errors import UserError
from moeport.launch.commands import LaunchSpec
from moeport.launch.script import saving_seconds
from tests.comm.jobs import ROOT
from tests.training.tiny import tiny_values

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=moeport
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=02:00:00
#SBATCH --partition=gpu
#SBATCH --cpus-per-task=16
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
# Adapt this: options that your site requires, such as #SBATCH --account=NAME or memory.

# Adapt this: activate the Python environment that has moeport, for example with
# source .venv/bin/activate

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# Each Slurm task is the launcher of a node, so its cores are divided among the 2 ranks of the node.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}

arguments=(--nnodes=2 --nproc-per-node=2 -m moeport train tiny.yaml)
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || arguments+=(--resume)

# Slurm sends USR1 300 s before the time limit: the run saves and ends, and the job is queued again.
asked= signalled=
trap 'asked=yes signalled=yes; kill -USR1 "$step" 2>/dev/null' USR1
srun --kill-on-bad-exit=1 --cpus-per-task="$cores" \\
    bash -c 'exec python -m moeport.launch.node torchrun --node-rank=$SLURM_NODEID --master-addr=$MASTER_ADDR \
--master-port=$MASTER_PORT "$@"' bash "${arguments[@]}" &
step=$!
wait "$step"
code=$?
while [ -n "$signalled" ]; do  # a signal ends `wait`, not the step
    signalled=
    wait "$step" 2>/dev/null
    again=$?
    [ "$again" -eq 127 ] || code=$again  # 127: the step had ended before the signal
done
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
SCONTROL = """#!/bin/bash
if [ "$*" = "show hostnames localhost,other" ]; then printf 'localhost\\nother\\n'; else echo "$*" >> requeued; fi
"""
SRUN = """#!/bin/bash
shift 2
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'signalled=yes; kill -USR1 $first $second' USR1
for task in $first $second; do
    signalled=; wait $task; code=$?
    while [ -n "$signalled" ]; do
        signalled=; wait $task 2>/dev/null; again=$?
        [ $again = 127 ] || code=$again
    done
    [ $code = 0 ] || exit $code
done
"""
SHOW = f"#!{sys.executable}\nimport json, os, sys\n"
SHOW += "line = json.dumps([*sys.argv[1:], os.environ['OMP_NUM_THREADS']])\nos.write(1, line.encode() + b'\\n')\n"
SAVE = SHOW + "import signal, time\nsignal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(130))\n"
SAVE += "open(f'ready.{os.environ[\"SLURM_NODEID\"]}', 'w').close()\nwhile True: time.sleep(0.05)\n"


@pytest.fixture
def moeport(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(json.dumps(tiny_values(tmp_path)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moeport", "launch", "tiny.yaml", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return run


def start(job, folder, options=None, python=None, signalled="", **environment):
    """A job's script, with an `srun` that starts both nodes on this machine; what it also does at a signal."""
    script = folder / "job.sh"
    script.write_text(job.slurm_script(options or {}).replace("' USR1", f"{signalled}' USR1"))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("python", python)):
        if text:
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_NODELIST": "localhost,other", "COLUMNS": "200"}
    own |= {"SLURM_JOB_ID": str(os.getpid()), **environment}
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        ["bash", str(script)],
        cwd=folder,
        env=inherited | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process):
    """Exit code, output and errors, with no process left."""
    try:
        out, err = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def test_its_text(moeport, tmp_path):
    options = ("--gpus-per-node", 4, "--time", "02:00:00", "--partition", "gpu", "--cpus-per-rank", 8)
    code, out, _ = moeport("--nodes", 2, "--ranks-per-node", 2, "--slurm", "job.sh", *options)
    assert (code, out) == (0, "wrote job.sh; adapt it, then: sbatch job.sh\n")
    assert Path("job.sh").read_text() == SCRIPT


def test_without_cores_for_each_rank_it_asks_for_whole_nodes(moeport):
    moeport("--ranks-per-node", 2, "--slurm", "job.sh")
    assert "\n#SBATCH --exclusive\n" in Path("job.sh").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ("--partition", "gpu\n#SBATCH --account=x"),
        ("--partition", "a b"),
        ("--partition", "a'b"),
        ("--partition", ""),
        ("--time", "soon"),
        ("--time", "1:2:3:4"),
        ("--time", "01:00:00\n"),
        ("--set", "run.dir=a\nb"),
        ("--set", "run.dir=\x1b[31m"),
    ],
)
def test_options_that_would_be_misread_are_refused(moeport, options):
    code, _, err = moeport("--ranks-per-node", 2, "--slurm", "job.sh", *options)
    assert (code, Path("job.sh").exists(), "Traceback" in err) == (2, False, False), err


def test_time_to_save():
    seconds = [
        saving_seconds(limit) for limit in (None, "10", "10:00", "2:00:00", "1-0", "1-12:30", "0-0:1:0", "1", "0")
    ]
    assert seconds == [300, 150, 150, 300, 300, 300, 15, 15, 1]
    with pytest.raises(UserError, match="--time '5m': expected a time of Slurm, such as 90"):
        saving_seconds("5m")


@pytest.mark.parametrize("launcher", ["torchrun", "msrun"])
def test_each_node_gets_its_number_its_cores_and_all_arguments(tmp_path, launcher):
    arguments = ("train", "it's here/tiny.yaml", "--set", 'run.dir="$HOME `id` \\ *"')
    job = LaunchSpec(launcher, 2, 2, arguments)
    process = start(job, tmp_path, python=SHOW, SLURM_CPUS_ON_NODE="16")
    code, out, err = ended(process)
    assert (code, (tmp_path / "requeued").exists()) == (0, False), err
    started = sorted(json.loads(line) for line in out.splitlines())
    words = [job.command(node, "localhost", 15000 + os.getpid() % 10000) for node in (0, 1)]
    assert started == [["-m", "moeport.launch.node", *each, "8"] for each in words]


@pytest.mark.parametrize("signalled", ["", "; sleep 1"], ids=["it waits", "the run has ended before it waits again"])
def test_before_the_time_limit_it_saves_and_is_queued_again_and_goes_on(tmp_path, signalled):
    job = LaunchSpec("torchrun", 2, 2, ("train", "tiny.yaml"))
    process = start(job, tmp_path, python=SAVE, signalled=signalled)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready.*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # as Slurm does, to the script alone
    code, out, err = ended(process)
    assert (code, "--resume" in out) == (130, False), err
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    _, out, _ = ended(start(job, tmp_path, python=SHOW, SLURM_RESTART_COUNT="1"))
    assert [json.loads(line)[-2] for line in out.splitlines()] == ["--resume", "--resume"]


def test_it_starts_all_ranks(tmp_path):
    pytest.importorskip("torch")
    process = start(LaunchSpec("torchrun", 2, 2, ("probe", "--device", "cpu")), tmp_path)
    code, out, err = ended(process)
    assert code == 0, out + err
    assert ": 4 ranks on 2 nodes\n" in out
    assert out.count("every value is right") == 1
