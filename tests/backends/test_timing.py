"""Of several forms of a kernel that are right, the fastest is used, and the choice is kept."""

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from moeport.backends import get_backend, timing
from moeport.backends.doctor import _timed
from moeport.backends.examples import plan_of
from moeport.backends.sized import SIZED, load_of, power_of_two
from moeport.backends.timing import Case, Machine, Timed, all_kept, keep, kept, race
from moeport.backends.torch import fused, timed
from moeport.backends.torch.fused import FusedOps, _composition
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import Candidate
from moeport.config.training import BackendConfig
from moeport.facts import FusedKernel

CPU = torch.device("cpu")
CASE = Case("grouped_mlp", "float32", (("E", 8), ("load", "even")))
MACHINE = Machine("a processor", 2, "torch 2.13.0")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield tmp_path / "moeport" / "kernels"
    torch.use_deterministic_algorithms(before)


def raced(incumbent, **took):
    """The outcome of a race in which each contender takes the given seconds, round by round, the last one for ever."""
    calls: dict[str, list[float]] = {name: list(np.atleast_1d(times)) for name, times in took.items()}

    def run(name):
        return calls[name].pop(0) if len(calls[name]) > 1 else calls[name][0]

    return race(incumbent, {name: partial(run, name) for name in took}, seconds=0)


def test_the_fastest_wins():
    assert raced("a", a=0.010, b=0.009, c=0.012).chosen == "b"


def test_the_incumbent_stays_within_the_margin():
    assert raced("a", a=0.0100, b=0.0096).chosen == "a"
    assert raced("b", a=0.0100, b=0.0096).chosen == "b"


def test_the_first_call_and_a_single_disturbance_do_not_count():
    assert raced("a", a=0.010, b=[9.0, 0.009, 5.0, 0.009]).chosen == "b"


def test_one_that_is_hopeless_leaves_after_a_round():
    found = raced("a", a=0.010, b=[0.1, 0.1, 1e-9])
    assert (found.chosen, found.milliseconds) == ("a", {"a": 10.0, "b": 100.0})


NAMES = frozenset(["a", "b"])
FOUND = Timed("b", {"a": 10.0, "b": 9.0})


def test_a_choice_is_kept_for_machines_of_the_kind(cache):
    keep(MACHINE, CASE, NAMES, FOUND)
    assert kept(MACHINE, CASE, NAMES) == FOUND
    assert kept(Machine("another", 2, "torch 2.13.0"), CASE, NAMES) is None
    assert kept(MACHINE, CASE, NAMES | {"c"}) is None, "a new contender has not been timed"
    assert list(all_kept(MACHINE)) == [(CASE, FOUND)]
    assert not list(all_kept(Machine("another", 2, "torch 2.13.0")))


def test_ranks_that_measure_at_the_same_time_use_the_choice_that_was_first(cache):
    assert keep(MACHINE, CASE, NAMES, FOUND) == FOUND
    assert keep(MACHINE, CASE, NAMES, Timed("a", {"a": 1.0, "b": 2.0})) == FOUND
    (file,) = cache.iterdir()
    file.write_text("damaged")
    assert keep(MACHINE, CASE, NAMES, FOUND) == FOUND == kept(MACHINE, CASE, NAMES)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "null", "[]", "{}", "\x00", '{"key": {"machine": 1}}', '{"key": null}'),
        *('{"chosen": "z"}', '{"chosen": ["b"]}', '{"milliseconds": 3}', '{"milliseconds": {"b": "fast"}}'),
    ],
)
def test_a_damaged_file_counts_as_none(cache, text):
    keep(MACHINE, CASE, NAMES, FOUND)
    (file,) = cache.iterdir()
    try:
        changed = json.dumps(json.loads(file.read_text()) | json.loads(text)) if text.startswith('{"') else text
    except ValueError:
        changed = text
    file.write_text(changed)
    assert kept(MACHINE, CASE, NAMES) is None
    assert not list(all_kept(MACHINE))


