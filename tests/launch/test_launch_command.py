"""`moeport launch`: the commands it prints, the script it writes, and jobs that they start."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moeport.cli.main import main
from moeport.launch.commands import LaunchSpec, run
from moeport.launch.place import check_place
from tests.comm.jobs import ROOT, runs
from tests.jobs.ports import free_port
from tests.training.tiny import tiny_values

MINDSPORE = {"backend": {"name": "mindspore", "device": "cpu"}}


@pytest.fixture
def moeport(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["moeport", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run_command


def config(folder, **sections):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder, **sections)))
    return path


def test_torchrun_on_one_node(moeport, tmp_path):
    file = config(tmp_path)
    assert moeport("launch", file, "--ranks-per-node", 2) == (
        0,
        f"torchrun --standalone --nnodes=1 --nproc-per-node=2 -m moeport train {file}\n",
        "",
    )


def test_torchrun_on_one_node_at_a_port(moeport, tmp_path):
    file = config(tmp_path)
    _, out, _ = moeport("launch", file, "--ranks-per-node", 2, "--master-port", 9000)
    assert out == (
        "torchrun --node-rank=0 --master-addr=127.0.0.1 --master-port=9000 --nnodes=1 --nproc-per-node=2 "
        f"-m moeport train {file}\n"
    )


def test_torchrun_on_two_nodes(moeport, tmp_path):
    file = config(tmp_path)
    wanted = ("launch", file, "--nodes", 2, "--ranks-per-node", 2, "--master-addr", "gpu1")
    lines = [
        "# node 0",
        "torchrun --node-rank=0 --master-addr=gpu1 --master-port=29500 --nnodes=2 --nproc-per-node=2 "
        f"-m moeport train {file}",
        "# node 1",
        "torchrun --node-rank=1 --master-addr=gpu1 --master-port=29500 --nnodes=2 --nproc-per-node=2 "
        f"-m moeport train {file}",
    ]
    assert moeport(*wanted) == (0, "\n".join(lines) + "\n", "")
    assert moeport(*wanted, "--node-rank", 1) == (0, "\n".join(lines[2:]) + "\n", "")


def test_msrun(moeport, tmp_path):
    file = config(tmp_path, **MINDSPORE)
    _, out, _ = moeport("launch", file, "--ranks-per-node", 2)
    assert out == (
        "msrun --node_rank=0 --master_addr=127.0.0.1 --master_port=8118 --log_dir=msrun_logs/node_0 "
        f"--worker_num=2 --local_worker_num=2 --join=True python -m moeport train {file}\n"
    )
    _, out, _ = moeport(
        *("launch", file, "--nodes", 2, "--ranks-per-node", 2, "--node-rank", 1),
        *("--master-addr", "10.0.0.1", "--master-port", 9000),
    )
    assert out == (
        "# node 1\n"
        "msrun --node_rank=1 --master_addr=10.0.0.1 --master_port=9000 --log_dir=msrun_logs/node_1 "
        f"--worker_num=4 --local_worker_num=2 --join=True python -m moeport train {file}\n"
    )


def test_the_documentation_shows_what_is_printed(moeport, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "communication.md").read_text()
    block = text.partition("## Start a job")[2].partition("```console\n")[2].partition("```")[0]
    runs = [one.partition("\n") for one in block.split("$ moeport ")[1:]]
    assert len(runs) == 3
    for command, _, printed in runs:
        assert moeport(*command.split()) == (0, printed, "")


def test_overrides_are_quoted_and_restarts_resume(moeport, tmp_path):
    folder = tmp_path / "it's here"
    folder.mkdir()
    file = config(folder)
    override = f"run.dir={tmp_path}/$HOME; two"
    _, out, _ = moeport("launch", file, "--ranks-per-node", 2, "--max-restarts", 3, "--set", override)
    assert shlex.split(out)[2:] == [
        *("--nnodes=1", "--nproc-per-node=2", "--max-restarts=3", "-m", "moeport", "train", str(file)),
        *("--set", override, "--resume"),
    ]
    _, out, _ = moeport("launch", file, "--ranks-per-node", 2, "--resume")
    assert out.endswith(f"train {shlex.quote(str(file))} --resume\n")


@pytest.mark.parametrize(
    ("sections", "options", "message"),
    [
        (
            {},
            "--nodes 3 --ranks-per-node 1 --master-addr a",
            "training.batch_size: 4 sequences do not divide among 3 ranks x 1 micro-batches "
            "(training.gradient_accumulation); expected a multiple of 3, such as 3 or 6",
        ),
        ({}, "--ranks-per-node 2 --set training.step=2", "training.step: unknown key"),
        (
            {"backend": {"name": "numpy"}},
            "--ranks-per-node 2",
            "backend.name: numpy cannot train; set backend.name to torch or mindspore",
        ),
        (
            MINDSPORE,
            "--ranks-per-node 2 --max-restarts 1",
            "--max-restarts 1: msrun, which starts mindspore, does not restart; leave it out, and start the job again "
            "with --resume after a failure",
        ),
        (
            {"checkpoint": {"interval": 0}},
            "--ranks-per-node 2 --max-restarts 1",
            "--max-restarts 1: checkpoint.interval is 0, so there is no checkpoint to go on from; set it, as in --set "
            "checkpoint.interval=100",
        ),
        (
            {},
            "--nodes 2 --ranks-per-node 2",
            "--master-addr is missing: 2 nodes meet at node 0; expected its host name or address",
        ),
        (
            {},
            "--nodes 2 --ranks-per-node 2 --master-addr a --run",
            "--node-rank is missing: --run starts one of the 2 nodes; expected 0 to 1",
        ),
        (
            {},
            "--nodes 2 --ranks-per-node 2 --master-addr a --node-rank 2",
            "--node-rank 2: expected 0 to 1, since --nodes is 2",
        ),
        (
            {},
            "--ranks-per-node 2 --run --slurm job.sh",
            "--slurm writes a script and --run starts the job here; use one of them",
        ),
        (
            {},
            "--ranks-per-node 2 --slurm tiny.yaml",
            "--slurm tiny.yaml: already exists; name a new file",
        ),
    ],
)
def test_what_is_refused(moeport, tmp_path, sections, options, message):
    file = config(tmp_path, **sections)
    code, out, err = moeport("launch", file, *options.split())
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(("launcher", "sections"), [("torchrun", {}), ("msrun", MINDSPORE)])
def test_a_port_in_use_is_refused_before_the_launcher_starts(moeport, tmp_path, launcher, sections):
    file = config(tmp_path, **sections)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, out, err = moeport("launch", file, "--ranks-per-node", 2, "--master-port", port, "--run")
    assert (code, out) == (2, "")
    assert err == (
        f"error: --master-port {port}: {launcher} cannot listen on port {port} of {socket.gethostname()} (Address "
        "already in use); end what uses it, or set --master-port to a free port on every node\n"
    )


@pytest.mark.parametrize("node", [0, 1])
def test_a_host_that_does_not_resolve_is_refused_before_the_launcher_starts(moeport, monkeypatch, tmp_path, node):
    monkeypatch.setattr("moeport.launch.place.NAME_SECONDS", 0.1)
    options = ("--nodes", 2, "--ranks-per-node", 2, "--node-rank", node, "--master-addr", "nowhere.invalid", "--run")
    code, out, err = moeport("launch", config(tmp_path), *options)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"error: --master-addr nowhere\.invalid: the host name 'nowhere\.invalid' does not resolve on \S+ \(.+\); "
        r"expected the name or address of the host of node 0\n",
        err,
    )


def test_on_another_node_the_port_may_be_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_place("torchrun", "127.0.0.1", server.getsockname()[1], is_first=False)


def test_printing_imports_no_framework(tmp_path):
    program = (
        "import sys\nfrom moeport.cli.main import main\n"
        "try:\n    main()\nfinally:\n    sys.exit(bool({'torch', 'mindspore'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "launch", str(config(tmp_path)), "--ranks-per-node", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torchrun ")


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "msrun"])
def test_the_exit_code_of_a_job(tmp_path, monkeypatch, launcher):
    """Of torchrun's jobs, those that train end with 0 and 2 below."""
    pytest.importorskip({"torchrun": "torch", "msrun": "mindspore"}[launcher])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = LaunchSpec(launcher, 1, 2, ("routers", "topk"))
    assert run(job.command(0, "127.0.0.1", free_port())) == 0
    wrong = LaunchSpec(launcher, 1, 2, ("routers", "any"))
    assert run(wrong.command(0, "127.0.0.1", free_port())) == 2  # the ranks' own


