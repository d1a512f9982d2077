"""What the parts compute, and how it is judged."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from moeport.backends import doctor as backends_doctor
from moeport.conformance.forms import with_methods
from moeport.core.ops import KERNELS
from moeport.kit.checks import conformance, determinism, device, doctor, exchange, kernels, parity, probe, train
from moeport.kit.corpus import write_corpus
from moeport.kit.result import Crash, Outcome
from moeport.kit.task import EVENTS_FILE, Task
from tests.comm.jobs import start

pytest.importorskip("torch")

from moeport.backends.torch import fused
from moeport.backends.torch.ops import TorchOps
from moeport.backends.trial import Candidate
from moeport.facts import FusedKernel


def task(folder, part, **changes):
    return replace(Task(part, 0, "torch", "cpu", ("float32",), 1, 1, True, str(folder)), **changes)


def events(folder):
    return [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]


@pytest.fixture
def broken(monkeypatch):
    """Opens backends whose operations are changed."""

    def breaks(**methods):
        opened = Task.open

        def open_broken(self, dtype, **changes):
            backend = opened(self, dtype, **changes)
            backend.ops = with_methods(backend.ops, "Broken", **methods)
            return backend

        monkeypatch.setattr(Task, "open", open_broken)

    return breaks


def zeros(self, gate_up):
    width = gate_up.shape[-1] // 2
    return gate_up[..., :width] * 0


NOTHING = {
    probe: [Outcome({"ranks": 2, "collectives": []})],
    conformance: [Outcome({"cases": 0})],
    kernels: [Outcome({"cases": 0})],
    exchange: [Outcome({"ranks": 3, "found": []})],
    determinism: [Outcome({}), Outcome({})],
    parity: [Outcome({})],
}


@pytest.mark.parametrize("part", NOTHING, ids=lambda part: part.__name__.rpartition(".")[2])
def test_a_part_that_has_examined_nothing_does_not_pass(part):
    result = part.judge(NOTHING[part])
    assert result.verdict == "warn"
    assert result.summary.startswith("nothing was ")


def test_cases_that_are_missing_are_counted():
    right = {"end": "a", "op": "x", "dtype": "float32", "values": {"nearness": 0.1, "problem": None}}
    result = conformance.judge([Outcome({"cases": 3}, [right])])
    assert (result.verdict, result.summary) == (
        "warn",
        "2 of 3 were not examined; 1 checks of 1 cases are right",
    )


def test_doctor_says_what_works_and_not_where(tmp_path, monkeypatch):
    works = {"installed": True, "version": "1.0", "problem": None}
    monkeypatch.setattr(backends_doctor, "describe", lambda package: works)
    found = doctor.work(task(tmp_path, "doctor"))
    assert not {"host", "interfaces", "chosen", "storage", "executable"} & {*found, *found["network"]}
    result = doctor.judge([Outcome(found)])
    assert (result.verdict, result.summary) == ("pass", "torch 1.0 works")
    found["backends"]["torch"] = works | {"problem": "fails to import"}
    result = doctor.judge([Outcome(found)])
    assert (result.verdict, result.summary) == ("fail", "torch: fails to import")


def test_the_device_and_the_types_that_work(tmp_path):
    found = device.work(task(tmp_path, "device"))
    assert device.usable(found) == ("float32", "bfloat16", "float64")
    result = device.judge([Outcome(found)])
    assert result.verdict == "pass"
    assert result.summary.startswith("cpu (")
    assert [table.title for table in result.tables] == ["compute types", "kernels"]


def test_a_device_without_a_type_is_told_with_the_reason(tmp_path, broken):
    def fails(self, x, weight, eps):
        raise RuntimeError("planted")

    broken(rms_norm=fails)
    found = device.work(task(tmp_path, "device"))
    assert device.usable(found) == ()
    assert device.judge([Outcome(found)]).summary == "cannot be used: RuntimeError: planted"


@pytest.fixture
def few_cases(monkeypatch):
    names = ("swiglu-x", "gelu-x", "cast-and back", "argsort-ties")
    monkeypatch.setattr(conformance, "CASES", [case for case in conformance.CASES if str(case) in names])


def test_conformance_passes_and_counts(tmp_path, few_cases):
    given = task(tmp_path, "conformance", dtypes=("float32", "float64"), quick=False)
    value = conformance.work(given)
    result = conformance.judge([Outcome(value, events(tmp_path))])
    assert (result.verdict, result.summary) == ("pass", "14 checks of 8 cases are right")
    assert [row[0] for row in result.tables[0].rows] == ["cast", "argsort", "swiglu", "gelu"]


def test_conformance_needs_no_float64_where_the_device_lacks_it(tmp_path, few_cases):
    conformance.work(task(tmp_path, "conformance"))
    assert "float32 eager cast-and back" not in [event.get("end") for event in events(tmp_path)]


def test_conformance_names_what_is_wrong(tmp_path, few_cases, broken):
    def fails(self, x):
        raise RuntimeError("planted")

    broken(swiglu=zeros, gelu=fails)
    conformance.work(task(tmp_path, "conformance"))
    result = conformance.judge([Outcome(events=events(tmp_path), crashes=[Crash("float32 eager x", "SIGSEGV")])])
    assert result.verdict == "fail"
    wrong = {(case, of): what for case, of, what in result.tables[0].rows}
    assert wrong.keys() == {
        ("float32 eager swiglu-x", "values"),
        ("float32 eager swiglu-x", "gradients"),
        ("float32 eager gelu-x", "values"),
        ("float32 eager gelu-x", "gradients"),
        ("float32 eager x", "process"),
    }
    assert wrong["float32 eager swiglu-x", "values"].endswith("all are zeros")
    assert wrong["float32 eager gelu-x", "values"] == "RuntimeError: planted"


def test_work_goes_on_after_the_case_that_ended_the_process(tmp_path, few_cases):
    conformance.work(task(tmp_path, "conformance", after="float32 eager swiglu-x"))
    assert [event["end"] for event in events(tmp_path) if "end" in event] == ["float32 eager gelu-x"]


def test_every_kernel_has_a_workload_that_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "REPETITIONS", 1)
    value = kernels.work(task(tmp_path, "kernels", dtypes=("float32", "bfloat16")))
    done = [event for event in events(tmp_path) if "end" in event]
    assert [event["kernel"] for event in done if event["dtype"] == "float32"] == list(KERNELS)
    result = kernels.judge([Outcome(value, done)])
    assert result.verdict == "pass", result.summary
    assert len(result.tables[0].rows) == 2 * len(KERNELS)


def test_a_kernel_that_gives_zeros_or_no_gradient_is_wrong(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(kernels, "KERNELS", ("swiglu", "linear"))
    monkeypatch.setattr(kernels, "REPETITIONS", 1)
    broken(swiglu=zeros, linear=lambda self, x, w: (x @ w.T).detach() + 0 * x.sum())
    kernels.work(task(tmp_path, "kernels"))
    result = kernels.judge([Outcome(events=events(tmp_path))])
    rows = dict([*result.tables[0].rows])  # type: ignore[arg-type]
    assert result.verdict == "fail"
    assert rows["float32 swiglu"] == "values differ by 1, limit 0.0001"
    assert rows["float32 linear"] == "the gradient by x differs by 1, limit 0.0001"


def test_the_relative_error_of_arrays():
    one, none = np.ones(3), np.zeros(3)
    found = [kernels.relative_error(*pair) for pair in ((one, one), (none, none), (one, none), (one * np.nan, one))]
    assert found == [0.0, 0.0, float("inf"), float("inf")]
    assert kernels.relative_error(one, one * np.nan) == float("inf")
    assert kernels.relative_error(np.ones(2), one) == float("inf")


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_uneven_exchanges_on_three_ranks(tmp_path, stage):
    way = (exchange.NATIVE, exchange.COMPOSED)[stage]
    task(tmp_path, "exchange", stage=stage, ranks=3, all_ranks=3, dtypes=("float32", "bfloat16")).write()
    job = start("torch", 3, ["-m", "moeport", "kit", "part", str(tmp_path)], tmp_path)
    assert job.wait(120) == 0, job.output()
    value = json.loads((tmp_path / "value.json").read_text())
    result = exchange.judge([Outcome(value)])
    assert (result.verdict, value["ranks"]) == ("pass", 3)
    assert {each["way"] for each in value["found"]} == {way}
    assert {each["dtype"] for each in value["found"]} == {"float32", "bfloat16", "index"}


def received(way, wrong, zeros):
    values = {"entries": 9, "wrong": wrong, "zeros": zeros}
    return {"way": way, "pattern": "uneven", "dtype": "float32", "values": values}


def test_an_exchange_of_zeros_is_told_from_one_of_wrong_values():
    found = [received(exchange.NATIVE, 9, 9), received(exchange.NATIVE, 0, 0), received(exchange.COMPOSED, 0, 0)]
    result = exchange.judge([Outcome({"ranks": 3, "found": found})])
    assert result.verdict == "fail"
    assert result.summary == (
        "by the library, 9 of 18 entries are wrong on 3 ranks, 9 of them zeros; "
        "by sends and receives, all 9 entries are right"
    )
    result = exchange.judge([Outcome({"ranks": 3, "found": [received(exchange.NATIVE, 2, 0)]})])
    assert result.summary == "by the library, 2 of 9 entries are wrong on 3 ranks"


def test_what_arrives_is_compared_entry_by_entry():
    wanted = exchange.values(1, 2, 4)
    assert (wanted.min(), wanted.max()) == (1, 251)
    assert exchange.compare(wanted, wanted) == {"entries": 256, "wrong": 0, "zeros": 0}
    got = wanted.copy()
    got[0], got[1] = 0, got[1] + 1
    assert exchange.compare(got, wanted) == {"entries": 256, "wrong": 128, "zeros": 64}
    assert exchange.compare(got[:1], wanted)["wrong"] == 256


def test_two_runs_are_the_same_to_the_bit(tmp_path):
    first, second = (determinism.work(task(tmp_path, "determinism")) for _ in range(2))
    result = determinism.judge([Outcome(first), Outcome(second)])
    assert (result.verdict, result.summary) == ("pass", "two runs are the same to the bit: float32")
    second["float32"]["losses"][1] = ["0x0p0", "0x0p0"]
    second["float32"]["weights"][next(iter(first["float32"]["weights"]))] = "x"
    result = determinism.judge([Outcome(first), Outcome(second)])
    assert result.verdict == "fail"
    assert result.summary.startswith("two runs differ: float32: losses differ from step 2, weights 1 differ, such as ")


def trained(losses, ranks=1):
    return Outcome({"float32": {"losses": losses, "tokens_per_second": 7.0, "ranks": ranks}})


def test_a_training_whose_loss_falls_alike_on_all_ranks_passes():
    result = train.judge([trained([5.0, 4.0, 3.0]), trained([5.0001, 4.0001, 3.1], ranks=4)])
    assert result.verdict == "fail"  # the third step is 3 % off
    result = train.judge([trained([5.0, 4.0, 3.0, 2.0]), trained([5.0001, 4.0001, 3.0, 2.1], ranks=4)])
    assert (result.verdict, result.summary) == (
        "pass",
        "the loss falls from 5.000 to 2.000 in 4 steps, and alike on 4 ranks",
    )


def test_a_loss_that_is_no_number_on_several_ranks_fails():
    result = train.judge([trained([5.0, 4.0, 3.0, 2.0]), trained([5.0, float("nan"), 3.0, 2.0], ranks=4)])
    assert result.verdict == "fail"


@pytest.mark.parametrize("losses", [[5.0, 4.9, 4.8], [5.0, 5.0, float("nan")]])
def test_a_training_whose_loss_does_not_fall_fails(losses):
    assert train.judge([trained(losses)]).verdict == "fail"


def test_the_recording_that_ships_is_what_a_cpu_computes_today(tmp_path, monkeypatch):
    """In a folder of its own, as the processes of a part run."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    found = parity.work(task(tmp_path, "parity"))
    result = parity.judge([Outcome(found)])
    assert result.verdict == "pass", result.summary
    assert found["float32"]["verdict"] == "pass", found["float32"]["headline"]
    coverage = next(table for table in found["float32"]["tables"] if "compared" in table["title"])
    assert len(coverage["rows"]) >= 5
    assert set(result.files) == {"parity-float32.json"}


