"""The parts in their order, whatever becomes of each, and the exit code."""

import signal
import zipfile

import pytest

from moeport.errors import UserError
from moeport.kit import kit
from moeport.kit.options import PART_NAMES, KitOptions, selected
from moeport.kit.parts import PARTS
from moeport.kit.read import read_kit
from moeport.kit.result import Crash, Outcome
from moeport.kit.text import headline

FOUND = {
    "device": "npu (Ascend910B4)",
    "kind": "npu",
    "dtypes": {"float32": True, "bfloat16": True, "float64": False},
    "kernels": {"float32": {"linear": "default"}, "bfloat16": {"linear": "default"}},
    "problems": {"float64": "RuntimeError: no float64"},
    "versions": {"torch": "2.13.0"},
    "units": [{"name": "Ascend910B4", "memory_bytes": 2**36}] * 4,
    "communication": {"hccl": "by torch_npu"},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the kit with outcomes by part in place of processes, and returns the exit code, the file and the lines."""

    def go(outcomes, parts=("device", "train"), found=FOUND, **options):
        started = []

        def run_stage(task, seconds, cases, watch):
            started.append(task)
            if task.part == "device":
                return Outcome(found)
            outcome = outcomes[task.part]
            return outcome(task) if callable(outcome) else outcome

        monkeypatch.setattr(kit, "run_stage", run_stage)
        path, said = tmp_path / "kit.zip", []
        code = kit.run_kit(KitOptions(path, "torch", "auto", None, tuple(parts), **options), said.append)
        return code, read_kit(path).results, said, started

    return go


def trained(task):
    losses = [5.0, 4.0, 3.5, 3.0]
    return Outcome({"float32": {"losses": losses, "tokens_per_second": 10.0, "ranks": task.ranks}})


def test_all_parts_pass(run):
    code, results, said, started = run({"train": trained})
    assert (code, results["verdict"]) == (0, "pass")
    assert [(task.part, task.ranks) for task in started] == [("device", 1), ("train", 1), ("train", 4)]
    assert started[1].dtypes == ("float32", "bfloat16")
    assert results["machine"]["device"] == "npu (Ascend910B4)"
    assert results["machine"]["CANN"] == "none found"
    assert "left out or replaced" in "\n".join(said)
    assert "2 passed" in said


def test_a_part_that_ends_early_is_failed_and_the_others_go_on(run):
    outcomes = {
        "train": Outcome(ending="ended with SIGABRT: planted"),
        "exchange": Outcome(ending="no end within 600 s"),
    }
    code, results, _, started = run(outcomes, ("exchange", "train"))
    assert (code, results["verdict"]) == (1, "fail")
    assert [(p["name"], p["verdict"], p["summary"]) for p in results["parts"][1:]] == [
        ("exchange", "fail", "no end within 600 s"),
        ("train", "fail", "ended with SIGABRT: planted"),
    ]
    assert [(task.part, task.stage) for task in started] == [
        ("device", 0),
        ("exchange", 0),
        ("exchange", 1),  # the other way to exchange rows
        ("train", 0),  # not on several ranks, since it ended on one
    ]


def test_what_one_stage_found_is_kept_if_the_next_one_ends(run):
    outcomes = {"train": lambda task: Outcome(ending="no end within 9 s") if task.stage else trained(task)}
    code, results, _, _ = run(outcomes)
    assert code == 1
    assert results["parts"][1]["summary"] == "no end within 9 s; the loss falls from 5.000 to 3.000 in 4 steps"


def test_a_part_that_examined_nothing_is_named_and_the_exit_code_is_0(run):
    code, results, said, _ = run({"parity": Outcome({}), "train": trained}, ("parity", "train"))
    assert (code, results["verdict"]) == (0, "warn")
    assert results["parts"][2]["summary"] == (
        "nothing was compared: the device computes neither in float32 nor in bfloat16"
    )
    assert said[-2] == "2 passed; with a warning: parity"
    assert headline(results).endswith(": warn (2 passed, 1 with a warning, 0 failed, 0 skipped)")


def exchanged(way, wrong):
    found = {"way": way, "pattern": "uneven", "dtype": "float32", "values": {"entries": 9, "wrong": wrong, "zeros": 0}}
    return Outcome({"ranks": 4, "found": [found]})


def test_the_other_way_to_exchange_rows_is_tried_where_the_first_is_wrong(run):
    ways = ("by the library", "by sends and receives")
    code, results, _, started = run({"exchange": lambda task: exchanged(ways[task.stage], 0)}, ("exchange",))
    assert (code, len(started)) == (0, 2)
    outcomes = {"exchange": lambda task: exchanged(ways[task.stage], 0 if task.stage else 5)}
    code, results, _, started = run(outcomes, ("exchange",))
    assert (code, len(started)) == (1, 3)
    assert results["parts"][1]["summary"] == (
        "by the library, 5 of 9 entries are wrong on 4 ranks; by sends and receives, all 9 entries are right"
    )


def test_what_cases_found_before_the_end_is_kept(run):
    right = {"values": {"nearness": 0.1, "problem": None}}
    done = [{"begin": "a"}, {"end": "a", "op": "linear", "dtype": "float32", **right}, {"begin": "b"}]
    outcome = Outcome(None, done, [Crash("b", "ended with SIGSEGV")], "ended with SIGSEGV")
    code, results, _, _ = run({"conformance": outcome}, ("conformance",))
    part = results["parts"][1]
    assert (code, part["verdict"]) == (1, "fail")
    assert part["summary"] == "ended with SIGSEGV; 1 of 2 cases are wrong, the first b: ended with SIGSEGV"
    assert part["tables"][0]["rows"] == [["b", "process", "ended with SIGSEGV"]]


def test_results_that_make_no_sense_fail_their_part(run):
    code, results, _, _ = run({"train": Outcome({"float32": 3})})
    assert code == 1
    assert results["parts"][1]["summary"].startswith("the results cannot be read: TypeError")


def test_without_a_device_the_rest_is_skipped(run):
    broken = FOUND | {"dtypes": {"float32": False}, "problems": {"float32": "RuntimeError: no driver"}}
    code, results, _, started = run({}, ("probe", "train"), broken)
    assert (code, [task.part for task in started]) == (1, ["device"])
    assert [part["summary"] for part in results["parts"]] == [
        "cannot be used: RuntimeError: no driver",
        "the device cannot be used",
        "the device cannot be used",
    ]


def test_parts_that_need_more_ranks_are_skipped_with_the_number(run):
    alone = FOUND | {"units": [{"name": "Ascend910B4", "memory_bytes": None}]}
    code, results, _, _ = run({"train": trained}, ("probe", "exchange", "train"), alone)
    assert code == 0
    assert [part["summary"] for part in results["parts"][1:3]] == [
        "needs 2 ranks, and there is 1",
        "needs 3 ranks, and there is 1",
    ]


def test_a_signal_ends_the_part_and_the_file_is_written(run):
    def interrupted(task):
        signal.raise_signal(signal.SIGINT)
        return Outcome(ending="interrupted")

    code, results, said, _ = run({"exchange": interrupted}, ("exchange", "train"))
    assert code == 130
    assert (results["interrupted"], results["verdict"]) == (True, "fail")
    assert [(p["verdict"], p["summary"]) for p in results["parts"][1:]] == [
        ("fail", "interrupted"),
        ("skipped", "interrupted before it began"),
    ]
    assert said[-1].startswith("wrote ")


def test_on_a_cpu_there_are_some_ranks_though_there_is_no_device(run):
    _, _, _, started = run({"train": trained}, found=FOUND | {"kind": "cpu", "units": []})
    assert started[-1].ranks == kit.CPU_RANKS


def test_nothing_private_of_this_process_is_in_the_file(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-secret-42")
    monkeypatch.setenv("USER", "planted-user")
    ending = f"ended with exit code 1: {tmp_path}/x of planted-user at 10.1.2.3, planted-secret-42"
    run({"train": Outcome(ending=ending)})
    with zipfile.ZipFile(tmp_path / "kit.zip") as file:
        everything = "".join(file.read(name).decode() for name in file.namelist())
    assert "exit code 1" in everything
    for secret in ("planted", str(tmp_path), "10.1.2.3"):
        assert secret not in everything


def test_parts_are_selected_in_their_order():
    assert selected("", "") == PART_NAMES
    assert selected("train, probe", "") == ("probe", "train")
    assert selected("", "comm,train") == tuple(name for name in PART_NAMES if name not in ("comm", "train"))


@pytest.mark.parametrize(
    ("parts", "skip", "said"),
    [
        ("trian", "", "--parts trian: expected one of doctor, .*; did you mean train\\?"),
        ("", "kernel", "--skip kernel: .*did you mean kernels\\?"),
        ("train", "train", "--parts and --skip leave no part"),
    ],
)
def test_unknown_parts_are_refused(parts, skip, said):
    with pytest.raises(UserError, match=said):
        selected(parts, skip)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"backend": "numpy"}, "--backend numpy: expected one of torch, mindspore"),
        (
            {"backend": "mindspore", "device": "cuda"},
            "--device cuda: not a device of mindspore; expected one of auto, cpu, npu",
        ),
        ({"backend": "torch", "device": "gpu"}, "--device gpu: expected one of auto, cpu, cuda, npu"),
        ({"backend": "torch", "ranks": 0}, "--ranks 0: expected a number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, values, said):
    with pytest.raises(UserError) as caught:
        KitOptions(tmp_path / "x.zip", **values).check()
    assert str(caught.value).startswith(said)


def test_every_part_has_work_and_a_judge():
    for part in PARTS:
        assert callable(part.module().work)
        assert callable(part.module().judge)