# ------------------------------------------------------------------ training


def launch(file, *options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "moeport", "launch", str(file), "--ranks-per-node", "2", "--run", *options]
    return subprocess.Popen(
        command, cwd=file.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def steps_done(folder):
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if "loss" in record]


def wait_for_step(process, folder, step):
    while step not in steps_done(folder):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=pytest.mark.slow)])
def test_it_trains(tmp_path, backend):
    pytest.importorskip(backend)
    file = config(tmp_path, training={"steps": 2}, backend={"name": backend})
    process = launch(file, "--master-port", str(free_port()))
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert steps_done(tmp_path) == [1, 2]
    assert "run: 2 steps done" in out


@pytest.mark.parametrize("backend", ["torch", pytest.param("mindspore", marks=pytest.mark.slow)])
def test_the_last_line_is_why_the_ranks_ended(tmp_path, backend):
    pytest.importorskip(backend)
    source = {"paths": [str(tmp_path / "none" / "*.txt")]}
    process = launch(
        config(tmp_path, backend={"name": backend}, data={"source": source}), "--master-port", str(free_port())
    )
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2, out
    assert re.fullmatch(r"moeport: rank \d of 2 .*: data\.source\.paths: no file matches .*", out.splitlines()[-1]), out


@pytest.mark.slow
def test_no_rank_outlives_a_killed_launch(tmp_path):
    pytest.importorskip("torch")
    file = config(tmp_path, training={"steps": 100000, "evaluation_interval": 0}, checkpoint={"interval": 0})
    process = launch(file)
    wait_for_step(process, tmp_path, 3)
    job = processes_of(file)
    assert len(job) >= 4, job  # launch, torchrun and two ranks
    process.kill()
    deadline = time.monotonic() + 100
    while any(runs(pid) for pid in job):
        assert time.monotonic() < deadline, processes_of(file)
        time.sleep(0.1)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "number"), [("torch", signal.SIGTERM), ("mindspore", signal.SIGUSR1)])
