"""`moeport bench comm` as a user starts it."""

import csv
import json

import numpy as np
import pytest

from moeport.bench.operations import COLLECTIVES
from moeport.comm.exchange import EXCHANGES
from tests.comm.jobs import start
from tests.optional import installed

SMALL = ["-b", "1K", "-e", "4K", "-f", "4", "-n", "2", "-w", "1", "--experts", "8", "--top-k", "3", "--width", "16"]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param("torch", [], marks=pytest.mark.slow),
        ("torch", ["--backward", "-d", "bfloat16", "--chunks", "1,2"]),
        ("mindspore", ["--backward"]),
    ],
)
def test_every_operation_is_right_and_written_down(tmp_path, backend, options):
    pytest.importorskip(backend)
    files = ["--json", str(tmp_path / "out.json"), "--csv", str(tmp_path / "out.csv")]
    if installed("matplotlib"):
        files += ["--plot", str(tmp_path / "out.svg")]
    job = start(backend, 2, ["-m", "moeport", "bench", "comm", *SMALL, *options, *files], tmp_path / "job")
    try:
        assert job.wait(180) == 0, job.output()
    finally:
        job.end()
    about = json.loads((tmp_path / "out.json").read_text())
    rows = about["rows"]
    assert (about["ranks"], about["nodes"], about["backend"]) == (2, [0, 0], backend)
    words = ("", " in 2 chunks") if "--chunks" in options else ("",)
    names = [*COLLECTIVES, *(f"{name}{chunks}" for name in EXCHANGES for chunks in words)]
    assert [row["operation"] for row in rows] == names * 2
    assert [row["size"] for row in rows] == [1024] * len(names) + [4096] * len(names)
    item = 2 if "bfloat16" in options else 4
    for row in rows:
        assert row["wrong"] == 0
        parts = 2 if row["operation"] in ("all_gather", "reduce_scatter", "all_to_all") else 1
        assert row["count"] * item * parts == row["size"]
        assert row["fastest_us"] <= row["time_us"]
        assert row["low_us"] <= row["time_us"] <= row["high_us"]
        assert row["algbw"] == pytest.approx(row["size"] / row["time_us"] / 1e3)
        factor = {"all_reduce": 1.0, "all_gather": 0.5, "reduce_scatter": 0.5, "all_to_all": 0.5}
        assert row["busbw"] == pytest.approx(row["algbw"] * factor.get(row["operation"], 1.0))
        assert row["intra_node_bytes"] > 0
        assert row["inter_node_bytes"] == 0
    with (tmp_path / "out.csv").open() as file:
        assert [row["operation"] for row in csv.DictReader(file)] == names * 2
    assert "size" in job.output()
    assert "# Out of bounds values : 0 OK" in job.output()
    assert f"# Avg bus bandwidth    : {np.mean([row['busbw'] for row in rows]):g}" in job.output()
    assert about["average_busbw"] == pytest.approx(np.mean([row["busbw"] for row in rows]))
    assert "…" not in job.output()
    if installed("matplotlib"):
        assert all(name in (tmp_path / "out.svg").read_text() for name in ("bus bandwidth", "size of one rank"))


def test_wrong_values_are_counted_and_fail(tmp_path):
    """Experts that forget a token: the benchmark sees it, says how many, and exits with 1."""
    script = tmp_path / "wrong.py"
    script.write_text(
        "import sys\n"
        "from moeport.comm import exchange\n"
        "from moeport.comm.exchange import FlatExchange\n"
        "class Forgetful(FlatExchange):\n"
        "    def __call__(self, ops, x_TD, routing, experts):\n"
        "        return super().__call__(ops, x_TD, routing, experts) * (ops.arange(x_TD.shape[0])[:, None] > 0)\n"
        "exchange.EXCHANGES['flat'] = Forgetful\n"
        "sys.argv = ['moeport', *sys.argv[1:]]\n"
        "from moeport.cli.main import main\n"
        "main()\n"
    )
    job = start(
        "torch", 2, [str(script), "bench", "comm", "flat", *SMALL, "--json", str(tmp_path / "out.json")], tmp_path / "j"
    )
    try:
        assert job.wait(120) != 0
    finally:
        job.end()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    host = (np.arange(16) * 5) % 11
    assert [row["wrong"] for row in rows] == [sum(((host + rank) % 11 > 0).sum() for rank in range(2))] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gather"], "unknown operation 'gather'; expected all_reduce, all_gather"),
        (["-b", "lots"], "invalid size 'lots'; expected bytes such as 4096, 64K, 4M or 1G"),
        (["flat", "--experts", "7"], "--experts 7: not divisible among 2 ranks; expected a multiple of 2"),
        (["flat", "--experts", "4", "--top-k", "5"], "--top-k 5: more experts per token than there are"),
        (["flat", "--chunks", "0"], "--chunks '0': expected numbers of at least 1 such as 1,2,4"),
        (["all_reduce", "-b", "4M", "-e", "64K"], "--minbytes 4M is above --maxbytes 64K; expected at most 64K"),
    ],
)
def test_faulty_arguments_are_said_before_anything_starts(bench, arguments, message):
    done = bench("comm", *arguments, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="1")
    assert done.returncode == 2
    assert message in done.stderr


def test_without_a_launcher_it_says_how(bench):
    done = bench("comm")
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2 -m moeport bench comm" in done.stderr
