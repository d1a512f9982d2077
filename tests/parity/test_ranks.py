"""Several ranks against one process, and against each other."""

import functools

import numpy as np
import pytest

from moeport.comm.single import SingleProcess
from moeport.errors import RunError, UserError
from moeport.parity.bundle import load_bundle, save_bundle
from moeport.parity.compare import compare, routing_differs
from moeport.parity.exchange import NOTE
from moeport.parity.job import _run
from moeport.parity.parts import gather, join, split
from moeport.parity.record import record
from moeport.parity.recording import TensorRecord
from moeport.parity.run import run
from moeport.parity.subject import Size, Variant, build_subject, size_for
from tests.comm.jobs import ROOT, Job, start
from tests.parity import ranks
from tests.parity.tiny import config_file, subject


@pytest.fixture(scope="module")
def recordings_of(tmp_path_factory):
    """What one process recorded and what each case of a job did, which runs once."""

    @functools.cache
    def of(backend, size):
        pytest.importorskip(backend)
        folder = tmp_path_factory.mktemp(f"parity-{backend}-{size}")
        file = config_file(folder)
        alone = record(build_subject(file, f"{backend}-cpu", size=ranks.size_of(size)), steps=2)
        save_bundle(alone, folder / "alone")
        script = str(ROOT / "tests/parity/ranks.py")
        job = start(backend, size, [script, backend, str(folder)], folder / "job")
        try:
            code = job.wait(280)
            assert (code, job.left()) == (0, []), Job.output_of(folder / "job")[-4000:]
        finally:
            job.end()
        return {path.parent.name: load_bundle(path.parent) for path in folder.glob("*/manifest.json")}

    return of


@pytest.fixture
def four(recordings_of):
    return recordings_of("torch", 4)


EXACT = [case for case in ranks.CASES if not case.startswith("bfloat16")]


@pytest.mark.parametrize("case", EXACT)
def test_ranks_compute_what_one_process_does(four, case):
    found = compare(four["alone"], four[case])
    assert found.verdict == "pass", found.headline
    assert (found.only_b, len(found.trajectory)) == ([], 2)
    assert bool(found.only_a) == (case == "recomputed")
    kinds = {tensor.kind for tensor in found.tensors}
    assert {"parameter", "loss", "plan", "gradient", "training gradient", "update"} <= kinds
    assert ("decision" in kinds) == (case != "recomputed")


def test_tokens_are_in_the_order_of_the_ranks(four):
    """The joined tensors have the shapes of the batch in one piece, and all rows of a batch came to an expert."""
    tensors = four["node_dedup"].tensors
    assert tensors["batch:token_BS"].shape == (8, 16)
    assert tensors["layers.0/moe.router:topk_ids"].shape == (8 * 16, 2)
    assert tensors["layers.1/moe.experts:rows_E"].values.sum() == 8 * 16 * 2
    assert tensors["gradient:layers.0.moe.experts.w_in"].shape == (4, 32, 32)


@pytest.mark.parametrize("case", ["hierarchical", "node_dedup"])
def test_algorithms_agree(four, case):
    found = compare(four["flat"], four[case])
    assert found.verdict == "pass", found.headline
    assert not found.only_a + found.only_b
    assert {(d.key, d.a, d.b) for d in found.differences} == {
        ("config comm.algorithm", "flat", case),
        ("all-to-all", "flat", case),
    }


def test_the_report_says_who_computed_it(four):
    found = compare(four["alone"], four["two copies"])
    differences = {d.key: (d.a, d.b) for d in found.differences}
    assert differences["ranks"] == ("1", "4")
    assert differences["nodes"] == ("1", "2")
    assert differences["ranks of each copy of the experts"] == ("1", "2")
    assert differences["all-to-all"] == ("none", "flat")
    assert differences["config parallelism.expert"] == ("1", "2")
    assert f"two copies: {NOTE}" in found.notes


def test_routing_is_replayed_on_all_ranks(four):
    alone, free, replayed = four["alone"], four["bfloat16"], four["bfloat16 replayed"]
    assert routing_differs(alone, free)
    found = compare(alone, free, replayed=replayed)
    assert found.verdict == "pass", found.headline
    assert found.routing[0].agreement_replayed == pytest.approx(1, abs=0.1)
    errors = [max(t.error for t in found.tensors if t.kind == k) for k in ("gradient", "training gradient")]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("row lost", "FAIL layers.0:exchange: first tensor beyond tolerance"),
        ("wrong expert", "FAIL layers.0/moe.experts:rows_E: first tensor beyond tolerance"),
        (
            "gradients averaged",
            "FAIL gradient of layers.1.moe.experts.w_out in the optimiser step: the gradients of the pass agree",
        ),
        ("same tokens", "FAIL input batch:token_BS: the inputs differ before anything is computed"),
    ],
)
def test_a_fault_over_ranks_is_named(four, fault, says):
    for reference in ("alone", "node_dedup"):
        found = compare(four[reference], four[fault])
        assert found.headline.startswith(says), found.headline
    assert fault != "row lost" or "its inputs agree (own error)" in found.headline