def test_a_signal_saves_the_run(tmp_path, backend, number):
    pytest.importorskip(backend)
    endless = {"training": {"steps": 100000, "evaluation_interval": 0}, "checkpoint": {"interval": 0}}
    file = config(tmp_path, backend={"name": backend}, **endless)
    process = launch(file, "--master-port", str(free_port()))
    wait_for_step(process, tmp_path, 3)
    process.send_signal(number)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 130, out
    last = steps_done(tmp_path)[-1]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:06d}").is_dir()


@pytest.mark.slow
def test_a_restart_goes_on_from_the_last_checkpoint(tmp_path):
    pytest.importorskip("torch")
    file = config(tmp_path, training={"steps": 60, "evaluation_interval": 0})
    process = launch(file, "--max-restarts", "1")
    wait_for_step(process, tmp_path, 5)
    os.kill(worker(file), signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "resuming    after step" in out
    assert steps_done(tmp_path) == list(range(1, 61))


def processes_of(file):
    """Processes whose command line names the config."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(file).encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def worker(file):
    """A process that trains, of the launcher's."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            command = (path.parent / "cmdline").read_bytes().split(b"\0")
            environment = path.read_bytes().split(b"\0")
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if str(file).encode() in command and b"RANK=1" in environment:
            return int(path.parent.name)
    raise AssertionError("rank 1 does not run")
