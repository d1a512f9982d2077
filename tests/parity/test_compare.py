"""Verdicts on recordings made by hand, one rule each."""

from dataclasses import replace

import numpy as np
import pytest

from moeport.errors import UserError
from moeport.parity.compare import compare
from moeport.parity.recording import Recording, Statistics, Step, TensorRecord
from moeport.parity.result import Report
from moeport.parity.text import markdown
from tests.support import rng


def tensor(name, values, kind="activation", dtype="float32", op="linear", inputs=()):
    values = np.asarray(values)
    return TensorRecord(name, kind, dtype, values.shape, op=op, inputs=inputs, values=values)


def recording(*tensors, dtype="float32", name="x", **fields):
    return Recording(name, dtype, {t.name: t for t in tensors}, **fields)


def one(a, b, golden=None, **fields):
    """The result of one tensor that is `a` on one side and `b` on the other."""
    sides = [recording(tensor("t", x, **fields), tensor("loss", [1.0], kind="loss")) for x in (a, b)]
    exact = recording(tensor("t", golden, **fields), dtype="float64") if golden is not None else None
    return compare(*sides, golden=exact).tensors[0]


X = rng(0).standard_normal((40, 50))
NOISE = rng(1).standard_normal((40, 50))


@pytest.mark.parametrize(
    ("kind", "limit"), [("activation", 2e-5), ("score", 2e-5), ("gradient", 5e-5), ("parameter", 2**-23)]
)
def test_the_limit_of_a_kind(kind, limit):
    error = limit * np.linalg.norm(X) / np.linalg.norm(NOISE)
    assert one(X, X + 0.99 * error * NOISE, kind=kind).verdict != "fail"
    failed = one(X, X + 1.01 * error * NOISE, kind=kind)
    assert (failed.verdict, failed.limit) == ("fail", limit)
    assert failed.error == pytest.approx(1.01 * limit)
    assert failed.histogram


def test_the_coarser_type_decides():
    a, b = recording(tensor("t", X)), recording(tensor("t", X + 0.01 * NOISE, dtype="bfloat16"), dtype="bfloat16")
    assert compare(a, b).verdict == compare(b, a).verdict == "pass"
    assert compare(a, recording(tensor("t", X + 0.01 * NOISE))).verdict == "fail"


def test_the_double_benchmark_passes_what_is_no_further_from_the_golden():
    a, b = X + 1e-4 * NOISE, X - 1e-4 * NOISE
    assert one(a, b).verdict == "fail"
    found = one(a, b, golden=X)
    assert found.verdict == "pass"
    assert "double benchmark" in found.reason
    assert found.golden.ratio_rms == pytest.approx(1)
    assert one(X + 1e-6 * NOISE, b, golden=X).verdict == "fail"


def test_the_double_benchmark_warns_before_the_limit():
    a, b = X + 1e-6 * NOISE, X + 8e-6 * NOISE
    assert one(a, b).verdict == "pass"
    found = one(a, b, golden=X)
    assert found.verdict == "warn"
    assert "times as far from the golden as A" in found.reason


def test_the_thousandth_rule_warns():
    """Entries that are near zero, but not small, are off; together they weigh little."""
    b = X.copy()
    near_zero = (np.abs(X) < 0.02) & (np.abs(X) > 0.0101)
    assert near_zero.mean() > 0.002
    b[near_zero] *= 1.002
    found = one(X, b)
    assert found.verdict == "warn"
    assert "relative error above 0.001" in found.reason


def test_what_is_not_finite_on_one_side():
    b = X.copy()
    b[3, 4] = np.nan
    found = compare(recording(tensor("t", X)), recording(tensor("t", b)))
    assert found.tensors[0].reason == "NaN or infinity in B, not at the same positions"
    assert found.headline.startswith("FAIL t: ")
    assert found.verdict == "fail"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_on_both_sides_is_no_pass(value):
    b = X.copy()
    b[3, 4] = value
    for keep in ("full", "statistics"):
        x = tensor("t", b)
        if keep == "statistics":
            x = replace(x, keep=keep, values=None, statistics=Statistics(float(b.mean()), abs(value)))
        found = compare(recording(x, tensor("u", X)), recording(x, tensor("u", X)))
        assert found.verdict == "warn"
        assert found.headline.startswith("WARN x (B) against x (A): t: ")
        assert "on both sides" in found.headline


