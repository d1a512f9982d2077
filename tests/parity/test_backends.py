"""All verdicts between backends and types, for every router that is registered and for the quickstart."""

from dataclasses import replace
from pathlib import Path

import pytest

from moeport.parity.run import GOLDEN, compare_subjects, run
from moeport.parity.subject import Size, build_subject
from moeport.routers import BY_NAME
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from tests.conformance.targets import with_default_kernels
from tests.parity.tiny import MODEL, config_file

pytest.importorskip("torch")

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = Size(sequences=2, tokens=12, steps=2)


ROUGH = ("sparsity_constrained_expert_choice", "soft")
"""Not in bfloat16: of the first a tenth of the choices of its solver nearly tie, which is a warning; the scale of the
second is one number, whose gradient is a difference of large ones.
"""


def assert_passes(report, comparisons):
    """The first comparison with numpy, which has no gradients, is a warning that says so; nothing else is one."""
    assert len(report.comparisons) == comparisons
    first, *rest = report.comparisons
    if first.a.name.startswith("numpy"):
        missing = {row.part: row.reason for row in first.coverage if row.judged == "not judged"}
        untrained = "numpy does not train"
        assert missing == {"gradients": "numpy has no gradients", "optimizer": untrained, "trajectory": untrained}
        assert first.verdict == "warn"
        assert len(first.reasons) == 2
        assert all(tensor.verdict == "pass" for tensor in first.tensors)
    for found in rest if first.verdict == "warn" else report.comparisons:
        assert found.verdict == "pass", "\n".join([found.headline, *(f"{t.name}: {t.reason}" for t in found.tensors)])


def options(config):
    """The router's defaults, with groups in the one that has a bias."""
    return config.model_validate({"num_groups": 2} if config is SigmoidBiasConfig else {})


@pytest.mark.parametrize(
    ("name", "capacity"),
    [
        (name, capacity)
        for name, router in BY_NAME.items()
        for capacity in ("dropless", "factor")
        if capacity == "dropless" or not router.config_class.fixed_load
    ],
)
def test_numpy_and_torch(tmp_path, name, capacity):
    router = options(BY_NAME[name].config_class).model_dump(mode="json")
    moe, layers = {**MODEL["moe"], "router": router}, 2
    if capacity == "factor":
        layers = 1
        moe["capacity"] = {"policy": "factor", "factor": 1.0, "drop": "probability"}
    file = config_file(tmp_path, model={**MODEL, "num_layers": layers, "moe": moe})
    types = ["fp64", "fp32"] if name in ROUGH else ["fp64", "fp32", "bf16"]
    report = run(file, ["numpy:fp64", *(f"torch-cpu:{kind}" for kind in types)], size=SMALL)
    assert_passes(report, len(types))
    kinds = {tensor.kind for tensor in report.comparisons[1].tensors}
    assert {"activation", "score", "plan", "loss", "gradient", "update"} <= kinds
    assert "decision" in kinds or name == "forced_balance"
    assert report.comparisons[-1].trajectory


@pytest.mark.parametrize("name", BY_NAME)
def test_mindspore(tmp_path, name):
    """In float64 one router: tests/backends/test_mindspore.py compares all of them to 1e-12."""
    pytest.importorskip("mindspore")
    file = config_file(tmp_path, options(BY_NAME[name].config_class).model_dump(mode="json"))
    size = Size(sequences=2, tokens=8, steps=0)
    variants = ["torch-cpu:fp64", *["mindspore-cpu:fp64"] * (name == "topk"), "mindspore-cpu"]
    report = run(file, variants, size=size)
    assert_passes(report, len(variants) - 1)
    assert "gradient" in {tensor.kind for tensor in report.comparisons[-1].tensors}


OPENMOE = {**MODEL, "num_layers": 1, "moe": {**MODEL["moe"], "residual_hidden": 16, "residual_form": "sequential"}}