@pytest.mark.slow
def test_ranks_of_mindspore_compute_what_one_process_does(recordings_of):
    recordings = recordings_of("mindspore", 2)
    found = compare(recordings["alone"], recordings["flat"])
    assert found.verdict == "pass", found.headline
    assert not found.only_a + found.only_b


@pytest.mark.ranks
def test_run_starts_ranks(tmp_path):
    pytest.importorskip("torch")
    variants = ["torch-cpu:fp64", "torch-cpu:fp64@2 parallelism.expert=2"]
    report = run(config_file(tmp_path), variants, size=Size(2, 16, 2, 2))
    (found,) = report.comparisons
    assert found.verdict == "pass", found.headline
    assert (found.a.name, found.b.name, found.golden) == (*variants, "numpy:fp64")
    assert not found.only_a + found.only_b
    assert max(tensor.error for tensor in found.tensors if tensor.kind == "gradient") < 1e-14


def test_micro_batches_are_the_batch(tmp_path):
    """Of a router without a capacity, what belongs to tokens is the same in pieces and whole."""
    whole = record(build_subject(config_file(tmp_path), "numpy", size=Size(4, 16)), steps=0)
    parts = record(build_subject(config_file(tmp_path), "numpy", size=Size(4, 16, 0, 2)), steps=0)
    for name in ("batch:target_BS", "layers.0/attention.q:linear", "layers.1/moe.router:topk_ids", "layers.1:output"):
        np.testing.assert_allclose(
            parts.tensors[name].values, whole.tensors[name].values, rtol=1e-4, atol=1e-5, err_msg=name
        )
    losses = parts.tensors["model:cross_entropy"].values
    assert losses.shape == (2,)
    assert losses.mean() == pytest.approx(float(whole.tensors["model:cross_entropy"].values), rel=1e-5)
    with pytest.raises(UserError, match="recorded in 1 and 2 micro-batches; record both with the same --micro-batches"):
        compare(whole, parts)
    with pytest.raises(UserError, match="was recorded in 2 micro-batches, numpy is in 1"):
        record(subject(tmp_path, "numpy"), replay=parts)


def test_join_and_split():
    arrays = {"rows": np.arange(6).reshape(3, 2), "vector": np.arange(4), "scalar": np.array(2.5)}
    parts = [{k: TensorRecord(k, "plan", "int64", x.shape, values=x + p) for k, x in arrays.items()} for p in range(2)]
    parts[0]["a:rows_E"] = parts[1]["a:rows_E"] = TensorRecord("a:rows_E", "plan", "int64", (2,), values=np.ones(2))
    joined = join(gather(SingleProcess(None), parts))
    assert [t.shape for t in joined.values()] == [(6, 2), (2, 4), (2,), (2,)]
    assert joined["a:rows_E"].values.tolist() == [2, 2]
    for name in arrays:
        for part, piece in zip(parts, split(joined[name].values, 2), strict=True):
            np.testing.assert_array_equal(piece.reshape(arrays[name].shape), part[name].values)


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        (["torch@3", "torch@2"], {"sequences": 4}, "--sequences: 4 do not divide among 6 micro-batches"),
        (
            ["torch", "torch@4"],
            {"micro_batches": 2},
            "--micro-batches: 2 do not divide among 4 ranks; expected a multiple",
        ),
        (["torch", "torch@2 parallelism.expert=4"], {}, "parallelism.expert: 4 does not divide the 2 ranks"),
        (
            ["torch", "torch@2 parallelism.expert=2 comm.algorithm=auto"],
            {},
            "auto may choose another algorithm",
        ),
        (["torch", "mindspore@2x2"], {}, "msrun puts all ranks of a machine on one node; expected @4"),
    ],
)
def test_what_cannot_be_compared(tmp_path, variants, options, message):
    size = size_for([*map(Variant.parse, variants)], **options, tokens=16, steps=0)
    with pytest.raises(UserError, match=message):
        run(config_file(tmp_path), variants, size=size, golden=None)


def test_isolation_needs_one_piece(tmp_path):
    with pytest.raises(UserError, match="--isolate: runs single operations in this process"):
        run(config_file(tmp_path), ["numpy", "numpy"], size=Size(2, 16, 0, 2), isolate=True)


@pytest.mark.ranks
def test_a_rank_that_fails_ends_the_job():
    with pytest.raises(RunError, match=r"torch@2: a rank ended with exit code 2:\n(.|\n)*No such command"):
        _run("torch@2", Variant.parse("torch@2"), ["parity", "nothing"])