def test_minus_infinity_may_be_a_mask():
    masked = X.copy()
    masked[3, 4] = -np.inf
    found = compare(*[recording(tensor("t", masked, kind="score"), tensor("u", X))] * 2)
    assert found.verdict == "pass"
    assert "minus infinity on both sides in 1 tensors, first in t" in found.headline
    everywhere = tensor("t", np.full((4, 5), -np.inf), kind="score")
    assert compare(*[recording(everywhere, tensor("u", X))] * 2).verdict == "warn"


def test_a_nan_on_one_side_is_a_fault_even_after_a_flip():
    near = np.array([[1.0, 1.0 + 1e-6], [0.0, 1.0]])
    a = decided([[0], [1]], np.array([[1.0 + 1e-6, 1.0], [0.0, 1.0]]), X)
    found = compare(a, decided([[1], [1]], near, np.full_like(X, np.nan)))
    assert found.headline.startswith("FAIL t: "), found.headline


def test_only_one_side_has_what_is_not_finite():
    a, b = recording(tensor("t", X), name="A"), recording(tensor("t", X), name="B", non_finite="NaN in u")
    assert compare(a, b).headline == "FAIL not finite: only one side has a NaN or an infinity; B: first NaN in u"
    found = compare(replace(a, non_finite="NaN in u"), b)
    assert found.headline == "WARN B against A: not finite on both sides: NaN in u"


def test_shapes():
    assert one(X, X.T).reason == "shape [40, 50] in A, [50, 40] in B"
    assert one(X.reshape(4, 10, 50), X).verdict == "pass"  # (B, S, D) and (B S, D)


def test_a_result_that_cancels_is_judged_by_its_inputs():
    given = tensor("given", X)
    unit = 2.0**-24
    for size, verdict in ((2 * unit, "pass"), (20 * unit, "fail")):
        a, b = (recording(given, tensor("t", x, inputs=("given",))) for x in (1e-9 * X, 1e-9 * X + size * NOISE))
        assert compare(a, b).tensors[1].verdict == verdict


def test_a_gradient_of_one_entry_is_judged_by_all():
    others = tensor("gradient:w", X, kind="gradient")
    for value, verdict in ((1.01e-3, "pass"), (1.1e-3, "fail")):
        a, b = (recording(others, tensor("gradient:s", [x], kind="gradient"), dtype="float32") for x in (1e-3, value))
        assert compare(a, b).tensors[1].verdict == verdict


def test_updates_are_compared_where_gradients_agree():
    """A gradient of the other sign is noise there, and its update is not held against the optimiser."""
    gradient = np.where(np.arange(100) < 5, 1e-9, 1.0)
    turned = np.where(np.arange(100) < 5, -1e-9, 1.0)

    def side(g, update):
        return recording(
            tensor("training gradient:w", g, kind="training gradient"), tensor("update:w", update, kind="update")
        )

    a, b = side(gradient, -np.sign(gradient)), side(turned, -np.sign(turned))
    assert compare(a, b).tensors[1].verdict == "pass"
    found = compare(a, side(gradient, -0.447 * np.sign(gradient)))
    assert found.headline.startswith("FAIL optimiser update of w: gradients agree, updates do not")
    assert "B is 0.447 times A" in found.headline


def test_an_update_is_known_to_the_last_place_of_its_parameter():
    update = np.full(100, 1e-6)
    shifted = update + 6e-8
    parameter = tensor("parameter:w", np.ones(100), kind="parameter")
    near, far = (recording(p, tensor("update:w", update, kind="update")) for p in (parameter, tensor("p", [0.0])))
    with_it, without = (
        recording(p, tensor("update:w", shifted, kind="update")) for p in (parameter, tensor("p", [0.0]))
    )
    assert compare(near, with_it).tensors[1].verdict == "pass"
    assert compare(far, without).tensors[1].verdict == "fail"