def test_a_dense_block_after_the_experts(tmp_path):
    file = config_file(tmp_path, model=OPENMOE)
    report = run(file, ["numpy:fp64", "torch-cpu:fp64", "torch-cpu", "torch-cpu:bf16"], size=SMALL)
    assert_passes(report, 3)
    assert "layers.0.dense_norm.weight" in " ".join(t.name for t in report.comparisons[1].tensors)


def test_a_dense_block_after_the_experts_on_mindspore(tmp_path):
    pytest.importorskip("mindspore")
    report = run(config_file(tmp_path, model=OPENMOE), ["torch-cpu", "mindspore-cpu"], size=Size(2, 8, 0))
    assert_passes(report, 1)


VMOE = {
    "topk": {
        "router": {"name": "topk", "normalize_gates": False, "noise_std": 1.0},
        "capacity": {"policy": "factor", "factor": 1.05, "multiple_of": 4},
    },
    "expert_choice": {"router": {"name": "expert_choice", "noise_std": 1.0, "multiple_of": 4}},
}
"""Noise and rounded capacities."""


@pytest.mark.parametrize("moe", VMOE.values(), ids=VMOE)
def test_options_of_vmoe(tmp_path, moe):
    file = config_file(tmp_path, model={**MODEL, "num_layers": 1, "moe": {**MODEL["moe"], **moe}})
    assert_passes(run(file, ["numpy:fp64", "torch-cpu:fp64", "torch-cpu", "torch-cpu:bf16"], size=SMALL), 3)


@pytest.mark.parametrize("moe", VMOE.values(), ids=VMOE)
def test_options_of_vmoe_on_mindspore(tmp_path, moe):
    pytest.importorskip("mindspore")
    file = config_file(tmp_path, model={**MODEL, "num_layers": 1, "moe": {**MODEL["moe"], **moe}})
    assert_passes(run(file, ["torch-cpu", "mindspore-cpu"], size=Size(2, 8, 0)), 1)


def short_documents(folder):
    """A config whose sequences have the ends of several documents."""
    (folder / "text").mkdir()
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text(f"{number}, {number + 1}")
    return config_file(folder, data={"document_mask": True, "sequence_length": 12})


def test_documents_are_masked_alike(tmp_path):
    """Also where blocks are recorded from outside. Without the mask it is another computation."""
    file, small = short_documents(tmp_path), replace(SMALL, steps=1)
    variants = ["torch-cpu:fp64", "numpy:fp64", "torch-cpu training.activation_checkpointing=true"]
    report = run(file, [*variants, "torch-cpu data.document_mask=false"], size=small)
    assert [found.verdict for found in report.comparisons] == ["warn", "pass", "fail"]
    assert all(tensor.verdict == "pass" for found in report.comparisons[:2] for tensor in found.tensors)


def test_documents_are_masked_alike_by_mindspore(tmp_path):
    pytest.importorskip("mindspore")
    report = run(short_documents(tmp_path), ["torch-cpu", "mindspore-cpu"], size=Size(2, 12, 0))
    assert_passes(report, 1)


def test_each_sequence_is_of_its_domain_on_every_backend(tmp_path):
    """Also in micro-batches, each of which two simulated nodes share."""
    router = {"name": "rre", "groups": 2, "group_by": "domain", "nodes": 2}
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{'odd' if number % 2 else 'even'} {number} " * 12)
    sources = {
        name: [str(tmp_path / "text" / f"[{numbers}].txt")] for name, numbers in (("even", "024"), ("odd", "135"))
    }
    domains = [{"name": name, "source": {"name": "files", "paths": paths}} for name, paths in sources.items()]
    data = {"source": {"name": "stdlib"}, "domains": domains, "sequence_length": 12}
    file = config_file(tmp_path, router, data=data, training={"batch_size": 4})
    report = run(file, ["numpy:fp64", "torch-cpu:fp64", "torch-cpu"], size=Size(4, 12, 1, micro_batches=2))
    assert_passes(report, 2)
    assert any(tensor.name.endswith("domain_B") for tensor in report.comparisons[0].tensors)


