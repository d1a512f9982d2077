"""The benchmark of one layer on small sizes: who takes part, what is compared, what is written; no timing is judged."""

import json
import math
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import moe_layer  # noqa: E402
from contest.child import Terms, check  # noqa: E402
from contest.clock import held_bytes, host_waits  # noqa: E402
from contest.contender import Contender, Layer  # noqa: E402
from contest.contenders import contenders  # noqa: E402
from contest.contest import Contest, cell  # noqa: E402
from contest.output import table  # noqa: E402
from contest.problem import draw, draw_decided, loads, reference  # noqa: E402
from contest.shapes import SHAPES, Shape, curve  # noqa: E402

SMALL = Shape("small", 24, 16, 4, 2, 8)
EXACT = Terms("cpu", torch.float32, rounds=2)


def test_the_reference_is_the_sum_over_chosen_experts():
    problem = draw_decided(SMALL, "cpu", torch.float32)
    x_D, router, w_in, w_out = (
        each.detach().double().numpy() for each in (problem.x_TD[3], problem.router, problem.w_in, problem.w_out)
    )
    probability_E = np.exp(router @ x_D) / np.exp(router @ x_D).sum()
    chosen = np.argsort(-probability_E)[:2]
    want = 0
    for expert in chosen:
        gate, up = np.split(w_in[expert] @ x_D, 2)
        share = probability_E[expert] / probability_E[chosen].sum()
        want = want + share * (w_out[expert] @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(reference(problem)[0][3], want, rtol=1e-5, atol=1e-6)


def installed():
    """Other projects take seconds to import."""
    for each in contenders("cpu").values():
        if each.group != "limit" and not each.missing("cpu", torch.float32):
            yield pytest.param(each, id=each.name, marks=[pytest.mark.slow] if each.packages else [])


@pytest.mark.parametrize("contender", list(installed()))
def test_what_is_installed_computes_the_reference_or_says_why_not(contender):
    verdict = check(contender, SHAPES["tiny"], EXACT)
    assert "reason" not in verdict, verdict
    assert verdict.get("differs") or verdict["error"] < 1e-5


def wrong_router(problem):
    layer = contenders("cpu")["moeport default"].build(problem)
    return Layer(layer.run, layer.parameters, lambda found: [*found[:2], 2 * found[2]])


def test_a_wrong_gradient_is_found_and_named():
    verdict = check(Contender("wrong", wrong_router), SMALL, EXACT)
    assert verdict["reason"].startswith("wrong: router off by 1.0e+00")


def nothing(problem):
    return Layer(lambda x_TD: x_TD * float("nan"), problem.weights)


def test_a_contender_that_fails_is_listed_and_the_others_are_timed():
    found = cell(
        Contest([SMALL], EXACT, 60),
        SMALL,
        {"fails": Contender("fails", nothing), "moeport": contenders("cpu")["moeport default"]},
        None,
        math.inf,
        math.inf,
    )
    assert "not have been used in the graph" in found["rows"]["fails"]["reason"]
    assert len(found["rows"]["moeport"]["both_ms"]) == 2


@pytest.mark.parametrize(("times", "is_timed"), [(2.2, False), (2.3, True)])
def test_who_copies_the_weights_is_left_out_where_that_leaves_no_room(monkeypatch, times, is_timed):
    weights = sum(x.nbytes for x in draw(SMALL, "cpu", torch.float32).weights)
    monkeypatch.setattr("contest.child.free_bytes", lambda device: times * weights)
    build = contenders("cpu")["moeport default"].build
    chosen = {"copies": Contender("copies", build, copies=True), "shares": Contender("shares", build)}
    rows = cell(Contest([SMALL], EXACT, 60), SMALL, chosen, None, math.inf, math.inf)["rows"]
    assert rows["copies"].get("reason", "") == (
        "" if is_timed else "no room for its copy of the weights beside the others"
    )
    assert len(rows["copies"]["both_ms"]) == 2 * is_timed
    assert len(rows["shares"]["both_ms"]) == 2


def test_zipf_loads_grow_with_the_exponent_and_leave_weights_in_their_shape():
    shape = Shape("", 4096, 32, 16, 2, 8)
    busiest = [int(loads(draw(Shape(**shape.as_dict() | {"zipf": s}), "cpu", torch.float32)).max()) for s in (0, 1, 2)]
    assert busiest[0] < busiest[1] < busiest[2] <= 4096
    assert busiest[0] < 2 * 4096 * 2 / 16


def test_bytes_held_and_waits_are_counted():
    x = torch.ones(8, 4, requires_grad=True)
    w = torch.ones(4, 4, requires_grad=True)
    assert held_bytes(lambda x: (x @ w).exp(), x, [w]) == 2 * 8 * 4 * 4  # the tokens, and what exp returned
    assert host_waits(lambda: (x.sum().item(), x.detach().tolist(), x.nonzero(), x @ w), "cpu") == 3


def test_least_held_is_tokens_preactivations_gates_and_indices():
    assert SHAPES["qwen3"].least_held(2) / 2**30 == pytest.approx(0.4385, abs=1e-3)


def test_a_curve_changes_one_size():
    points = curve(SHAPES["tiny"], "top_k")
    assert [each.top_k for each in points] == [1, 2, 4]
    assert {(each.tokens, each.experts, each.hidden) for each in points} == {(128, 8, 64)}


def test_the_whole_benchmark_writes_table_json_and_plot(tmp_path, capsys):
    """Two contenders, in this process; a package that is missing is listed."""
    options = ["--device=cpu", "--tiny", "--shapes=tiny", "--only=moeport default,sonic", "--dtype=float32"]
    found = moe_layer.main([*options, "--zipf=0,1", f"--out={tmp_path}"])
    assert [each["shape"]["zipf"] for each in found["cells"]] == [0, 1]
    for each in found["cells"]:
        assert set(each["rows"]) == {"dense MLP", "large product", "moeport default"}
        assert len(each["rows"]["moeport default"]["both_ms"]) == 3
    assert found["checks"]["SonicMoE"]["reason"] in ("sonicmoe not installed", "runs on cuda only")
    assert json.loads((tmp_path / "layer.json").read_text()) == found
    assert (tmp_path / "layer.md").read_text() == table(found)
    assert "tiny Zipf(1)" in capsys.readouterr().out
    assert "moeport default" in (tmp_path / "layer.svg").read_text()


class Breaks:
    """A process that ends while `bad` is at work, if that takes part."""

    jobs: ClassVar = []

    def __init__(self, script, job, folder, name):
        self.names = list(job["contenders"])
        self.jobs.append(self.names)

    def wait(self, until):
        return "exit code -6: illegal access" if "bad" in self.names else None

    def result(self):
        return {"rows": {name: {"both_ms": [1.0]} for name in self.names}, "at": "bad" if "bad" in self.names else None}


def test_a_contender_that_breaks_the_device_is_left_out_and_the_others_start_again(monkeypatch):
    monkeypatch.setattr("contest.contest.Process", Breaks)
    passed = {name: Contender(name, nothing) for name in ("good", "bad", "better")}
    found = cell(Contest([SMALL], EXACT, 60, isolate=True), SMALL, passed, None, math.inf, math.inf)
    assert Breaks.jobs == [["good", "bad", "better"], ["good", "better"]]
    assert found["rows"]["bad"]["reason"] == "exit code -6: illegal access"
    assert found["rows"]["better"]["both_ms"] == [1.0]
    assert "reason" not in found


@pytest.mark.slow
def test_in_processes_of_their_own_the_results_are_the_same_kind(tmp_path):
    options = ["--device=cpu", "--tiny", "--shapes=tiny", "--only=moeport default", "--dtype=float32", "--isolate"]
    found = moe_layer.main([*options, "--curve=tokens", f"--out={tmp_path}"])
    assert [len(each["rows"]["moeport default"]["both_ms"]) for each in found["cells"]] == [3] * 5
    assert found["checks"]["moeport default"]["error"] < 1e-5
    assert "polyline" in (tmp_path / "layer.svg").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shapes=olmo", "--shapes: olmo: unknown; expected some of mixtral, olmoe"),
        ("--only=moeport,=plain", "--only: =plain: in no name; names are dense MLP, large product, moeport,"),
    ],
)
def test_what_is_unknown_is_refused(option, message):
    with pytest.raises(SystemExit, match=message):
        moe_layer.main([option, "--device=cpu"])
