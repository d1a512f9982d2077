"""Ranks that were started differently are refused, all of them, with the key and both values."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from moeport.backends.base import Backend
from moeport.comm.agreement import Topic, disagreement
from moeport.config import config_from_dict
from moeport.launch.last_words import FOLDER, TORCHRUN_FILE, leave, read
from moeport.training import agreed
from moeport.training.run_dir import leaves
from tests.comm.jobs import ROOT, start

BASE = {"training": {"steps": 2}, "data": {"source": {"name": "files", "paths": ["a/*.txt"]}}}
CASES = {
    "training.seed": {"training": {"seed": 1}},
    "model.d_model": {"model": {"d_model": 32}},
    "model.moe.num_experts": {"model": {"moe": {"num_experts": 16}}},
    "model.moe.router.top_k": {"model": {"moe": {"router": {"name": "topk", "top_k": 3}}}},
    "training.batch_size": {"training": {"batch_size": 5}},
    "optimizer.learning_rate": {"optimizer": {"learning_rate": 0.5}},
    "optimizer.schedule.name": {"optimizer": {"schedule": {"name": "constant"}}},
    "data.sequence_length": {"data": {"sequence_length": 7}},
    "data.tokenizer.name": {"data": {"tokenizer": {"name": "byte"}}},
    "comm.timeout": {"comm": {"timeout": 7.0}},
    "backend.name": {"backend": {"name": "numpy"}},
    "backend.dtype": {"backend": {"dtype": "float64"}},
    "checkpoint.interval": {"checkpoint": {"interval": 7}},
}
"""By the key that is named: what the second rank's config has."""


def merged(base, other):
    both = {key: merged(base[key], other[key]) for key in base.keys() & other.keys() if isinstance(base[key], dict)}
    return {**base, **other, **both}


def topics(values, **environment):
    """Of a rank, as they travel."""
    config = config_from_dict(merged(BASE, values))
    found = agreed.of_start("train", config, {"--resume": False}, environment)
    return json.loads(json.dumps([topic.sent() for topic in found]))


@pytest.mark.parametrize("key", CASES)
def test_each_key_is_named_with_both_values(key):
    text = disagreement([topics({}), topics(CASES[key]), topics({})])
    configs = [config_from_dict(merged(BASE, values)) for values in ({}, CASES[key])]
    before, after = (leaves(config.model_dump(mode="json")) for config in configs)
    assert key in text
    assert f"{json.dumps(before[key])} on ranks 0, 2, {json.dumps(after[key])} on rank 1" in text
    assert "start every rank with the same" in text


@pytest.mark.parametrize("name", agreed.ENVIRONMENT)
def test_each_variable_is_named(name):
    text = disagreement([topics({}), topics({}, **{name: "1"})])
    assert f'the environment variable {name}: null on rank 0, "1" on rank 1; set it alike' in text


def test_the_version_of_an_installed_torch_npu_is_compared(monkeypatch):
    monkeypatch.setattr(agreed, "_version", lambda name: {"torch-npu": "2.13.0"}.get(name, "1"))
    one = topics({})
    monkeypatch.setattr(agreed, "_version", lambda name: {"torch-npu": "2.12.0"}.get(name, "1"))
    assert 'the version of torch-npu: "2.13.0" on rank 0, "2.12.0" on rank 1' in disagreement([one, topics({})])


@pytest.mark.parametrize("other", [{"CANN": "9.0.0"}, {}])
def test_the_version_of_cann_is_compared(other):
    backends = [SimpleNamespace(device="npu (Ascend910B3)", versions=lambda v=v: v) for v in ({"CANN": "9.1.0"}, other)]
    sent = [[agreed.of_backend(cast(Backend, backend)).sent()] for backend in backends]
    assert 'the version of CANN: "9.1.0" on rank 0' in disagreement(sent)


def test_every_key_is_compared_but_those_that_may_differ():
    config = config_from_dict(BASE)
    keys = leaves(config.model_dump(mode="json")).keys()
    assert set(agreed.of_config(config).values) == keys - agreed.MAY_DIFFER.keys()


def test_what_may_differ_is_no_disagreement():
    source = {"name": "files", "paths": ["b/*.txt"]}
    other = {"run": {"dir": "elsewhere"}, "data": {"source": source, "root": "c", "cache_dir": "d"}}
    assert disagreement([topics({}), topics(other)]) is None