def step(number, loss):
    return Step(number, loss, loss, 1.0, 1.0, 0.0, 0.1, [[0.5, 0.5]])


def test_a_trajectory_that_parts():
    a = recording(tensor("t", X), trajectory=[step(1, 5.0), step(2, 4.0)])
    b = recording(tensor("t", X), trajectory=[step(1, 5.0), step(2, 4.1)])
    found = compare(a, b)
    assert found.headline == (
        "FAIL trajectory: the first step agrees, the loss exceeds its tolerance at step 2 (4 and 4.1)"
    )
    assert [s.verdict for s in found.trajectory] == ["pass", "fail"]


def test_nothing_in_common_fails():
    found = compare(recording(tensor("a", X)), recording(tensor("b", X)))
    assert found.headline == "FAIL nothing in common: no tensor of A is in B"
    assert (found.only_a, found.only_b) == (["a"], ["b"])


def test_where_the_computations_part():
    a, b = recording(tensor("t", X), tensor("u", X), name="A"), recording(tensor("t", X), name="B")
    assert "the computations diverge after t: A has u, B does not" in compare(a, b).notes


def test_what_only_one_side_computes_is_named_in_its_place():
    a = recording(tensor("t", X), tensor("u", X, inputs=("t",)), name="A")
    b = recording(tensor("t", X), tensor("extra", X), tensor("u", 2 * X, inputs=("t",)), name="B")
    assert compare(a, b).headline.endswith("only B has extra, between t and u")
    assert compare(b, a).headline.endswith("only A has extra, between t and u")
    found = compare(a, replace(b, tensors=b.tensors | {"u": tensor("u", X)}))
    assert found.headline.startswith("WARN B against A: forward compared in part (2 of 2 tensors of A and of 3 of B; ")
    assert "only B has extra, after t" in found.headline
    assert [(t.name, t.side, t.after) for t in found.one_sided] == [("extra", "B", "t")]
    text = markdown(Report("warn", [found]))
    assert "| forward | partly | 2 | 2 | 3 | 2 of 2 tensors of A" in text
    assert "| B: B | extra | t |" in text
    twice = replace(b, tensors={n.replace("extra", "u#2"): t for n, t in b.tensors.items()})
    assert "only B has u#2, " in compare(a, twice).headline


def test_equal_names_become_distinct():
    found = compare(*[recording(tensor("t", X), name="same")] * 2)
    assert (found.a.name, found.b.name) == ("same (A)", "same (B)")
    assert found.headline == "PASS same (B) against same (A): 1 tensors are bit-identical"


def test_parts_that_are_left_out_are_not_judged():
    a = recording(tensor("t", X), tensor("gradient:w", X, kind="gradient"))
    b = recording(tensor("t", X), tensor("gradient:w", -X, kind="gradient"))
    assert compare(a, b).verdict == "fail"
    found = compare(a, b, parts=["forward", "routing"])
    assert found.verdict == "pass"
    assert {row.part: row.judged for row in found.coverage} == {
        "weights and inputs": "not asked",
        "forward": "judged",
        "routing": "not asked",
        "gradients": "not asked",
        "optimizer": "not asked",
        "trajectory": "not asked",
    }
    with pytest.raises(UserError, match="--parts: unknown part 'loss'; expected some of forward, routing, gradients"):
        compare(a, b, parts=["loss"])


def test_a_golden_far_from_both_sides_excuses_nothing():
    assert one(X, X + 0.1 * NOISE, golden=-X).verdict == "fail"


def test_only_b_with_the_routing_of_a_is_judged_in_its_place():
    """A's own recording in its place would pass whatever B does."""
    a, b = recording(tensor("t", X), name="A"), recording(tensor("t", -X), name="B")
    again = replace(b, replayed="A")
    assert compare(a, b, replayed=again).verdict == "fail"
    environment = {"backend": "other"}
    config = {"optimizer": {"eps": 1}}
    for wrong, says in (
        (a, "followed its own routing"),
        (replace(b, replayed="C"), "followed the routing of C"),
        (replace(again, environment=environment), "another variant than B: backend or type differ"),
        (replace(again, dtype="bfloat16"), "another variant than B"),
    ):
        with pytest.raises(UserError, match=says):
            compare(a, b, replayed=wrong)
    with pytest.raises(UserError, match=r"the configs differ in optimizer.eps \(2, 1\)"):
        compare(a, replace(b, config={"optimizer": {"eps": 2}}), replayed=replace(again, config=config))


