"""What `moeport parity` writes: nothing is replaced without a word, and an interrupted run leaves no process."""

import sys
import time
from pathlib import Path

import pytest

from moeport.errors import UserError
from moeport.launch import local
from moeport.launch.launcher import NodeProcess
from moeport.parity import job
from moeport.parity.bundle import BundleError, load_bundle, save_bundle
from moeport.parity.options import BundleOptions
from moeport.parity.recording import Recording, TensorRecord
from moeport.parity.subject import Size, Variant

SMALL = ["--sequences", "2", "--tokens", "12", "--steps", "1"]
NOTHING = Recording("x", "float32")


def test_a_bundle_is_replaced_only_on_request(tmp_path):
    save_bundle(NOTHING, tmp_path / "b")
    with pytest.raises(BundleError, match="already holds a bundle; name another folder, or replace it with overwrite"):
        save_bundle(NOTHING, tmp_path / "b")
    save_bundle(Recording("y", "float32"), tmp_path / "b", overwrite=True)
    assert load_bundle(tmp_path / "b").name == "y"
    (tmp_path / "b" / "notes.txt").touch()
    with pytest.raises(BundleError, match="holds other files"):
        save_bundle(NOTHING, tmp_path / "b", overwrite=True)


@pytest.mark.parametrize("option", ["--json", "--markdown", "--html"])
def test_a_report_is_replaced_only_on_request(parity, tmp_path, option):
    tensors = {"x": TensorRecord("x", "activation", "float32", (0,))}
    for name in ("a", "b"):
        save_bundle(Recording(name, "float32", tensors), tmp_path / name)
    arguments = ("compare", "a", "b", option, "report")
    (tmp_path / "report").write_text("mine")
    code, _, err = parity(*arguments)
    assert (code, (tmp_path / "report").read_text()) == (2, "mine")
    assert "report: already exists; name another file, or replace it with --overwrite" in err
    assert parity(*arguments, "--overwrite")[0] != 2
    assert (tmp_path / "report").read_text() != "mine"


def test_refusals_come_before_the_work(parity, tmp_path):
    """The config does not exist, which nobody has noticed yet."""
    save_bundle(NOTHING, tmp_path / "b")
    (tmp_path / "r.json").touch()
    record = ("record", "nowhere.yaml", *SMALL, "-o", "b")
    run = ("run", "nowhere.yaml", "--backends", "torch-cpu,numpy", *SMALL, "--json", "r.json")
    for arguments in (record, (*record, "--variant", "torch-cpu@2"), run):
        assert "with --overwrite" in parity(*arguments)[2]
        assert "nowhere.yaml" in parity(*arguments, "--overwrite")[2]


def test_foreign_models(tmp_path):
    torch = pytest.importorskip("torch")
    import moeport.torch

    model = torch.nn.Linear(2, 2)
    for overwrite in (False, True):
        with moeport.torch.record(model, tmp_path / "b", overwrite=overwrite):
            model(torch.ones(1, 2))
    with (
        pytest.raises(UserError, match="replace it with overwrite=True"),
        moeport.torch.record(model, tmp_path / "b"),
    ):
        raise AssertionError


RANK = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(own / f"{os.getpid()}.pid").touch()
(own / f"{child.pid}.pid").touch()
time.sleep(600)
"""


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_an_interrupted_run_leaves_no_process(tmp_path, monkeypatch):
    """Not even ranks that ignore SIGTERM, and what they have started."""
    ranks = [NodeProcess(0, [sys.executable, "-c", RANK, str(tmp_path)], {})] * 2

    def interrupted(processes):
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "node_processes", lambda *args: ranks)
    monkeypatch.setattr(local.LocalJob, "wait", interrupted)
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        job._run("torch-cpu@2", Variant.parse("torch-cpu@2"), [])
    pids = [path.stem for path in tmp_path.glob("*.pid")]
    assert len(pids) == 4
    deadline = time.monotonic() + 60
    while any(map(_runs, pids)) and time.monotonic() < deadline:  # killed, but not gone at once
        time.sleep(0.02)
    assert not [pid for pid in pids if _runs(pid)]


def _runs(pid):
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ranks_are_told_to_overwrite(monkeypatch):
    seen = []
    monkeypatch.setattr(job, "_run", lambda name, variant, command: seen.append(command))
    for overwrite in (False, True):
        made = job.Job("torch-cpu@2", None, [], Size(micro_batches=2))
        made.write(Path("nowhere"), 1, BundleOptions(overwrite=overwrite))
    assert ["--overwrite" in command for command in seen] == [False, True]
