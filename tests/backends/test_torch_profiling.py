"""What a profile with torch.profiler attributes to which kind of work."""

import gzip
import json
import time

import pytest

pytest.importorskip("torch")

import torch

from moeport.backends import get_backend
from moeport.backends.torch.profiling.attribution import BACKWARD
from moeport.backends.torch.profiling.marks import MARK, STEP, marking
from moeport.backends.torch.profiling.memory import SavedTensors
from moeport.backends.torch.profiling.trace import times_of
from moeport.comm.mesh import single_mesh
from moeport.core.ops import KERNELS
from moeport.core.parts import KINDS, PARTS
from moeport.model.memory import activation_bytes
from moeport.routers.topk import TopKRouter
from moeport.training.prepare import prepare
from tests.training.tiny import tiny_config

SLEEP = 0.15
"""Seconds; far more than anything else in a step of the tiny model takes."""


@pytest.fixture
def trained(tmp_path):
    """A tiny model that is ready for its next step, and its backend."""
    config = tiny_config(tmp_path)
    backend = get_backend(config.backend)
    run = prepare(config, None, backend, single_mesh(backend.ops), lambda _: None)
    run.trainer.step()
    return run


def profiled(run, folder, steps=1):
    """Where the time of some steps goes, and bounds of how long they took."""
    profiler = run.backend.profiler(run.trainer.model)
    inner, before = [], time.perf_counter()
    for _ in range(steps):
        with profiler.step():
            inner.append(time.perf_counter())
            run.trainer.step()
            inner.append(time.perf_counter())
    after = time.perf_counter()
    return profiler.finish(folder / "trace"), inner[-1] - inner[0], after - before


def test_every_part_is_of_a_known_kind_and_every_kernel_a_part():
    assert {kind for part in PARTS.values() for kind in (part.kind, part.products, part.moves, part.waits)} <= {
        *KINDS,
        "",
    }
    assert set(KERNELS) <= set(PARTS)


def test_the_kinds_add_up_to_the_time_of_the_steps(trained, tmp_path):
    """The sum is the wall time of the trace to rounding; that is within 2% of what the clock of the host says."""
    times, least, most = profiled(trained, tmp_path, steps=2)
    assert sum(times.seconds.values()) == pytest.approx(times.wall, rel=1e-9)
    assert 0.98 * least <= times.wall <= 1.02 * most
    assert times.clock == "cpu"
    assert all(times.seconds[kind] > 0 for kind in set(KINDS) - {"communication", "other", "idle"})
    assert times.seconds["other"] < 0.1 * times.wall
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == STEP for event in events) == 2


def test_slow_pieces_show_up_in_their_kind_and_no_other(trained, tmp_path, monkeypatch):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(SLEEP)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(SLEEP)
            return grad

    route = TopKRouter.route
    monkeypatch.setattr(TopKRouter, "route", lambda self, ops, p, x, c: route(self, ops, p, Slow.apply(x), c))
    slept, rest = 2 * 2 * SLEEP, []  # two layers, forward and backward
    for _ in range(3):  # a busy machine may hold up anything, but not in every attempt
        times, *_ = profiled(trained, tmp_path)
        assert times.seconds["router"] >= slept
        rest.append(max(seconds for kind, seconds in times.seconds.items() if kind != "router"))
        if rest[-1] < SLEEP:
            break
    assert min(rest) < SLEEP


def test_nothing_is_marked_outside_of_a_profile(trained, tmp_path):
    ops = trained.backend.ops
    plain = type(ops)
    with marking(ops):
        assert type(ops) is not plain
        assert isinstance(ops, plain)
    assert type(ops) is plain
    profiled(trained, tmp_path)
    assert type(ops) is plain
    assert "step" not in vars(trained.trainer.model)


def event(name, start, length, tid=1, cat="cpu_op", **args):
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": float(start), "dur": float(length), "args": args}


