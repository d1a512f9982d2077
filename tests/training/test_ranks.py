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
    def of(backend, size, *options):
        pytest.importorskip(backend)
        folder = tmp_path_factory.mktemp(f"ranks-{backend}-{size}") / "job"
        script = str(ROOT / "tests/training/ranks.py")
        job = start(backend, size, [script, backend, str(folder), *options], folder)
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
    check(results_of(backend, size), ranks.cases_of(backend, size=size), backend, size, tmp_path)


def test_divided_updates_are_those_of_whole_copies(results_of):
    """Two numbers have one sum; the update rounds the last numbers of an array differently from the others."""
    results = results_of("mindspore", 2)
    divided, whole = results["two copies of the experts"], results["whole copies"]
    for name, x in whole.items():
        if name.startswith("gradient."):
            np.testing.assert_array_equal(divided[name], x, err_msg=name)
        else:
            np.testing.assert_allclose(divided[name], x, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_compiled_ranks_compute_what_one_process_does(results_of, tmp_path):
    """The exchange is between two graphs of a block; parameters and gradients travel as without graphs."""
    check(results_of("torch", 2, "cpu", "compiled"), ranks.COMPILED, "torch", 2, tmp_path)


def check(results, cases, backend, size, folder):
    assert set(results) == set(cases)
    faults = [
        fault
        for case, found in results.items()
        for fault in ranks.faults_of(case, found, alone(backend, case, size, folder))
    ]
    assert not faults, "\n".join(faults)
