"""Every collective of every backend against numpy, on one process and in jobs of two and four."""

import fcntl
import functools

import pytest

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from tests.comm import cases
from tests.comm.jobs import ROOT, Job, start

JOBS = [
    pytest.param(backend, size, marks=[pytest.mark.slow] * (size == 2))
    for backend in ("torch", "mindspore")
    for size in (2, 4)
]
"""Of four, two and three ranks make groups; benchmarks and training run on two."""


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, worker_id):
    """Run a job and return its folder; it runs once in a session, in the test process that wants it first."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    @functools.cache
    def of(backend, size, *options):
        folder = shared / "-".join(["collectives", backend, str(size), *options])
        with (shared / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                script = str(ROOT / "tests/comm/collectives.py")
                job = start(backend, size, [script, backend, str(folder), *options], folder)
                try:
                    code = job.wait(240)
                    (folder / "end").write_text(f"exit code {code}, processes left: {job.left()}")
                finally:
                    job.end()
        return folder

    return of


@pytest.mark.parametrize(
    ("backend", "size", "case"),
    [pytest.param(*job.values, case, marks=job.marks) for job in JOBS for case in cases.names(job.values[0])],
)
def test_case(folder_of, backend, size, case):
    pytest.importorskip(backend)
    assert_passed(folder_of(backend, size), size, case)


def assert_passed(folder, size, case):
    for rank in range(size):
        done = (folder / f"done.{rank}").read_text().splitlines()
        assert case in done, f"rank {rank} did not pass it:\n{Job.output_of(folder)}"


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.names("torch", sweep=True))
def test_sweep(folder_of, case):
    pytest.importorskip("torch")
    assert_passed(folder_of("torch", 4, "sweep"), 4, case)


@pytest.mark.parametrize(("backend", "size"), JOBS)
def test_the_job_ends_well(folder_of, backend, size):
    pytest.importorskip(backend)
    assert (folder_of(backend, size) / "end").read_text() == "exit code 0, processes left: []"


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in cases.BACKENDS for case in cases.names(name)])
def test_case_on_one_process(name, case):
    pytest.importorskip(name)
    backend = get_backend(BackendConfig(name=name, device="cpu", dtype="float32"))
    with backend.communicator(None) as communicator:
        assert communicator.size == 1
        cases.run(case, communicator, backend)