def test_time_of_a_device_belongs_to_what_launched_it():
    """A made-up trace of a device: forward in one thread, backward in another, two streams, a gap.

    Not run on hardware: the names and fields are those that torch.profiler documents for CUDA.
    """
    mark = MARK + "attention"
    events = [
        event(STEP, 0, 100, cat="user_annotation"),
        event(mark, 5, 20, cat="user_annotation"),
        event("aten::bmm", 6, 10, **{"Sequence number": 7, "Fwd thread id": 0}),
        event("cudaLaunchKernel", 7, 1, cat="cuda_runtime", correlation=1),
        event(MARK + "routed_mlp", 30, 10, cat="user_annotation"),
        event("Experts", 31, 8, **{"Sequence number": 8, "Fwd thread id": 0}),
        event("cudaLaunchKernel", 32, 1, cat="cuda_runtime", correlation=2),
        event("cuLaunchKernel", 33, 1, cat="cuda_driver", correlation=3),
        event(f"{BACKWARD}BmmBackward0", 50, 20, 2, **{"Sequence number": 7, "Fwd thread id": 1}),
        event("cudaLaunchKernel", 51, 1, 2, cat="cuda_runtime", correlation=4),
        event("c10d::allreduce_", 80, 5),
        event("cudaLaunchKernel", 81, 1, cat="cuda_runtime", correlation=5),
        event("gemm", 10, 20, 7, cat="kernel", correlation=1),
        event("_grouped_gemm_kernel", 30, 10, 7, cat="kernel", correlation=2),
        event("_gather_rows", 40, 5, 7, cat="kernel", correlation=3),
        event("gemm", 60, 30, 7, cat="kernel", correlation=4),
        event("ncclDevKernel_AllReduce", 85, 10, 8, cat="kernel", correlation=5),
    ]  # fmt: skip
    times = times_of({"traceEvents": events})
    found = {kind: seconds * 1e6 for kind, seconds in times.seconds.items() if seconds}
    assert found == pytest.approx(
        {"attention": 50, "expert_products": 10, "permutation": 5, "communication": 5, "idle": 30}
    )
    assert (times.clock, times.overlapped * 1e6, times.wall * 1e6) == ("device", pytest.approx(5), pytest.approx(100))


def test_a_pause_between_steps_does_not_count():
    events = [
        event(STEP, 0, 10, cat="user_annotation"),
        event("pause of the profile", 12, 50, cat="user_annotation"),
        event("aten::mm", 20, 30),
        event(STEP, 70, 10, cat="user_annotation"),
    ]
    times = times_of({"traceEvents": events})
    assert times.wall * 1e6 == pytest.approx(30)
    assert times.seconds["host"] * 1e6 == pytest.approx(30)
    assert times_of({"traceEvents": events[1:3]}) is None


def test_a_storage_is_held_once_and_parameters_are_not():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)
    saved = SavedTensors([weight])
    with saved.counting():
        y = x @ weight.t()  # keeps x
        z = (y * y[:, :]).view(-1).square()  # keeps y and its square, each once
    assert dict(saved.by_kind) == {"other": 3 * 4 * 8 * 4}
    z.sum().backward()


def test_memory_is_that_of_the_model(trained):
    profiler = trained.backend.profiler(trained.trainer.model)
    with profiler.memory():
        trained.trainer.step()
    held, tokens = profiler.held, 4 * 32
    size = sum(spec.size for spec in trained.trainer.shapes.parameter_specs() if spec.trainable)
    assert (held.parameters, held.gradients) == (4 * size, 4 * size)
    assert 8 * size <= held.optimizer <= 8 * size + 1024  # and the numbers of the steps
    assert {"attention", "expert_products", "router", "loss"} <= set(held.activations)
    total = sum(held.activations.values())
    assert 0.5 < total / (activation_bytes(trained.config, 4) * tokens) < 3  # scores of E experts count for tiny widths
    assert held.peak >= total