def test_steps_that_one_side_lacks_are_not_judged():
    a = recording(tensor("t", X), trajectory=[step(1, 5.0), step(2, 4.0)], name="A")
    found = compare(a, replace(a, name="B", trajectory=a.trajectory[:1]))
    assert found.headline == "WARN B against A: trajectory compared in part (A has 2 steps, B has 1)"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 0.2}, "the learning rate exceeds its tolerance at step 1 (0.1 and 0.2)"),
        ({"total_loss": 6.0}, "the total loss exceeds its tolerance at step 1 (5 and 6)"),
        ({"grad_norm": 1.5}, "the gradient norm exceeds its tolerance at step 1 (1 and 1.5)"),
        ({"loss": float("nan")}, "the loss exceeds its tolerance at step 1 (5 and nan)"),
    ],
)
def test_everything_in_a_step_is_judged(change, says):
    sides = [recording(tensor("t", X), trajectory=[s]) for s in (step(1, 5.0), replace(step(1, 5.0), **change))]
    assert compare(*sides).headline == f"FAIL trajectory: {says}"


def test_only_what_differs_between_the_sides_is_named():
    environments = [
        {"backend": "torch", "device": d, "versions": {"torch": v, "numpy": "2"}, "variables": variables}
        for d, v, variables in (("cpu", "2.1", {}), ("cuda", "2.2", {"OMP_NUM_THREADS": "1"}))
    ]
    configs = [{"model": {"norm_eps": eps, "d_model": 8}, "backend": {"dtype": str(eps)}} for eps in (1e-5, 1e-6)]
    sides = [recording(tensor("t", X), config=c, environment=e) for c, e in zip(configs, environments, strict=True)]
    found = compare(*sides)
    assert [(d.key, d.a, d.b) for d in found.differences] == [
        ("config model.norm_eps", "1e-05", "1e-06"),
        ("device", "cpu", "cuda"),
        ("version torch", "2.1", "2.2"),
        ("variable OMP_NUM_THREADS", "\N{EN DASH}", "1"),
    ]
    assert "| config model.norm_eps | 1e-05 | 1e-06 |" in markdown(Report("pass", [found]))
    assert compare(sides[0], sides[0]).differences == []


@pytest.mark.parametrize(("other", "named"), [("torch", True), ("mindspore", False)])
def test_kernels_are_compared_within_one_backend(other, named):
    sides = [
        recording(tensor("t", X), environment={"backend": backend, "kernels": {"rope": rope}})
        for backend, rope in (("torch", "fused"), (other, "default"))
    ]
    keys = [difference.key for difference in compare(*sides).differences]
    assert ("kernel rope" in keys) == named


def decided(choices, scores, after):
    decision = tensor("d", choices, kind="decision", dtype="int64", op="topk_ids")
    return recording(tensor("d.x", scores, kind="score"), decision, tensor("t", after))


def test_what_follows_a_flip_is_not_judged_without_a_replay():
    a = decided([[0], [1]], np.array([[1.0, 0.9], [0.0, 1.0]]), X)
    b = decided([[0], [1]], np.array([[1.0, 0.9], [0.0, 1.0]]), X)
    assert compare(a, b).equal
    near = np.array([[1.0, 1.0 + 1e-6], [0.0, 1.0]])
    first = decided([[0], [1]], np.array([[1.0 + 1e-6, 1.0], [0.0, 1.0]]), X)
    flipped = decided([[1], [1]], near, -X)
    found = compare(first, flipped)
    assert found.verdict == "warn"
    assert found.tensors[2].reason == "follows a near tie that was decided differently"
    assert any("--replay A" in note for note in found.notes)
    replayed = replace(decided([[1], [1]], near, X), replayed="x")
    found = compare(first, flipped, replayed=replayed)
    assert found.tensors[2].verdict == "pass"
    assert found.tensors[2].free_error == pytest.approx(2)