def test_a_cache_that_cannot_be_written_is_no_error(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    keep(MACHINE, CASE, NAMES, FOUND)
    assert kept(MACHINE, CASE, NAMES) is None


def mlp(factor):
    def form(ops, *args):
        return _composition("grouped_mlp")(ops, *args) * factor

    return form


def candidates(**factors):
    """By name; of the composition's bits if the factor is 1."""
    return tuple(
        Candidate(FusedKernel("grouped_mlp", name), mlp(factor), bits="composition" if factor == 1 else None)
        for name, factor in factors.items()
    )


WIDTH = 64


def arguments(rows=128, experts=2, width=WIDTH, hidden=64):
    counts = torch.tensor([rows // experts] * experts)
    weights = [torch.randn(experts, 2 * hidden, width) / 8, torch.randn(experts, width, hidden) / 8]
    return torch.randn(rows, width), *weights, counts, "swiglu"


@pytest.fixture
def clock(monkeypatch):
    """Sets the seconds that each form takes; lists the forms that were timed."""
    speeds: dict[str, float] = {}
    names: dict[Any, str] = {}
    ran: list[str] = []
    original = timed._Inputs.results

    def results(self, form):
        ran.append(names.get(form, timing.COMPOSITION))
        return original(self, form)

    def seconds_of(device, run):
        run()
        return speeds[ran[-1]]

    def pretend(candidates, **given):
        names.update((each.function, each.fact.name) for each in candidates)
        speeds.update(given)
        return ran

    monkeypatch.setattr(timed._Inputs, "results", results)
    monkeypatch.setattr(timed, "seconds_of", seconds_of)
    monkeypatch.setattr(timed, "WORTH_FLOPS", 2**20)
    monkeypatch.setattr(fused, "WORTH_FLOPS", 2**20)
    return pretend


def served(ops: Any, *args):
    """The name of the form that serves a call."""
    found = ops.serving("grouped_mlp", args[0], args[1:], {})
    return found.fact.name if found else timing.COMPOSITION


def test_the_fastest_serves_and_is_not_timed_again(clock):
    forms = candidates(one=1 + 1e-7, two=1 - 1e-7)
    ran = clock(forms, one=0.03, two=0.01, composition=0.02)
    ops = FusedOps(CPU, forms, "auto")
    assert served(ops, *arguments()) == "two"
    ran.clear()
    assert served(ops, *arguments()) == "two"
    assert served(FusedOps(CPU, forms, "auto"), *arguments(140)) == "two", "the choice is in the cache"
    assert not ran
    assert "by time for R=128 E=2 D=64 F=64" in ops.describe({"grouped_mlp": "composed"}, "float32")["grouped_mlp"]


def test_the_composition_may_win(clock):
    forms = candidates(one=1 + 1e-7)
    clock(forms, one=0.03, composition=0.02)
    assert served(FusedOps(CPU, forms, "auto"), *arguments()) == "composition"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_one_that_is_wrong_at_these_sizes_is_left_out(clock, is_first, fails, deterministic):
    right = mlp(1)
    torch.use_deterministic_algorithms(deterministic)

    def wrong(ops, x_RD, *args):
        if fails and len(x_RD) > 10:
            raise RuntimeError("not supported")
        return right(ops, x_RD, *args) * (2 if len(x_RD) > 10 else 1)

    forms = [*candidates(one=1), Candidate(FusedKernel("grouped_mlp", "wrong"), wrong, bits="composition")]
    forms = forms[::-1] if is_first else forms
    clock(forms, wrong=0.001, one=0.02, composition=0.03)
    assert served(FusedOps(CPU, forms, "auto"), *arguments()) == "one"


def test_one_that_fails_on_larger_inputs_is_left_out(clock):
    right, sizes = mlp(1), set()

    def narrow(ops, x_RD, *args):
        sizes.add(len(x_RD))
        if len(x_RD) > 512:
            raise RuntimeError("out of resource: shared memory")
        return right(ops, x_RD, *args)

    forms = [*candidates(one=1), Candidate(FusedKernel("grouped_mlp", "narrow"), narrow)]
    clock(forms, narrow=1e-6, one=1e-5, composition=1e-4)
    ops = FusedOps(CPU, forms, "auto")
    assert served(ops, *arguments(1024)) == "one"
    assert max(sizes) > 512
    again = FusedOps(CPU, forms, "auto")  # which reads the choice from the cache
    served(again, *arguments(1024))
    for each in (ops, again):
        (choice,) = each.timed.values()
        assert "narrow fails on this device: out of resource: shared memory" in choice.label


def test_a_device_without_room_for_a_trial_keeps_the_first_and_may_try_again(clock, cache):
    right = mlp(1)

    def large(ops, x_RD, *args):
        if len(x_RD) > 10:
            raise torch.OutOfMemoryError("no room")
        return right(ops, x_RD, *args)

    forms = [*candidates(one=1), Candidate(FusedKernel("grouped_mlp", "large"), large)]
    clock(forms, large=0.01, one=0.02, composition=0.03)
    assert served(FusedOps(CPU, forms, "auto"), *arguments()) == "one"
    assert not cache.exists()


def test_a_call_that_the_fastest_cannot_serve_gets_the_first(clock):
    """Limits may depend on more than the sizes, such as whether every row is served."""
    beyond: list[str] = []
    fast = Candidate(FusedKernel("grouped_mlp", "fast"), mlp(1 + 1e-7), lambda *_: beyond[0] if beyond else None)
    forms = [*candidates(one=1), fast]
    clock(forms, fast=0.01, one=0.02, composition=0.03)
    ops = FusedOps(CPU, forms, "auto")
    assert served(ops, *arguments()) == "fast"
    beyond.append("some assignments are unrouted")
    assert served(ops, *arguments()) == "one"
    assert not ops.given_way


@pytest.mark.parametrize("setting", ["default", {"grouped_mlp": "one"}])
def test_what_is_named_is_not_timed(clock, setting):
    forms = candidates(one=1, two=1)
    ran = clock(forms)
    assert served(FusedOps(CPU, forms, setting), *arguments()) == ("composition" if setting == "default" else "one")
    assert not ran


def test_little_work_is_not_timed(clock):
    forms = candidates(one=1, two=1)
    ran = clock(forms)
    args = arguments(16)
    assert SIZED["grouped_mlp"].flops(dict(SIZED["grouped_mlp"].sizes_of(TorchOps(CPU), *args))) < timed.WORTH_FLOPS
    assert served(FusedOps(CPU, forms, "auto"), *args) == "one"
    assert not ran


@pytest.mark.parametrize("deterministic", [False, True])
def test_where_results_are_reproducible_time_chooses_among_equal_bits(clock, deterministic):
    forms = candidates(first=1, other=1 + 1e-6, same=1)
    clock(forms, first=0.03, other=0.01, same=0.02, composition=0.025)
    torch.use_deterministic_algorithms(deterministic)
    assert served(FusedOps(CPU, forms, "auto"), *arguments()) == ("same" if deterministic else "other")


def test_bits_that_are_said_to_be_equal_are_compared(clock):
    forms = (*candidates(first=1), Candidate(FusedKernel("grouped_mlp", "liar"), mlp(1 + 1e-6), bits="composition"))
    clock(forms, first=0.03, liar=0.01, composition=0.03)
    torch.use_deterministic_algorithms(True)
    assert served(FusedOps(CPU, forms, "auto"), *arguments()) == "first"


ATTENTION = {"B": 4, "S": 16, "H": 4, "G": 2, "A": 8, "W": 12, "causal": True}
SHARED = {"D": 16, "F": 8, "activation": "gelu", "weights": "float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", SIZED)
def test_inputs_have_the_sizes_that_were_asked_for(kernel, dtype):
    ops = TorchOps(CPU)
    rows = {"R": 64} if kernel == "grouped_mlp" else {"T": 64, "k": 2}
    names = ATTENTION if kernel == "attention" else {**rows, "E": 8, "load": "skewed", **SHARED}
    arguments, _ = SIZED[kernel].example(ops, dtype, names, 1)
    assert dict(SIZED[kernel].sizes_of(ops, *arguments)) == names
    result: Any = getattr(ops, kernel)(*arguments)
    assert ops.dtype(result) == dtype
    for part in (2, 8, 64, 1024):
        arguments, _ = SIZED[kernel].example(ops, dtype, names, part)
        assert np.isfinite(ops.to_numpy(getattr(ops, kernel)(*arguments))).all()
        assert SIZED[kernel].sizes_of(ops, *arguments) is not None


@pytest.mark.parametrize("kernel", ["routed_mlp", "grouped_mlp"])
def test_every_run_has_a_load_of_its_own(kernel):
    ops, rows = TorchOps(CPU), {"R": 512} if kernel == "grouped_mlp" else {"T": 256, "k": 2}
    sizes: dict[str, Any] = {**rows, "E": 8, "load": "even", **SHARED}
    arguments, _ = SIZED[kernel].example(ops, "float32", sizes, 1)

    def counts(load):
        ((place, argument),) = load.items()
        assert type(argument) is type(arguments[place])
        return getattr(argument, "counts_E", argument).tolist()

    found = [counts(SIZED[kernel].load(ops, sizes, 1, turn)) for turn in (0, 1, 2, 2)]
    assert found[0] == counts({place: arguments[place] for place in SIZED[kernel].load(ops, sizes, 1, 0)})
    assert found[0] != found[1] != found[2] == found[3]
    assert [sum(each) for each in found] == [512] * 4

    seen: list[list[int]] = []
    inputs = timed._Inputs(ops, Case(kernel, "float32", tuple(sizes.items())), 1)

    def form(ops, *args):
        seen.append(counts({place: args[place] for place in SIZED[kernel].load(ops, sizes, 1, 0)}))
        return _composition(kernel)(ops, *args)

    for _ in range(3):
        inputs.seconds(form)
    assert seen[:3] == found[:3]
    assert seen[3] not in found


def test_routers_whose_experts_choose_are_not_timed():
    ops = TorchOps(CPU)
    arguments, _ = SIZED["routed_mlp"].example(ops, "float32", {"T": 8, "k": 1, "E": 2, "load": "even"} | SHARED, 1)
    plan = plan_of(ops, np.zeros(8, int), 1, 2)
    arguments[2] = type(plan)(**{**vars(plan), "choices_per_token": None})
    assert SIZED["routed_mlp"].sizes_of(ops, *arguments) is None


def test_loads():
    ops = TorchOps(CPU)
    for counts, load in [([4, 4], "even"), ([8, 1, 0], "skewed"), ([0, 0], "even"), ([9], "even"), ([3, 3, 0], "even")]:
        assert load_of(ops, torch.tensor(counts)) == load
    assert load_of(ops, torch.empty(4, dtype=torch.int64, device="meta")) == "unknown"


def test_powers_of_two():
    assert [power_of_two(n) for n in (0, 1, 3, 5, 6, 4096, 5000)] == [1, 1, 4, 4, 8, 4096, 4096]


def test_the_clock_of_the_cpu():
    assert 0 < timed.seconds_of(CPU, lambda: torch.ones(8).sum()) < 60


def test_doctor_shows_what_was_chosen():
    backend = get_backend(BackendConfig(name="torch", device="cpu"))
    assert backend.timed_kernels() == {}
    assert list(_timed({})) == ["fastest forms, as timed on this machine: none has been timed yet"]
    keep(timed.machine_of(CPU), CASE, NAMES, FOUND)
    found = backend.timed_kernels()
    assert found == {"grouped_mlp in float32, E=8 load=even": "b 9 ms, a 10 ms"}
    assert list(_timed(found))[1] == "  grouped_mlp in float32, E=8 load=even: b 9 ms, a 10 ms"
    assert get_backend(BackendConfig(name="torch", device="cpu", kernels="default")).timed_kernels() is None
    assert get_backend(BackendConfig(name="numpy", device="cpu")).timed_kernels() is None
    assert not list(_timed(None))
