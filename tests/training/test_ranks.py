"""Training on several ranks gives what one process gives that takes their micro-batches one after the other."""

import functools

import numpy as np
import pytest

from moeport.comm.single import SingleProcess
from tests.comm.jobs import ROOT, Job, start
from tests.training import ranks

JOBS = [
    pytest.param("torch", 2, marks=pytest.mark.slow),
    ("torch", 4),
    pytest.param("torch", 8, marks=pytest.mark.slow),
    ("mindspore", 2),
    pytest.param("mindspore", 4, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """The results of all cases of a job, which runs once."""

    @functools.cache
    def of(backend, size):
        pytest.importorskip(backend)
        folder = tmp_path_factory.mktemp(f"ranks-{backend}-{size}") / "job"
        script = str(ROOT / "tests/training/ranks.py")
        job = start(backend, size, [script, backend, str(folder)], folder)
        try:
            code = job.wait(280)
            assert (code, job.left()) == (0, []), Job.output_of(folder)[-4000:]
        finally:
            job.end()
        return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}

    return of


@functools.cache
def alone(backend, case, size, folder):
    config = ranks.one_process(ranks.config_of(backend, case, size, folder), size)
    return ranks.run(config, SingleProcess(ranks.backend_of(config.backend).ops))


@pytest.mark.parametrize(("backend", "size"), JOBS)
def test_ranks_compute_what_one_process_does(results_of, tmp_path, backend, size):
    results = results_of(backend, size)
    assert set(results) == set(ranks.cases_of(backend))
    faults = [
        fault
        for case, found in results.items()
        for fault in ranks.faults_of(case, found, alone(backend, case, size, tmp_path))
    ]
    assert not faults, "\n".join(faults)
