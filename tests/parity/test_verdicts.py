"""What is not judged is never a bare pass: training steps, optimisers, keys of the config that differ."""

import functools
from dataclasses import replace
from unittest import mock

import pytest

from moeport.parity.compare import compare, routing_differs
from moeport.parity.record import record
from moeport.parity.subject import Size, build_subject
from tests.parity.faults import under_patch
from tests.parity.tiny import config_file, subject

torch = pytest.importorskip("torch")

FLIPPING = Size(sequences=8, tokens=32, steps=3)
"""So many tokens that some choices flip between float32 and bfloat16."""


def gradients_times(factor):
    """The trainer's gradients, but not those of the recorded pass, are too large."""
    backward = torch.Tensor.backward
    return lambda: mock.patch.object(torch.Tensor, "backward", lambda loss: backward(loss * factor))


def gradients_kept():
    """Gradients are not cleared after a step."""
    from moeport.backends.torch.optimizer import AdamW

    step = AdamW.step

    def keeping(self, learning_rate, norm):
        kept = {name: p.grad.clone() for name, p in self.parameters.items()}
        step(self, learning_rate, norm)
        for name, p in self.parameters.items():
            p.grad = kept[name]

    return mock.patch.object(AdamW, "step", keeping)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verdicts")


def flipping(folder, spec):
    return build_subject(config_file(folder), spec, size=FLIPPING)


@pytest.fixture(scope="module")
def reference(folder):
    return record(flipping(folder, "torch-cpu"), steps=2)


def against(reference, subject, replayed_steps=1):
    """The comparison with the reference, with its routing if choices differ."""
    b = record(subject, steps=2)
    replayed = record(subject, steps=replayed_steps, replay=reference) if routing_differs(reference, b) else None
    assert bool(replayed) == (b.dtype == "bfloat16")
    return compare(reference, b, replayed=replayed)


@pytest.mark.parametrize(
    ("factor", "spec"),
    [
        (8.0, "torch-cpu:bf16"),
        pytest.param(8.0, "torch-cpu", marks=pytest.mark.slow),
        pytest.param(1.5, "torch-cpu:bf16", marks=pytest.mark.slow),
        pytest.param(-1.0, "torch-cpu:bf16", marks=pytest.mark.slow),
    ],
)
def test_a_training_gradient_is_judged_with_and_without_flips(folder, reference, factor, spec):
    found = against(reference, under_patch(flipping(folder, spec), gradients_times(factor)))
    assert found.headline.startswith("FAIL gradient of "), found.headline
    assert "in the optimiser step: the gradients of the pass agree" in found.headline


@pytest.mark.parametrize("spec", ["torch-cpu:bf16", pytest.param("torch-cpu", marks=pytest.mark.slow)])
def test_gradients_that_are_not_cleared_are_found_in_the_second_step(folder, reference, spec):
    found = against(reference, under_patch(flipping(folder, spec), gradients_kept))
    assert found.headline.startswith("FAIL step 2 gradient of "), found.headline


def test_every_part_is_judged_where_choices_flip(folder, reference):
    found = against(reference, flipping(folder, "torch-cpu:bf16"))
    assert found.verdict == "pass", found.headline
    assert {row.judged for row in found.coverage} == {"judged"}


def test_without_a_training_step_in_the_replay_the_step_is_not_judged(folder, reference):
    wrong = under_patch(flipping(folder, "torch-cpu:bf16"), gradients_times(8.0))
    found = against(reference, wrong, replayed_steps=0)
    rows = {row.part: row for row in found.coverage}
    assert found.verdict == "fail"  # by the gradient norm in the trajectory, which needs no routing
    assert rows["optimizer"].judged == "partly"
    assert "follow other routing" in rows["optimizer"].reason


