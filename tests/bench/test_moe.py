"""`moeport bench moe` as a user starts it."""

import csv
import json

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.bench.layer import ALGORITHMS
from moeport.bench.layer_run import TOLERANCES, LayerRun
from moeport.bench.stand_ins import LocalExperts
from moeport.comm.exchange import EXCHANGES
from tests.comm.exchange_cases import routing_of
from tests.comm.jobs import start
from tests.optional import installed
from tests.support import rng

SMALL = ["-b", "1K", "-e", "4K", "-f", "4", "-n", "2", "-w", "1"]
LAYER = ["--experts", "8", "--top-k", "3", "--width", "16", "--hidden", "8"]
CONFIG = """
model:
  d_model: 16
  attention: {num_heads: 2}
  moe:
    num_experts: 16
    expert_hidden: 8
    num_shared_experts: 1
    router: {name: sigmoid_bias, top_k: 4}
    capacity: {policy: factor, factor: 0.75, drop: random}
    load_balance: {coefficient: 0.5, scope: global}
"""
SOFT = ["--set", "model.moe.router.name=soft", "--set", "model.moe.allow_future_tokens=true"]
SOFT += ["--set", "model.moe.capacity.policy=dropless", "--set", "model.moe.load_balance.coefficient=null"]


@pytest.mark.parametrize(
    ("backend", "options"),
    [("torch", []), pytest.param("torch", ["-d", "float64"], marks=pytest.mark.slow), ("mindspore", [])],
)
def test_every_algorithm_is_right_and_written_down(tmp_path, backend, options):
    pytest.importorskip(backend)
    files = ["--json", str(tmp_path / "out.json"), "--csv", str(tmp_path / "out.csv")]
    chunks = (1, 2) if backend == "torch" else (1,)  # tests/training/test_ranks.py has chunks on MindSpore
    files += ["--chunks", ",".join(map(str, chunks))]
    if installed("matplotlib"):
        files += ["--plot", str(tmp_path / "out.svg")]
    output = finished(backend, 2, [*SMALL, *LAYER, *options, *files], tmp_path)
    about = json.loads((tmp_path / "out.json").read_text())
    rows = about["rows"]
    assert (about["ranks"], about["nodes"], about["backend"], about["backward"]) == (2, [0, 0], backend, True)
    assert (about["d_model"], about["moe"]["num_experts"], about["moe"]["router"]["top_k"]) == (16, 8, 3)
    runs = [("local", 1), *((name, number) for name in EXCHANGES for number in chunks)]
    assert [(row["algorithm"], row["chunks"]) for row in rows] == runs * 2
    assert [row["size"] for row in rows] == [1024] * len(runs) + [4096] * len(runs)
    item = 8 if options else 4
    for row in rows:
        is_local = row["algorithm"] == "local"
        assert row["wrong"] == (None if is_local else 0)
        assert row["tokens"] * 16 * item == row["size"]
        assert row["fastest_us"] <= row["time_us"]
        assert row["low_us"] <= row["time_us"] <= row["high_us"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["time_us"] * 1e6)
        assert (row["exchange_us"] == 0) == is_local
        assert row["exchange_us"] < row["high_us"]
        assert (row["intra_node_bytes_per_token"] == 0) == is_local
        assert row["inter_node_bytes_per_token"] == 0
    sent = {(row["algorithm"], row["chunks"]): row["intra_node_bytes_per_token"] for row in rows[len(runs) :]}
    row_bytes = 16 * item
    assert sent["flat", 1] == pytest.approx(4 * row_bytes * 3 / 2, rel=0.25), "there, back, and the gradients of both"
    assert sent["node_dedup", 1] < sent["flat", 1]
    with (tmp_path / "out.csv").open() as file:
        assert [(row["algorithm"], int(row["chunks"])) for row in csv.DictReader(file)] == runs * 2
    assert "tokens/s" in output
    assert "…" not in output
    if installed("matplotlib"):
        drawn = (tmp_path / "out.svg").read_text()
        last = "node_dedup, 2 chunks" if len(chunks) > 1 else "node_dedup"
        assert all(words in drawn for words in ("time of a layer, ms", "local", last))


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, ["flat", "node_dedup", "--chunks", "2", "-d", "bfloat16"]),
        pytest.param(4, ["--traffic", "zipf", "--set", "model.moe.capacity.policy=dropless"], marks=pytest.mark.slow),
        pytest.param(4, ["--traffic", "zipf", "--forward-only"], marks=pytest.mark.slow),
        (2, ["local", "hierarchical", *SOFT]),
        (2, ["flat", "auto", "--chunks", "1,2"]),
    ],
)
def test_layer_of_a_config(tmp_path, ranks, options):
    """Shared experts, drops with noise, and a loss over all ranks are part of the layer; so are routers without
    assignments.
    """
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    arguments = [*options, "--config", str(config), *SMALL, "--json", str(tmp_path / "out.json")]
    output = finished("torch", ranks, arguments, tmp_path)
    about = json.loads((tmp_path / "out.json").read_text())
    names = list(dict.fromkeys(row["algorithm"] for row in about["rows"]))
    assert names == [name for name in (*ALGORITHMS, "auto") if name in options] or names == list(ALGORITHMS)
    assert {row["wrong"] for row in about["rows"] if row["algorithm"] != "local"} == {0}
    assert {row["wrong"] for row in about["rows"] if row["algorithm"] == "local"} <= {None}
    assert output.count("is fastest: flat ") == 2 * ("auto" in options)
    assert about["moe"]["num_shared_experts"] == 1