def test_several_differences_are_one_sentence():
    other = {"training": {"seed": 1, "batch_size": 5, "steps": 9, "gradient_accumulation": 5}}
    text = disagreement([topics({}), topics(other)])
    assert text.startswith("the ranks disagree on 4 things: training.steps (2 on rank 0, 9 on rank 1), ")
    assert " and 1 more; start every rank" in text


def test_long_values_are_cut_where_they_differ():
    lists = [list(range(1000)), [*range(999), 7]]
    ranks = [[dataclasses.asdict(Topic("do so", {"key": values}))] for values in lists]
    text = disagreement(ranks)
    assert len(text) < 400
    assert "999]" in text
    assert ", 7]" in text


def test_last_words_are_left_once_for_each_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(TORCHRUN_FILE, str(tmp_path / "error"))
    leave("error: a", 2)
    leave("error: a", 2)
    leave("error: b", 1)
    assert [(words.text, words.code) for words in read(tmp_path)] == [("error: a", 2), ("error: b", 1)]
    assert json.loads((tmp_path / "error").read_text())["message"] == "error: a"


def test_the_last_words_are_those_of_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    leave("error: of a rank", 2)
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setattr("os.getpid", lambda: 1)
    leave("internal error: a worker has timed out", 1)
    monkeypatch.setattr("os.getpid", lambda: 2)
    leave("error: of the scheduler", 2)
    assert [words.text for words in read(tmp_path)] == ["error: of the scheduler", "error: of a rank"]


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_all_ranks_are_refused_in_one_job(tmp_path, backend):
    """Every case in one job: each comparison raises the same error on both ranks, which then go on to the next."""
    pytest.importorskip(backend)
    job = start(backend, 2, [__file__, backend, str(tmp_path)], tmp_path / "job")
    try:
        assert job.wait(200) == 0, job.output()
    finally:
        job.end()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].keys() == CASES.keys()
    assert all(key in text for key, text in said[0].items())


ONE_WRONG = """
import os, sys
from moeport.backends.torch import fused
from moeport.backends.trial import Candidate
from tests.backends import test_trial as table
fused.TABLES["cpu"] = table.__name__
if os.environ["RANK"] == "1":
    table.CANDIDATES = (Candidate(table.FACT, table.zeros),)
sys.argv = ["moeport", *sys.argv[1:]]
from moeport.cli.main import main
main()
"""
"""A fused SwiGLU for the CPU, which delivers zeros on the second rank."""


@pytest.mark.parametrize(
    "command", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in ("parity record", "bench moe"))]
)
def test_a_fused_operator_that_passes_on_one_rank_only_is_refused(tmp_path, command):
    """Before anything is computed: each rank would train on with kernels of its own."""
    pytest.importorskip("torch")
    options = {
        "train": ["configs/quickstart.yaml", "--set", "backend.device=cpu", "--set", f"run.dir={tmp_path / 'out'}"],
        "parity record": ["configs/quickstart.yaml", "--variant", "torch-cpu", "--output", str(tmp_path / "out")],
        "bench moe": ["flat", "--device", "cpu", "--json", str(tmp_path / "out")],
    }
    (tmp_path / "script.py").write_text(ONE_WRONG)
    arguments = [str(tmp_path / "script.py"), *command.split(), *options[command]]
    job = start("torch", 2, arguments, tmp_path / "job")
    try:
        assert job.wait(100) == 2, job.output()
    finally:
        job.end()
    assert (
        'the ranks disagree on what computes swiglu: "my_swiglu" on rank 0, "composition" on rank 1; run moeport '
        "doctor on each host, which says why, or set the kernel to default in backend.kernels"
    ) in " ".join(job.output().split()), job.output()
    assert not (tmp_path / "out").exists()


def main(backend, folder):
    from moeport.backends import join_job
    from moeport.config.training import BackendConfig
    from moeport.errors import DisagreementError
    from moeport.launch.launcher import launched

    launch = launched()
    said = {}
    with join_job(launch, 100.0, BackendConfig(name=backend, device="cpu")) as job:
        for key, other in CASES.items():
            config = config_from_dict(merged(BASE, other if launch.rank else {}))
            try:
                job.agree(*agreed.of_start("train", config, {}))
            except DisagreementError as error:
                said[key] = str(error)
        job.agree(*agreed.of_start("train", config_from_dict(BASE), {}))
    (folder / f"{launch.rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1], Path(sys.argv[2]))
