"""What is recorded, under which names, and that recording changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from moeport.backends.base import TrainingOptions
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.ops import Ops
from moeport.errors import UserError
from moeport.model.batch import Batch
from moeport.model.build import build_model
from moeport.model.decoder import DecoderLM
from moeport.parity.compare import compare, routing_differs
from moeport.parity.coverage import KINDS
from moeport.parity.model import RecordedLM
from moeport.parity.record import decisions, record
from moeport.parity.recorder import LAYOUT, Recorder
from moeport.parity.recording import SAMPLED, STATISTICS, sample_indices
from moeport.parity.recording_ops import PASSIVE, TRANSPARENT, RecordingOps
from moeport.parity.subject import Variant
from tests.parity.tiny import subject
from tests.routers.catalogue import EXAMPLES
from tests.support import rng


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recording")


@pytest.fixture(scope="module")
def recorded(folder):
    return record(subject(folder), steps=2)


def test_names_say_block_parameter_and_operation(recorded):
    names = list(recorded.tensors)
    forward = [name for name in names if recorded.tensors[name].op and "layers.1" in name]
    assert forward[:10] == [
        "layers.1/attention_norm:rms_norm",
        "layers.1/attention.q:linear",
        "layers.1/attention.k:linear",
        "layers.1/attention.v:linear",
        "layers.1/attention.q_norm:rms_norm.x",
        "layers.1/attention.q_norm:rms_norm",
        "layers.1/attention.k_norm:rms_norm.x",
        "layers.1/attention.k_norm:rms_norm",
        "layers.1:rope",
        "layers.1:rope#2",
    ]
    for name in ("embedding:take_rows", "layers.0/moe.router:topk_ids", "layers.0/moe.experts:grouped_mlp"):
        assert name in names
    assert names.index("layers.0:permute") < names.index("layers.0/moe.experts:grouped_mlp")
    assert names.index("layers.1:output") < names.index("final_norm:rms_norm")


def test_kinds(recorded):
    kinds = {kind: [t.name for t in recorded.tensors.values() if t.kind == kind] for kind in ("score", "decision")}
    assert kinds["decision"] == ["layers.0/moe.router:topk_ids", "layers.1/moe.router:topk_ids"]
    assert "layers.0/moe.router:weight_N" in kinds["score"]
    for kind in ("parameter", "input", "activation", "plan", "loss", "gradient", "training gradient", "update"):
        assert any(t.kind == kind for t in recorded.tensors.values()), kind
    assert [step.step for step in recorded.trajectory] == [1, 2]


def test_inputs_are_traced_through_what_computes_nothing(recorded):
    tensors = recorded.tensors
    assert tensors["layers.0/attention.q:linear"].inputs == (
        "layers.0/attention_norm:rms_norm",
        "parameter:layers.0.attention.q",
    )
    reshaped = tensors[tensors["layers.0/attention.q_norm:rms_norm"].inputs[0]]
    assert (reshaped.name, reshaped.op) == ("layers.0/attention.q_norm:rms_norm.x", LAYOUT)
    assert reshaped.inputs == ("layers.0/attention.q:linear",)
    residual = tensors["layers.0/mlp_norm:rms_norm"].inputs[0]
    assert residual == "layers.0/mlp_norm:rms_norm.x"
    assert tensors[residual].op == "arithmetic"
    assert "parameter:layers.0.moe.experts.w_in" in tensors["layers.0/moe.experts:grouped_mlp"].inputs


def test_gradients_come_in_the_order_of_the_backward_pass(recorded):
    names = [t.name.removeprefix("gradient:") for t in recorded.tensors.values() if t.kind == "gradient"]
    assert names[0] in ("lm_head.weight", "final_norm.weight")
    assert names.index("layers.1.moe.router.weight") < names.index("layers.0.moe.router.weight")
    assert names[-1] == "embedding.weight"


@pytest.mark.parametrize("spec", ["numpy", "mindspore-cpu"])
def test_every_backend_gives_the_same_sequence(folder, recorded, spec):
    pytest.importorskip(spec.partition("-")[0])
    kinds = (*KINDS["gradients"], *KINDS["optimizer"])
    other = record(subject(folder, spec), steps=0)
    mine, its = ([t.name for t in r.tensors.values() if t.kind not in kinds] for r in (recorded, other))
    fused = [name for name in mine if name.endswith(":routed_mlp")]  # recorded beside its parts where it is fused
    assert [name for name in mine if name not in fused] == its
    assert len(fused) == 2


def test_recording_and_an_idle_recorder_change_no_bit(folder):
    taken = subject(folder)
    losses = []
    for active in (None, False, True):
        recorder = Recorder(STATISTICS)
        if not active:
            recorder.stop()
        model = taken.config.model
        lm = DecoderLM(model, taken.vocab_size)
        if active is not None:
            lm = RecordedLM(model, taken.vocab_size, recorder)
        training = taken.backend.training_model(lm, taken.params, TrainingOptions(taken.config.optimizer))
        tokens = rng().integers(0, taken.vocab_size, (2, 17))
        terms = training.accumulate(Batch(tokens[:, :-1], tokens[:, 1:]), 1.0)
        losses.append((float(terms.loss), {k: g.tobytes() for k, g in training.gradients().items()}))
        assert bool(recorder.finish()) == bool(active)
    assert losses[0] == losses[1] == losses[2]


def test_two_recordings_are_equal_to_the_bit(folder, recorded):
    found = compare(recorded, record(subject(folder), steps=2))
    assert found.equal
    assert found.verdict == "pass"
    assert found.headline.endswith("are bit-identical")


def test_samples_and_statistics_agree_with_the_whole(folder, recorded):
    for keep in (SAMPLED, STATISTICS):
        reduced = record(subject(folder), steps=2, keep=keep, sample_size=100)
        recorded.sample_size = 100
        found = compare(recorded, reduced)
        assert found.verdict == ("warn" if keep is STATISTICS else "pass"), found.headline
        assert all(tensor.verdict == "pass" for tensor in found.tensors)
        whole = recorded.tensors["layers.1/attention.q:linear"].values
        part = reduced.tensors["layers.1/attention.q:linear"]
        assert part.statistics.mean == pytest.approx(whole.mean(), abs=1e-6)
        assert part.statistics.rms == pytest.approx(np.sqrt((whole.astype(float) ** 2).mean()), rel=1e-5)
        if part.values is not None:
            np.testing.assert_array_equal(part.values, whole.reshape(-1)[sample_indices(whole.size, 100)])


def test_statistics_of_a_device_are_those_of_the_host(folder, monkeypatch):
    """Where the host cannot read the memory, the device reduces; the order of the records stays."""
    from moeport.backends.torch.ops import TorchOps

    host = record(subject(folder), steps=0, keep=STATISTICS)
    monkeypatch.setattr(TorchOps, "on_host", Ops.on_host)
    device = record(subject(folder), steps=0, keep=STATISTICS)
    assert [*host.tensors] == [*device.tensors]
    reduced = [t for t in host.tensors.values() if t.keep == "statistics" and t.kind in ("activation", "score")]
    assert len(reduced) > 50
    for tensor in reduced:
        other = device.tensors[tensor.name]
        assert replace(other, statistics=None) == replace(tensor, statistics=None)
        assert other.statistics.rms == pytest.approx(tensor.statistics.rms, rel=1e-5)
        assert other.statistics.mean == pytest.approx(tensor.statistics.mean, abs=1e-5 * tensor.statistics.rms)


def test_statistics_are_those_of_the_time_of_recording():
    """A module that works in place changes nothing on record."""
    torch = pytest.importorskip("torch")
    from moeport.backends.torch.ops import TorchOps

    for keep in (STATISTICS, SAMPLED):
        recorder, ops, x = Recorder(keep, sample_size=4), TorchOps(torch.device("cpu")), torch.ones(8)
        recorder.store(ops, "x", "activation", x, None, ())
        x.zero_()
        assert recorder.finish()["x"].statistics.rms == 1


def test_samples_are_the_same_everywhere():
    assert sample_indices(10_000, 8).tolist() == sample_indices(10_000, 8).tolist()
    assert sample_indices(1000, 5).max() < 1000


def test_a_bound_on_samples_holds(folder):
    reduced = record(subject(folder), steps=0, keep=SAMPLED, sample_size=50)
    for tensor in reduced.tensors.values():
        if tensor.kind in SAMPLED and tensor.values is not None:
            assert tensor.values.size <= 50


def test_samples_of_other_sizes_are_refused(folder, recorded):
    recorded.sample_size = 4096
    other = record(subject(folder), steps=0, sample_size=10)
    with pytest.raises(UserError, match="with the same --sample-size"):
        compare(recorded, other)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "soft"])
def test_a_replay_takes_every_decision_of_any_router(folder, name):
    """Other weights choose other experts; with the routing replayed, experts and plans are those of A."""
    router = EXAMPLES[name][0].model_dump(mode="json")
    if name == "sigmoid_bias":
        router |= {"num_groups": 2, "top_groups": 1}
    taken = subject(folder, router=router)
    drawn = subject(folder, router=router, overrides=["training.seed=7"]).params
    specs = build_model(taken.config.model, taken.config.data, taken.vocab_size).parameter_specs()
    other = replace(taken, params=taken.params | {spec.name: drawn[spec.name] for spec in specs if spec.trainable})
    a, free = record(taken, steps=0), record(other, steps=0)
    replayed = record(other, steps=0, replay=a)
    plans = [t.name for t in a.tensors.values() if t.kind == "plan" and "batch" not in t.name]
    decided = routing_differs(a, free)
    assert decided == any((free.tensors[n].values != a.tensors[n].values).any() for n in plans)
    assert decided or name in ("hash", "rre", "random", "forced_balance")  # which look at no activation
    for n in plans:
        np.testing.assert_array_equal(replayed.tensors[n].values, a.tensors[n].values, err_msg=n)


def test_a_replay_needs_whole_decisions(folder):
    reduced = record(subject(folder), steps=0, keep={"decision": "sample"}, sample_size=10)
    with pytest.raises(UserError, match="--keep decision=full"):
        decisions(reduced)


def test_recording_ops_forwards_every_operation():
    own = {name for name in vars(Ops) if not name.startswith("_") and callable(getattr(Ops, name))}
    assert set(PASSIVE) | set(TRANSPARENT) <= own
    ops = RecordingOps(NumpyOps(), Recorder())
    for name in own:
        assert getattr(type(ops), name) is not getattr(Ops, name), name


def test_attributes_of_the_backend_are_reached():
    torch = pytest.importorskip("torch")
    from moeport.backends.torch.ops import TorchOps

    assert RecordingOps(TorchOps(torch.device("cpu")), Recorder()).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("spec", "overrides"),
    [
        ("numpy", ["backend.name=numpy", "backend.device=cpu", "backend.dtype=float32"]),
        ("torch-cuda:bf16", ["backend.name=torch", "backend.device=cuda", "backend.dtype=bfloat16"]),
        ("torch:float64", ["backend.name=torch", "backend.device=cpu", "backend.dtype=float64"]),
    ],
)
def test_variants(spec, overrides):
    assert Variant.parse(spec).config_overrides == overrides
    more = Variant.parse(f"{spec} backend.compile=true  a.b=1")
    assert more.config_overrides == [*overrides, "backend.compile=true", "a.b=1"]


@pytest.mark.parametrize(("spec", "nodes", "ranks"), [("torch", 1, 1), ("torch-cpu:fp64@4", 1, 4), ("torch@2x3", 2, 6)])
def test_ranks_of_variants(spec, nodes, ranks):
    variant = Variant.parse(spec)
    assert (variant.nodes, variant.ranks) == (nodes, ranks)
    assert variant.config_overrides == Variant.parse(spec.partition("@")[0]).config_overrides


@pytest.mark.parametrize("spec", ["", "jax", "torch-cpu:fp8", "torch@", "torch@0", "torch@2x", "torch@2:fp64"])
def test_what_is_no_variant(spec):
    with pytest.raises(UserError, match=r"expected BACKEND\[-DEVICE\]\[:DTYPE\]"):
        Variant.parse(spec)


def test_compiled_or_recomputed_blocks_show_their_outputs(folder):
    taken = subject(folder, overrides=["training.activation_checkpointing=true"])
    found = compare(record(subject(folder), steps=2), record(taken, steps=2))
    assert found.verdict == "pass", found.headline
    assert any("inside of blocks not recorded" in note for note in found.notes)
    names = [tensor.name for tensor in found.tensors]
    assert "layers.1:output" in names
    assert "layers.1:attention" not in names
    assert any(name.startswith("gradient:") for name in names)


def test_a_fused_routed_mlp_is_recorded_beside_its_parts(folder):
    """Its own result flows on, so that a fault of the fused form is named as one."""
    from moeport.backends.torch.ops import TorchOps
    from tests.parity.faults import faulty_ops

    def fused(self, *args):
        return TorchOps.routed_mlp(self, *args) * (1.25 if self.calls("routed") else 1.0)

    plain = record(subject(folder, overrides=["backend.kernels=default"]), steps=0)
    faulty = record(faulty_ops(routed_mlp=fused)(subject(folder)), steps=0)
    assert "layers.1/moe.experts:routed_mlp" not in plain.tensors
    (a, b), name = (plain.tensors, faulty.tensors), "layers.1/moe.experts:routed_mlp"
    np.testing.assert_array_equal(b["layers.1:unpermute"].values, a["layers.1:unpermute"].values)
    np.testing.assert_array_equal(b[name].values, b["layers.1:unpermute"].values * np.float32(1.25))
    assert {"parameter:layers.1.moe.experts.w_in", "layers.1/moe.router:linear.x"} <= set(b[name].inputs)