def test_optimiser_steps_of_mindspore(tmp_path):
    pytest.importorskip("mindspore")
    report = run(config_file(tmp_path), ["torch-cpu", "mindspore-cpu"], size=Size(2, 8, 2))
    assert_passes(report, 1)
    assert "update" in {tensor.kind for tensor in report.comparisons[0].tensors}
    assert len(report.comparisons[0].trajectory) == 2


def test_the_quickstart(tmp_path):
    size = Size(sequences=2, tokens=32, steps=3)
    variants = ["numpy", "torch-cpu", "torch-cpu:fp64", "torch-cpu:bf16"]
    overrides = [f"data.cache_dir={tmp_path}", "data.tokenizer.name=byte"]
    assert_passes(run(QUICKSTART, variants, overrides, size=size), 3)


def test_two_runs_at_bfloat16_that_differ_by_noise_pass(tmp_path):
    """The same model in bfloat16 on other kernels: the default compositions, which round elsewhere."""
    file = config_file(tmp_path)
    a, b = (build_subject(file, "torch-cpu:bf16", size=SMALL) for _ in range(2))
    b.backend.ops = with_default_kernels(b.backend.ops)
    golden = build_subject(file, GOLDEN, size=SMALL)
    report = compare_subjects([a, replace(b, name="default kernels")], 2, golden=golden)
    assert_passes(report, 1)
    assert not report.comparisons[0].equal


@pytest.mark.slow
def test_a_model_that_is_compiled(tmp_path):
    """Blocks are compared by their outputs."""
    file = config_file(tmp_path)
    report = run(file, ["torch-cpu", "torch-cpu backend.compile=true"], size=Size(2, 8, 1))
    assert_passes(report, 1)
    assert "layers.1:output" in {tensor.name for tensor in report.comparisons[0].tensors}


COMPILED = ["mindspore-cpu backend.compile=false", "mindspore-cpu backend.compile=true"]


def test_mindspore_eager_against_compiled(tmp_path):
    """One graph shows losses, how often each expert was chosen, gradients, updates and the trajectory."""
    pytest.importorskip("mindspore")
    (found,) = run(config_file(tmp_path), COMPILED, size=Size(2, 8, 2), golden=None).comparisons
    assert found.verdict == "pass", found.headline
    assert any("the pass is one compiled graph" in note for note in found.notes)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    for name in ("model:loss", "model:cross_entropy", "model:chosen_LE", "gradient:embedding.weight"):
        assert name in by_name
    assert {"gradient", "training gradient", "update"} <= {tensor.kind for tensor in found.tensors}
    assert len(found.trajectory) == 2
    assert not found.equal


def test_a_fault_of_the_compiled_graph_is_found(tmp_path, monkeypatch):
    pytest.importorskip("mindspore")
    from moeport.backends.mindspore.static_ops import StaticOps

    swiglu = StaticOps.swiglu
    monkeypatch.setattr(StaticOps, "swiglu", lambda self, x: swiglu(self, x) * 1.001)
    (found,) = run(config_file(tmp_path), COMPILED, size=Size(2, 8, 0), golden=None).comparisons
    assert found.headline.startswith("FAIL model:"), found.headline
    assert any(t.verdict == "fail" and t.kind == "gradient" for t in found.tensors)


def test_both_numbers_where_choices_flip(tmp_path):
    """Near ties in float32 fall the other way in bfloat16; both agreements and both errors are on record."""
    file = config_file(tmp_path)
    (found,) = run(file, ["torch-cpu", "torch-cpu:bf16"], size=Size(8, 32, 1)).comparisons
    assert found.verdict == "pass", found.headline
    assert found.replayed
    flipped = [routing for routing in found.routing if routing.agreement < 1]
    assert flipped
    assert all(routing.agreement_replayed is not None for routing in flipped)
    assert flipped[0].near_ties == round((1 - flipped[0].agreement) * flipped[0].choices)
    after = next(tensor for tensor in found.tensors if tensor.name == "final_norm:rms_norm")
    assert after.free_error > after.error
    assert "all near ties" in found.headline