def compared(verdict):
    return {"headline": verdict.upper(), "verdict": verdict, "lines": [], "tables": [], "report": {}}


@pytest.mark.parametrize(
    ("verdicts", "wanted"), [(("pass", "warn"), "warn"), (("warn", "warn"), "warn"), (("warn", "fail"), "fail")]
)
def test_parity_has_the_worst_verdict(verdicts, wanted):
    found = dict(zip(("float32", "bfloat16"), map(compared, verdicts), strict=True))
    assert parity.judge([Outcome(found)]).verdict == wanted


def test_a_fault_fails_parity(tmp_path, monkeypatch):
    from moeport.backends.torch.ops import TorchOps

    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    right = TorchOps.rms_norm
    monkeypatch.setattr(TorchOps, "rms_norm", lambda self, x, weight, eps: right(self, x, weight, eps) * 1.01)
    result = parity.judge([Outcome(parity.work(task(tmp_path, "parity")))])
    assert result.verdict == "fail"
    assert "rms_norm" in result.summary


def doubled_silu(ops, gate_up):
    return 2 * ops.gelu(gate_up[:, : gate_up.shape[1] // 2])


@pytest.mark.parametrize(("function", "timed"), [(TorchOps.swiglu, {"swiglu"}), (doubled_silu, set())])
def test_a_kernel_is_timed_as_fused_where_an_operator_passed_its_trial(tmp_path, monkeypatch, function, timed):
    """Not where one was refused, although what is said of the kernel then differs from the default's."""
    fact = FusedKernel("swiglu", "my_swiglu", ("float32",))
    monkeypatch.setitem(sys.modules, "a_table", SimpleNamespace(CANDIDATES=(Candidate(fact, function),)))
    monkeypatch.setitem(fused.TABLES, "cpu", "a_table")
    monkeypatch.setattr(fused, "_made", {})
    monkeypatch.setattr(kernels, "REPETITIONS", 1)
    monkeypatch.setattr(kernels, "KERNELS", ("swiglu", "gelu"))
    kernels.work(task(tmp_path, "kernels"))
    done = [event for event in events(tmp_path) if "end" in event]
    assert len(done) == 2
    assert {event["kernel"] for event in done if "default_s" in event} == timed
