"""Arguments that are refused, wrong values that the probe finds, and launchers that do not fit."""

import dataclasses

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.comm.check import COLLECTIVES, check_collectives
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError, RunError
from moeport.launch.launcher import Launch

TORCHRUN = Launch("torchrun", 0, 2, 0, "localhost", 29500)
MSRUN = dataclasses.replace(TORCHRUN, launcher="msrun")


@pytest.fixture
def backend():
    return get_backend(BackendConfig(name="numpy"))


@pytest.fixture
def communicator(backend):
    return backend.communicator(None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: c.all_reduce(x, "mean"), "all_reduce: op is 'mean'; expected one of sum, max"),
        (lambda c, x: c.broadcast(x, 1), "broadcast: source is 1; expected a position of 0 .. 0"),
        (lambda c, x: c.broadcast(x, -1), "broadcast: source is -1; expected a position of 0 .. 0"),
        (lambda c, x: c.reduce_scatter(x[0, 0]), "reduce_scatter: x is (); expected a multiple of 1 rows"),
        (lambda c, x: c.all_to_all(x, [4], [3]), "rank 0 sends 4 rows to rank 0, which expects 3"),
        (
            lambda c, x: c.all_to_all(x, [3], [3]),
            "all_to_all: send_rows [3] must sum to the rows of x, which is (4, 3)",
        ),
        (
            lambda c, x: c.all_to_all(x, [2, 2], [4]),
            "all_to_all: send_rows is [2, 2]; expected 1 numbers of at least 0",
        ),
        (lambda c, x: c.all_to_all(x, [4], [-4]), "all_to_all: receive_rows is [-4]; expected 1 numbers of at least 0"),
        (
            lambda c, x: c.group([[0], [1]]),
            "group: each of the ranks 0 must be in the partition exactly once (got [[0], [1]])",
        ),
        (
            lambda c, x: c.group([[0, 0]]),
            "group: each of the ranks 0 must be in the partition exactly once (got [[0, 0]])",
        ),
    ],
)
def test_wrong_arguments(communicator, backend, call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(communicator, backend.ops.from_numpy(np.ones((4, 3))))
    assert str(error.value) == message


class Faulty(SingleProcess):
    """A library that reports success."""

    def __init__(self, ops, fault):
        super().__init__(ops)
        self.fault = fault

    def _all_reduce(self, x, op):
        return x * 0 if self.fault == f"all_reduce ({op})" else super()._all_reduce(x, op)

    def _all_gather(self, x):
        rounded = self.ops.cast(self.ops.cast(x, "float32"), "float64") if x.dtype == np.float64 else x
        return super()._all_gather(rounded if self.fault == "all_gather" else x)

    def _broadcast(self, x, source):
        return super()._broadcast(x, source)[:-1] if self.fault == "broadcast" else super()._broadcast(x, source)

    def _reduce_scatter(self, x):
        return x[::-1] if self.fault == "reduce_scatter" else super()._reduce_scatter(x)

    def _all_to_all(self, x, send, receive):
        if self.fault == "all_to_all" and len(x) > 1:
            x = x.copy()
            x[1, 2] = 0
        return super()._all_to_all(x, send, receive)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("all_reduce (sum)", "all_reduce (sum) of float64 on rank 0 gives wrong values, the first of 9 at (0, 0)"),
        ("all_reduce (max)", "all_reduce (max) of float64 on rank 0 gives wrong values, the first of 9 at (0, 0)"),
        ("all_gather", "all_gather of float64 on rank 0 gives wrong values, the first of 12 at (0, 0, 0)"),
        ("broadcast", "broadcast of float64 on rank 0 gives shape (3, 3); expected (4, 3)"),
        ("reduce_scatter", "reduce_scatter of float64 on rank 0 gives wrong values, the first of 6 at (0, 0)"),
        (
            "all_to_all",
            "all_to_all (one rank sends all) of float64 on rank 0 gives wrong values, the first of 1 at (1, 2)",
        ),
    ],
)
def test_the_probe_finds_wrong_values(backend, fault, message):
    with pytest.raises(RunError) as error:
        check_collectives(Faulty(backend.ops, fault), ["float64"])
    assert str(error.value).startswith(f"probe: {message}")
    check_collectives(Faulty(backend.ops, None), ["float64"])


def test_the_message_of_the_probe(backend):
    with pytest.raises(RunError) as error:
        check_collectives(Faulty(backend.ops, "all_to_all"), ["float32"], collectives=["all_to_all"])
    assert str(error.value) == (
        "probe: all_to_all (one rank sends all) of float32 on rank 0 gives wrong values, the first of 1 at (1, 2): "
        "expected 56.013671875, received 0.0; "
        "do not train on this communication library (no library): update it, or use another backend"
    )


def test_the_probe_finds_a_wrong_gradient():
    torch = pytest.importorskip("torch")
    backend = get_backend(BackendConfig(name="torch", device="cpu"))

    class Forgetful(SingleProcess):
        def _differentiable(self, transfer, x):
            out = transfer.run(x)
            return lambda: torch.cat([out[:-1], out[-1:].detach()]) if len(out) else out

    with pytest.raises(
        RunError, match=r"^probe: gradient of all_to_all \(.*\) of float32 on rank 0 gives wrong values"
    ):
        check_collectives(Forgetful(backend.ops), ["float32"], backend.value_and_grad, COLLECTIVES)


@pytest.mark.parametrize(
    ("name", "launch", "message"),
    [
        ("numpy", TORCHRUN, "backend.name: numpy runs in one process (got 2)"),
        ("torch", MSRUN, "backend.name: torch communicates under torchrun, srun or mpirun (got msrun)"),
        ("mindspore", TORCHRUN, "backend.name: mindspore communicates under msrun (started by torchrun)"),
    ],
)
def test_a_launcher_that_does_not_fit(name, launch, message):
    pytest.importorskip(name)
    with pytest.raises(BackendUnavailableError) as error:
        get_backend(BackendConfig(name=name, device="cpu")).communicator(launch)
    assert str(error.value) == message


def test_an_exception_of_a_process_alone_is_raised(communicator):
    with pytest.raises(ZeroDivisionError), communicator:
        raise ZeroDivisionError