FAULTY = """
import sys
from moeport.comm import exchange
from moeport.comm.exchange import FlatExchange
class Forgetful(FlatExchange):
    def __call__(self, ops, x_TD, routing, experts):
        y_TD = super().__call__(ops, x_TD, routing, experts)
        return y_TD * ops.cast(ops.arange(x_TD.shape[0])[:, None] > 0, "float32")
class TwiceTheGradient(FlatExchange):
    def __call__(self, ops, x_TD, routing, experts):
        y_TD = super().__call__(ops, x_TD, routing, experts)
        return y_TD + y_TD - ops.stop_gradient(y_TD)
exchange.EXCHANGES['flat'] = Forgetful
exchange.EXCHANGES['hierarchical'] = TwiceTheGradient
sys.argv = ['moeport', *sys.argv[1:]]
from moeport.cli.main import main
main()
"""


@pytest.mark.parametrize("forward_only", [True, False])
def test_wrong_values_are_counted_and_fail(tmp_path, forward_only):
    """An exchange that forgets a token, and one with wrong gradients alone: the benchmark sees both."""
    script = tmp_path / "wrong.py"
    script.write_text(FAULTY)
    arguments = [str(script), "bench", "moe", "flat", "hierarchical", *SMALL, *LAYER]
    arguments += ["--json", str(tmp_path / "out.json"), *["--forward-only"] * forward_only]
    job = start("torch", 2, arguments, tmp_path / "job")
    try:
        assert job.wait(180) != 0
    finally:
        job.end()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    for forgetful, doubled in (rows[:2], rows[2:]):
        tokens = forgetful["tokens"]
        if forward_only:
            assert (forgetful["wrong"], doubled["wrong"]) == (2 * 16, 0), "a row of each rank"
        else:
            experts = 3 * 8 * 8 * 16
            assert 2 * 16 < forgetful["wrong"] < doubled["wrong"]
            assert doubled["wrong"] == pytest.approx(experts + 2 * 8 * 16 + 2 * tokens * 16, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ring"], "unknown algorithm 'ring'; expected local, flat, hierarchical, node_dedup, auto"),
        (["-b", "lots"], "invalid size 'lots'; expected bytes such as 4096, 64K, 4M or 1G"),
        (["--experts", "9"], "--experts 9: not divisible among 2 ranks; expected a multiple of 2"),
        (["--experts", "4", "--top-k", "5"], "model.moe.router.top_k: more experts per token than there are"),
        (["--chunks", "1,0"], "--chunks '1,0': expected numbers of at least 1 such as 1,2,4"),
        (["--traffic", "rush"], "--traffic 'rush': expected uniform, zipf, local:F"),
        (["--set", "model.d_model=8"], "--set model.d_model=8: no config to override; expected --config CONFIG"),
    ],
)
def test_faulty_arguments_are_said_before_anything_starts(bench, arguments, message):
    done = bench("moe", *arguments, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="1")
    assert done.returncode == 2
    assert message in done.stderr


def test_choices_cannot_be_given_where_experts_choose(bench, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: {moe: {allow_future_tokens: true, router: {name: expert_choice}}}")
    options = ["--config", str(config), "--traffic", "zipf"]
    done = bench("moe", *options, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="1")
    assert done.returncode == 2
    assert "--traffic zipf: with router expert_choice experts choose; expected router" in done.stderr


def test_without_a_launcher_it_says_how(bench):
    done = bench("moe")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2 -m moeport bench moe" in done.stderr


def test_a_value_is_wrong_beyond_the_tolerance():
    want = rng(1).standard_normal((10, 10))
    run = LayerRun("flat", 1, 10, 400, "float32", dict, {"output": want}, NumpyOps())
    size = np.sqrt(np.square(want).mean()) + np.abs(want)
    for share, wrong in ((0.9, 0), (-0.9, 0), (1.1, 100), (np.nan, 100)):
        assert run.wrong({"output": want + share * TOLERANCES["float32"] * size}) == wrong
    assert run.wrong({"output": np.where(np.arange(10) == 3, 0.0, want)}) == 10


def test_an_array_of_rounding_need_only_be_as_small():
    want = {"output": rng(1).standard_normal((10, 10)), "router.weight": 1e-6 * rng(2).standard_normal((10, 10))}
    run = LayerRun("flat", 1, 10, 400, "float32", dict, want, NumpyOps())
    for value, wrong in ((2e-6, 0), (-5e-4, 0), (2e-3, 100), (np.nan, 100)):
        assert run.wrong({**want, "router.weight": np.full((10, 10), value)}) == wrong


def test_local_gives_every_row_to_the_experts_that_are_here():
    ops, experts, seen = NumpyOps(), 8, []
    expert_TK = np.stack([rng(token).permutation(experts + 1)[:3] for token in range(20)])
    routing = routing_of(ops, expert_TK, np.where(expert_TK < experts, 0.5, 0.0), experts)
    x_TD = rng(30).standard_normal((20, 4))

    def doubled(x_RD, counts_e):
        seen.append(counts_e)
        return x_RD * 2.0

    y_TD = LocalExperts(2)(ops, x_TD, routing, doubled)
    served_TK = expert_TK < experts
    assert y_TD == pytest.approx(x_TD * served_TK.sum(1, keepdims=True))
    assert seen[0].tolist() == [(served_TK & (expert_TK % 2 == parity)).sum() for parity in range(2)]
    LocalExperts(2).of_rows(ops, x_TD[:16], np.full(8, 2), doubled)
    assert seen[1].tolist() == [8, 8]


def finished(backend, size, options, folder):
    """What a job prints that must succeed."""
    job = start(backend, size, ["-m", "moeport", "bench", "moe", *options], folder / "job")
    try:
        assert job.wait(300) == 0, job.output()
    finally:
        job.end()
    return job.output()