KEYS = {
    "optimizer.beta2=0.999": "FAIL optimiser moment exp_avg_sq of ",
    "optimizer.beta1=0.91": "FAIL optimiser moment exp_avg of ",
    "optimizer.eps=1e-5": "FAIL optimiser update of ",
    "optimizer.eps=1e-9": "FAIL optimiser update of ",
    "optimizer.weight_decay=0.3": "FAIL optimiser update of ",
    "optimizer.learning_rate=0.02": "FAIL trajectory: the learning rate",
    "optimizer.clip_norm=null": "FAIL optimiser moment",
    "optimizer.clip_norm=100": "WARN",
    "optimizer.schedule.warmup_steps=1": "WARN",
    "optimizer.schedule.warmup_steps=2": "FAIL trajectory: the learning rate",
    "optimizer.schedule.name=wsd": "WARN",
    "training.steps=77": "WARN",
    "training.seed=7": "FAIL",
    "model.moe.load_balance.coefficient=0.010000001": "WARN",
}
"""Overrides of one side, and how the first line begins."""
BASE = ("optimizer.beta2=0.95", "optimizer.clip_norm=50", "training.seed=0", "model.moe.load_balance.coefficient=0.01")


@pytest.fixture(scope="module")
def recorded(folder):
    """Recordings by the overrides of the config, from the same weights, which have gradients as small as eps."""
    weights = subject(folder, overrides=["training.seed=1"]).params

    @functools.cache
    def of(*overrides):
        return record(replace(subject(folder, overrides=[*BASE, *overrides]), params=weights, name="other"), steps=3)

    return of


@pytest.mark.parametrize(
    "change",
    [key if i % 3 == 0 else pytest.param(key, marks=pytest.mark.slow) for i, key in enumerate(KEYS)],
)
def test_a_key_of_training_that_differs_is_never_a_bare_pass(recorded, change):
    bites = ("optimizer.clip_norm=0.1",) if change == "optimizer.clip_norm=null" else ()
    found = compare(recorded(*bites), recorded(*bites, change))
    key = change.partition("=")[0]
    assert found.headline.startswith(KEYS[change]), found.headline
    assert key in found.headline or key == "training.seed"
    assert found.verdict != "pass"


MUON = {
    "optimizer.muon.momentum=0.9": "FAIL optimiser moment momentum_buffer of ",
    "optimizer.muon.nesterov=false": "FAIL step 2 update of ",
    "optimizer.muon.adamw_learning_rate=0.02": "FAIL optimiser update of embedding.weight",
    "optimizer.beta2=0.999": "FAIL optimiser moment exp_avg_sq of ",
}
"""As KEYS, with Muon."""


@pytest.mark.parametrize(
    "change", [key if "muon" in key else pytest.param(key, marks=pytest.mark.slow) for key in MUON]
)
def test_keys_of_muon_are_judged_by_its_own_rule(recorded, change):
    muon = ("optimizer.name=muon",)
    found = compare(recorded(*muon), recorded(*muon, change))
    assert found.headline.startswith(MUON[change]), found.headline
    assert change.partition("=")[0] in found.headline


def test_muon_passes_in_bfloat16(folder):
    """From weights of seed 0, which bring no choice near a tie."""
    muon = [*BASE, "optimizer.name=muon"]
    reference = record(subject(folder, overrides=muon), steps=3)
    found = compare(reference, record(subject(folder, "torch-cpu:bf16", overrides=muon), steps=3))
    assert found.verdict == "pass", found.headline


def test_a_hidden_difference_of_the_optimiser_is_found_with_flips(folder, reference):
    """The configs agree; B's optimiser does not do what its config says."""
    from moeport.backends.torch.optimizer import AdamW

    init = AdamW.__init__

    def wrong(self, *args):
        init(self, *args)
        for group in self.optimizer.param_groups:
            group["betas"] = (0.9, 0.999)

    patched = under_patch(flipping(folder, "torch-cpu:bf16"), lambda: mock.patch.object(AdamW, "__init__", wrong))
    found = against(reference, patched)
    assert found.headline.startswith("FAIL optimiser moment exp_avg_sq of "), found.headline
