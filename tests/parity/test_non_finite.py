"""A NaN or an infinity ends neither a recording nor a comparison, and the first tensor that has one is named."""

import math
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from moeport.parity.bundle import load_bundle, save_bundle
from moeport.parity.compare import compare
from moeport.parity.finite import non_finite_in
from moeport.parity.record import record
from moeport.parity.recording import STATISTICS, TensorRecord
from moeport.parity.run import compare_subjects
from tests.parity.faults import faulty_ops, under_patch
from tests.parity.tiny import SIZE, subject

torch = pytest.importorskip("torch")

from moeport.backends.torch.ops import TorchOps  # noqa: E402
from moeport.backends.torch.optimizer import AdamW  # noqa: E402

IN_A_PASS = 2 * 5
"""Calls of `linear` in a pass: q, k, v, out and the router of each block."""
ROUTER = "layers.0.moe.router.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return subject(tmp_path_factory.mktemp("non-finite"))


@pytest.fixture(scope="module")
def whole(tiny):
    return record(tiny, steps=3)


def weight(name, value):
    """One entry of a weight."""

    def change(subject):
        array = subject.params[name].copy()
        array.flat[0] = value
        return replace(subject, params=subject.params | {name: array})

    return change


def linear_from(call, value=math.nan):
    """The output of `linear` from its n-th call on, counted from 0."""

    def linear(self, x, weight):
        y = TorchOps.linear(self, x, weight)
        return y * value if self.calls("linear") >= call else y

    return faulty_ops(linear=linear)


def optimizer_with(**methods):
    @contextmanager
    def patch():
        with mock.patch.multiple(AdamW, **methods):
            yield

    return lambda subject: under_patch(subject, patch)


def infinite_gradient(self, norm=AdamW.gradient_norm):
    self.parameters[ROUTER].grad[0, 0] = math.inf
    return norm(self)


def broken_update(self, rate, norm, step=AdamW.step):
    step(self, rate, norm)
    with torch.no_grad():
        self.parameters[ROUTER][0, 0] = math.nan


def infinite_loss(self, *args):
    loss, *others = TorchOps.linear_cross_entropy(self, *args)
    return (loss * math.inf, *others)


CASES = {
    "weight": (weight("layers.1.attention.q", math.nan), "NaN in parameter layers.1.attention.q (1 of 1024 entries)"),
    "unused weight": (weight("embedding.weight", math.inf), "infinity in parameter embedding.weight (1 of "),
    "router": (weight(ROUTER, math.nan), f"NaN in parameter {ROUTER} (1 of 128 entries)"),
    "activation": (linear_from(2), "NaN in layers.0/attention.v:linear (operation linear, forward pass of step 1, "),
    "overflow": (linear_from(0, math.inf), "in layers.0/attention.q:linear (operation linear, forward pass of step 1"),
    "gradient": (
        optimizer_with(gradient_norm=infinite_gradient),
        f"infinity in gradient of {ROUTER} (optimiser step 1",
    ),
    "update": (optimizer_with(step=broken_update), f"NaN in optimiser update of {ROUTER} (optimiser step 1, 1 of 128"),
    "loss": (faulty_ops(linear_cross_entropy=infinite_loss), "infinity in lm_head:linear_cross_entropy[0]"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_kept_and_named(tiny, whole, case, tmp_path):
    change, says = CASES[case]
    broken = replace(change(tiny), name="broken")
    recording = record(broken, steps=3)
    assert recording.non_finite, case
    assert says in recording.non_finite
    assert recording.tensors
    save_bundle(recording, tmp_path / "bundle")
    assert load_bundle(tmp_path / "bundle").non_finite == recording.non_finite
    found = compare(recording, whole)
    assert found.verdict == "fail", found.headline
    assert f"broken: the first {recording.non_finite}" in found.notes
    assert f"first {recording.non_finite}" in found.headline
    both = compare(recording, recording)
    assert both.verdict != "pass"
    assert "on both sides" in both.headline


@pytest.mark.parametrize("case", ["gradient", "update", "loss"])
def test_what_is_kept_in_part_is_searched(tiny, case):
    change, says = CASES[case]
    assert says in record(change(tiny), steps=2, keep=STATISTICS).non_finite


def test_a_later_step(tiny):
    """The steps before it are kept, and the pass of the step that failed is searched."""
    assert record(tiny, steps=1).non_finite is None
    broken = linear_from(IN_A_PASS * 3 + 1)(tiny)
    recording = record(broken, steps=5)
    assert [math.isfinite(step.loss) for step in recording.trajectory] == [True, True, False]
    assert "(operation linear, forward pass of step 3, " in recording.non_finite
    (found,) = compare_subjects((tiny, replace(broken, name="broken")), steps=5).comparisons
    assert found.verdict == "fail"


def test_without_gradients_and_in_micro_batches(tmp_path):
    broken = weight("layers.1.attention.q", math.nan)
    assert "parameter layers.1.attention.q" in record(broken(subject(tmp_path, "numpy")), steps=1).non_finite
    divided = subject(tmp_path, size=replace(SIZE, micro_batches=2))

    def values(self, x, weight):
        y = TorchOps.linear(self, x, weight)
        return y * math.nan if self.calls("linear") % IN_A_PASS == 2 else y

    found = record(faulty_ops(linear=values)(divided), steps=1).non_finite
    assert found.startswith("NaN in layers.0/attention.v:linear (operation linear, ")


def test_minus_infinity_may_be_a_mask():
    values = np.array([1.0, -np.inf], np.float32)
    masked = TensorRecord("x", "score", "float32", (2,), op="where", values=values)
    assert non_finite_in(masked) is None
    assert non_finite_in(replace(masked, kind="loss"))
    assert non_finite_in(replace(masked, values=-values))
    assert non_finite_in(replace(masked, kind="activation", op="linear")).count == 1


def test_masks_of_a_router_are_no_fault(tmp_path):
    router = {"name": "sigmoid_bias", "top_k": 1, "num_groups": 2, "top_groups": 1}
    assert record(subject(tmp_path, router=router), steps=1).non_finite is None
