"""A busy machine is noticed from the time that threads wait for a core, and the remedy leaves results as they are."""

import os
import time

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.contention import (
    BUSY_SHARE,
    CALM_SECONDS,
    INTERVAL_SECONDS,
    LONGEST_SECONDS,
    SETTLED_SECONDS,
    BusyState,
    WaitClock,
    Watch,
)
from moeport.config.model import ModelConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM


class Recorded:
    busy, calm = "busy now", "calm now"

    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")


class Machine:
    """A watch whose clock says what a simulated machine would make it say."""

    def __init__(self, share):
        self.share, self.waited, self.now = share, 0.0, 0.0
        self.remedy = Recorded()
        self.watch = Watch(self.remedy, lambda: self.waited)
        self.watch._then = 0.0
        self.spun = 0.0

    def run(self, seconds):
        for _ in range(round(seconds / INTERVAL_SECONDS)):
            self.now += INTERVAL_SECONDS
            self.waited += self.share(self.now, self.watch.state.busy) * INTERVAL_SECONDS
            self.spun += 0 if self.watch.state.busy else INTERVAL_SECONDS
            self.watch.look(self.now)
        return self.watch.news()


def test_an_idle_machine_is_left_alone():
    machine = Machine(lambda now, busy: 0.02)
    assert machine.run(120) == []
    assert machine.remedy.calls == []


def test_a_busy_machine_is_noticed_within_one_interval():
    machine = Machine(lambda now, busy: 0.5)
    assert machine.run(INTERVAL_SECONDS) == ["busy now (threads had no core for 50% of the time)"]
    assert machine.remedy.calls == ["start"]
    assert machine.run(CALM_SECONDS) == []


def test_a_calm_machine_is_noticed_by_a_trial_although_the_remedy_itself_counts_as_waiting():
    machine = Machine(lambda now, busy: 1.5 if now <= 5 else 0.15 if busy else 0.02)
    assert machine.run(5) == ["busy now (threads had no core for 150% of the time)"]
    assert machine.run(CALM_SECONDS + SETTLED_SECONDS + 1) == ["calm now"]
    assert machine.remedy.calls == ["start", "stop"]


def test_a_machine_that_stays_busy_is_tried_less_and_less_often_and_says_so_once():
    """Little waiting while the remedy is used, much without it."""
    machine = Machine(lambda now, busy: 0.15 if busy else 1.5)
    assert machine.run(1200) == ["busy now (threads had no core for 150% of the time)"]
    assert machine.remedy.calls == ["start", *["stop", "start"] * (len(machine.remedy.calls) // 2)]
    assert machine.spun < 0.01 * 1200


def test_a_machine_where_the_remedy_waits_much_is_tried_now_and_then():
    machine = Machine(lambda now, busy: 1.5 if now <= 5 else 0.5 if busy else 0.0)
    machine.run(5)
    assert machine.run(LONGEST_SECONDS + SETTLED_SECONDS) == ["calm now"]


def test_a_machine_that_is_busy_again_long_after_says_so_again():
    machine = Machine(lambda now, busy: 0.5 if now <= 1 or 100 <= now <= 101 else 0.0)
    lines = [line.partition(" (")[0] for seconds in (10, 80, 15, 35) for line in machine.run(seconds)]
    assert lines == ["busy now", "calm now"] * 2


def test_what_came_and_went_between_two_looks_is_not_told():
    """Such as the threads that prepare the data, before the first step."""
    machine = Machine(lambda now, busy: 0.5 if now <= 1 else 0.0)
    assert machine.run(60) == []
    assert machine.remedy.calls == ["start", "stop"]


def test_waiting_is_the_sum_over_threads(tmp_path):
    for thread, waited in enumerate((1_500_000_000, 250_000_000)):
        (tmp_path / "task" / str(thread)).mkdir(parents=True)
        (tmp_path / "task" / str(thread) / "schedstat").write_text(f"999 {waited} 12\n")
    (tmp_path / "task" / "3").mkdir()  # a thread that has just ended
    (tmp_path / "schedstat").write_text("0 0 0\n")
    assert WaitClock(tmp_path).read() == 1.75


def test_preemptions_are_counted_where_the_kernel_does_not_count_waiting(tmp_path):
    clock = WaitClock(tmp_path)
    assert not clock.counts_waits
    assert 0 <= clock.read() <= clock.read()


def test_updates_need_no_first_reading():
    state = BusyState()
    state.update(BUSY_SHARE - 0.01, 0.0)
    assert (state.busy, state.settled) == (False, True)
    state.update(BUSY_SHARE, 0.25)
    assert (state.busy, state.settled) == (True, True)


@pytest.mark.parametrize(
    ("mapped", "found"),
    [
        (["{torch}/lib/libgomp.so.1", "/usr/lib/libgomp.so.1"], "{torch}/lib/libgomp.so.1"),
        (["/x/sklearn.libs/libgomp-a34.so", "{torch}.libs/libgomp-98b.so.1.0.0"], "{torch}.libs/libgomp-98b.so.1.0.0"),
        (["/x/sklearn.libs/libgomp-a34.so", "/usr/lib/libgomp.so.1"], None),
        (["/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0"], "/usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0"),
        (["/opt/conda/lib/libiomp5.so", "/usr/lib/libgomp.so.1"], None),
        (["/opt/conda/lib/libomp.so"], None),
        ([], None),
    ],
)
def test_the_library_of_the_threads_is_the_one_that_torch_uses(tmp_path, mapped, found):
    pytest.importorskip("torch")
    from moeport.backends.torch.openmp import find_library

    names = {"torch": tmp_path / "site" / "torch"}
    maps = tmp_path / "maps"
    lines = [f"7f0 r-xp 00000000 fe:00 1                  {path.format(**names)}\n" for path in mapped]
    maps.write_text("7ffd000 rw-p 00000000 00:00 0          [stack]\n" + "".join(lines + lines))
    library = find_library(maps, names["torch"])
    assert library == (found and type(tmp_path)(found.format(**names)))
    assert find_library(tmp_path / "absent", names["torch"]) is None


@pytest.mark.parametrize(
    "settings", [{}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "0"}]
)
def test_what_the_user_decided_stays(settings, monkeypatch):
    torch = pytest.importorskip("torch")
    from moeport.backends.torch import openmp

    for name in openmp.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(openmp, "watch", lambda: "a watch")
    assert openmp.decided() == [f"{name}={value}" for name, value in settings.items()]
    said = " and ".join(f"{name}={value}" for name, value in settings.items()) or "sleep while other programs"
    assert openmp.describe_threads().startswith("3, which ")
    assert said in openmp.describe_threads()


def test_a_single_thread_needs_no_watch(monkeypatch):
    torch = pytest.importorskip("torch")
    from moeport.backends.torch import openmp

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert openmp.watch.__wrapped__() is None
    assert openmp.describe_threads() == "1"


def library():
    pytest.importorskip("torch")
    from moeport.backends.torch.openmp import find_library

    found = find_library()
    if found is None:
        pytest.skip("PyTorch computes with another library than libgomp")
    return found


def test_an_idle_team_is_there_from_start_to_stop():
    import ctypes

    from moeport.backends.torch.openmp import IdleTeam

    loaded = ctypes.CDLL(str(library()))
    team, before = IdleTeam(loaded), threads()
    for _ in range(2):
        team.start()
        team.start()
        assert eventually(lambda: threads() == before + loaded.omp_get_num_procs() + 1)
        team.stop()
        team.stop()
        assert eventually(lambda: threads() == before)


def test_losses_are_equal_to_the_bit_with_and_without_an_idle_team(monkeypatch):
    import ctypes

    import torch

    from moeport.backends.torch import backend
    from moeport.backends.torch.openmp import IdleTeam

    team, count = IdleTeam(ctypes.CDLL(str(library()))), torch.get_num_threads()
    monkeypatch.setattr(backend, "watch", lambda: None)
    torch.set_num_threads(2)
    try:
        spinning = losses()
        team.start()
        sleeping = losses()
    finally:
        team.stop()
        torch.set_num_threads(count)
    assert len(set(spinning)) == 2
    assert spinning == sleeping


def losses():
    """Of two steps on the same tokens, whose matrices are large enough for two threads."""
    model = ModelConfig(num_layers=1, d_model=256, attention={"num_heads": 2}, moe={"num_experts": 2})
    shapes, backend = DecoderLM(model, 512), get_backend(BackendConfig(name="torch", device="cpu"))
    options = TrainingOptions(OptimizerConfig())
    trained = backend.training_model(shapes, initial_parameters(shapes.parameter_specs(), 0), options)
    token_BS = np.random.default_rng(0).integers(0, 512, (4, 129))
    found = []
    for _ in range(2):
        loss = trained.accumulate(Batch(token_BS[:, :-1].copy(), token_BS[:, 1:].copy()), 1.0).loss
        trained.step(1e-2, trained.gradient_norm())
        found.append(float(backend.ops.to_numpy(loss)))
    return found


def threads():
    return len(os.listdir("/proc/self/task"))


def eventually(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
