"""`moeport inspect`: every figure against a direct, slow computation, and the walk against the whole model."""

import json
import sys
from collections import Counter
from dataclasses import replace
from html import unescape
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from moeport.cli.main import main
from moeport.config.model import CapacityConfig
from moeport.data.tokenizer import ByteTokenizer, name_of
from moeport.errors import UserError
from moeport.studies.inspect.counts import count
from moeport.studies.inspect.figures import sections
from moeport.studies.inspect.geometry import first_choices, geometry
from moeport.studies.inspect.inspect import Robustness, inspect_run
from moeport.studies.inspect.opened import open_run, with_capacity
from moeport.studies.inspect.options import Options
from moeport.studies.inspect.readings import READINGS
from moeport.studies.inspect.text import headlines
from moeport.studies.inspect.texts import file_portions
from moeport.studies.inspect.walk import Walk
from moeport.training.routing_spread import overlap, spread
from moeport.training.run import train
from tests.studies.inspected import CAPACITY, LENGTH, MODELS, Example
from tests.training.tiny import tiny_config

NUMPY = Options(backend="numpy", least=8)
ROUTING = replace(NUMPY, compared=0, robustness=False)
"""Only what the routers do."""


def command(monkeypatch, capsys, *arguments):
    """(exit code, output, errors) of `moeport inspect`."""
    monkeypatch.setattr(sys, "argv", ["moeport", "inspect", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


@pytest.fixture(params=MODELS)
def example(tmp_path, request):
    return Example(tmp_path, MODELS[request.param])


@pytest.fixture
def dropping(tmp_path):
    return Example(tmp_path, MODELS["position"])


def test_the_walk_is_what_the_whole_model_does(example):
    walk = example.walk()
    layers, model = list(walk), example.backend.evaluation_model(example.lm, example.params)
    assert [layer.name for layer in layers] == example.lm.config.moe_layer_names
    for number, each in enumerate(example.portions):
        terms = model.evaluate(each.batch)
        for layer, chosen_E, served_E in zip(layers, terms.chosen_LE, terms.served_LE, strict=True):
            routed, experts = layer.routed[number], layer.num_experts
            assert np.bincount(routed.expert_N, minlength=experts)[:experts].tolist() == chosen_E.tolist()
            served = np.bincount(routed.expert_N[routed.served_N], minlength=experts)
            assert served.tolist() == served_E.tolist()
    nats = [model.token_losses(each.batch).reshape(-1) for each in example.portions]
    np.testing.assert_allclose(walk.nats(), np.concatenate(nats), rtol=1e-5)


@pytest.mark.parametrize("name", ["torch", "mindspore"])
def test_backends_choose_alike(tmp_path, name):
    pytest.importorskip(name)
    examples = [Example(tmp_path, MODELS["position"], backend) for backend in ("numpy", name)]
    for ours, others in zip(*(example.walk() for example in examples), strict=True):
        for a, b in zip(ours.routed, others.routed, strict=True):
            assert (a.expert_N == b.expert_N).mean() > 0.98  # but for near ties
            assert a.capacity == b.capacity == LENGTH
            np.testing.assert_allclose(a.probs_TE, b.probs_TE, rtol=1e-3, atol=1e-4)


def test_one_block_is_read_at_a_time(dropping):
    """In the order of the blocks: weights of a later block are not read before the earlier ones are done."""
    read = []

    class Noting(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    walk = Walk(dropping.lm, Noting(dropping.params), dropping.backend, dropping.portions)
    for number, _ in enumerate(walk):
        assert {name.split(".")[1] for name in read if name.startswith("layers.")} == {str(number)}
        read.clear()


def test_counts_are_those_of_a_loop(example):
    edges = example.keys.edges
    for layer in example.walk():
        made, lost = Counter(), Counter()
        for routed in layer.routed:
            ids, dataset = routed.portion.batch.token_BS.reshape(-1), routed.portion.dataset
            for token, expert, served in zip(routed.token_N, routed.expert_N, routed.served_N, strict=True):
                if expert == layer.num_experts:
                    continue
                place = next(i for i, (a, b) in enumerate(pairwise(edges)) if a <= token % LENGTH < b)
                for key in (("id", ids[token]), ("place", place), ("set", dataset)):
                    made[(*key, expert)] += 1
                    lost[key] += not served
        found = count(layer, example.keys)
        tables = {"id": found.id_XE, "place": found.position_PE, "set": found.dataset_YE}
        rows = {"id": example.keys.id_X.tolist(), "place": range(len(edges) - 1), "set": ["prose", "code"]}
        for kind, table in tables.items():
            expected = [[made[(kind, row, expert)] for expert in range(layer.num_experts)] for row in rows[kind]]
            assert table.tolist() == expected
        assert found.dropped_P.tolist() == [lost["place", place] for place in rows["place"]]
        assert found.dropped_Y.tolist() == [lost["set", name] for name in rows["set"]]
        assert found.drop_rate == pytest.approx(sum(found.dropped_P) / sum(found.load))


def test_a_capacity_of_one_place_for_all_drops_the_later_ones(dropping):
    """Of the assignments that have no room, each comes after all that its expert serves of the same choice."""
    for layer in dropping.walk():
        for routed in layer.routed:
            assert routed.capacity == LENGTH  # 48 tokens, two choices, 4 experts
            for expert in range(layer.num_experts):
                chosen_K = np.flatnonzero(routed.expert_N == expert)
                order = sorted(chosen_K, key=lambda n: (n % 2, n // 2))
                assert routed.served_N[order].tolist() == [place < LENGTH for place in range(len(order))]


def test_spread_is_the_deviation_of_shares():
    count_RE = np.array([[4, 0, 0, 0], [1, 1, 1, 1], [8, 8, 0, 0], [1, 0, 0, 0]])
    found = spread(count_RE, least=4)
    assert found.rows.tolist() == [0, 1, 2]
    expected = [np.sqrt(((np.array(row) / sum(row) - 1 / 4) ** 2).mean()) for row in count_RE[:3].tolist()]
    np.testing.assert_allclose(found.deviation, expected)
    assert found.mean == pytest.approx(np.mean(expected))
    assert np.isnan(spread(count_RE, least=100).mean)


def test_chance_is_what_a_simulation_gives():
    """The root of the mean square, over 4000 draws of 200 assignments."""
    shares = np.array([0.5, 0.2, 0.2, 0.1])
    drawn = np.random.default_rng(0).multinomial(200, shares, 4000)
    found = spread(drawn, least=1)
    assert found.chance == pytest.approx(np.sqrt((found.deviation**2).mean()), rel=0.01)


def test_overlap_is_the_sum_of_the_smaller_shares():
    a, b = np.array([[2, 2], [6, 0], [1, 0]]), np.array([[4, 0], [3, 3], [0, 1]])
    assert overlap(a, b, least=4) == pytest.approx((4 * 0.5 + 6 * 0.5) / 10)
    assert overlap(a, a, least=1) == pytest.approx(1)
    assert overlap(a, b, least=1) == pytest.approx((4 * 0.5 + 6 * 0.5 + 0) / 11)
    assert np.isnan(overlap(a, b, least=7))


def test_separation_is_that_of_a_loop_and_of_scikit_learn(example):
    metrics = pytest.importorskip("sklearn.metrics")
    for layer in example.walk():
        groups = {}
        for routed in layer.routed:
            for token, expert in zip(*first_choices(routed, layer.num_experts), strict=True):
                groups.setdefault(int(expert), []).append(routed.x_TD[token].astype(np.float64))
        everything = np.concatenate(list(groups.values()))
        between = sum(len(x) * ((np.mean(x, 0) - everything.mean(0)) ** 2).sum() for x in groups.values())
        within = sum(((x - np.mean(x, 0)) ** 2).sum() for x in groups.values())
        found = geometry(layer).separation
        assert found == pytest.approx(between / within, rel=1e-6)
        labels = np.repeat(list(groups), [len(x) for x in groups.values()])
        n, k = len(labels), len(groups)
        assert found == pytest.approx(metrics.calinski_harabasz_score(everything, labels) * (k - 1) / (n - k), rel=1e-6)


def test_first_choices_are_the_first_of_each_token(example):
    for layer in example.walk():
        for routed in layer.routed:
            best = {}
            for token, expert in zip(routed.token_N.tolist(), routed.expert_N.tolist(), strict=True):
                if expert < layer.num_experts:
                    best.setdefault(token, []).append(expert)
            if (np.diff(routed.token_N) < 0).any():  # experts chose
                best = {token: [max(among, key=lambda e: routed.probs_TE[token, e])] for token, among in best.items()}
            tokens, experts = first_choices(routed, layer.num_experts)
            assert dict(zip(tokens.tolist(), experts.tolist(), strict=True)) == {t: e[0] for t, e in best.items()}


def test_angles_are_those_between_vectors(dropping):
    for number, layer in enumerate(dropping.walk()):
        own, others = [], []
        for routed in layer.routed:
            for token, x_D in enumerate(routed.x_TD):
                for expert, row_D in enumerate(dropping.params[f"layers.{number}.moe.router.weight"]):
                    angle = np.degrees(np.arccos(x_D @ row_D / np.linalg.norm(x_D) / np.linalg.norm(row_D)))
                    (own if expert == routed.expert_N[2 * token] else others).append(angle)
        found = geometry(layer)
        assert (found.own_angle, found.other_angle) == pytest.approx((np.mean(own), np.mean(others)), abs=1e-3)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("inspect"), model={"moe": {"capacity": CAPACITY}})
    train(config, console=Console(quiet=True))
    return config.run.dir


def test_tokens_are_dropped_towards_the_end_by_position_but_not_by_probability(run_dir):
    """The trained run with either policy, on the same text and with the same capacity."""
    ends = {}
    for policy in ("position", "probability"):
        found = inspect_run(run_dir, replace(ROUTING, checkpoints=1, drop=policy))
        made_P = np.sum([layer.counts.position_PE.sum(1) for layer in found.layers], axis=0)
        lost_P = np.sum([layer.counts.dropped_P for layer in found.layers], axis=0)
        quarters = lost_P.reshape(4, -1).sum(1) / made_P.reshape(4, -1).sum(1)
        ends[policy] = quarters[-1] - quarters[0]
        assert lost_P.sum() > 0
    assert ends["position"] > 0.3
    assert abs(ends["probability"]) < 0.1


def test_checkpoints_are_compared_with_the_inspected_one(run_dir):
    found = inspect_run(run_dir, replace(ROUTING, checkpoints=3))
    assert [each.step for each in found.history] == [1, 3, 6]
    assert found.history[-1].overlap == pytest.approx([1, 1])
    first = inspect_run(run_dir, replace(ROUTING, checkpoint="step-1"))
    assert (first.history, first.step) == ([], 1)
    for number, (one, last) in enumerate(zip(first.layers, found.layers, strict=True)):
        expected = overlap(last.counts.id_XE, one.counts.id_XE, NUMPY.least)
        assert found.history[0].overlap[number] == pytest.approx(expected)
        assert found.history[0].geometry[number] == one.geometry


def test_top_ids_are_those_of_highest_share(run_dir):
    found = inspect_run(run_dir, replace(ROUTING, checkpoints=1))
    for layer in found.layers:
        counts = layer.counts.id_XE
        for expert, top in enumerate(layer.top_ids):
            shares = [row[expert] / row.sum() for row in counts if row.sum() >= NUMPY.least and row[expert]]
            assert [each.share for each in top] == pytest.approx(sorted(shares, reverse=True)[:8])
            for each in top:
                row = counts[found.keys.id_X.tolist().index(ord(eval(each.text)))]
                assert (each.share, each.count) == (row[expert] / row.sum(), row.sum())


def test_ids_that_are_no_whole_characters_are_named_by_number():
    byte = "é".encode()[0]
    names = [name_of(ByteTokenizer(), number) for number in (ord("a"), ord("\n"), byte)]
    assert names == ["'a'", r"'\n'", f"id {byte}"]


def test_the_page_and_the_json_say_the_same(run_dir, tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("def f(x):\n    return x\n" * 40)
    (texts / "b.md").write_text("# A title\n\nand some words of text.\n" * 40)
    page, numbers = tmp_path / "page.html", tmp_path / "found.json"
    options = ["--backend", "numpy", "--least", "8", "--checkpoints", "2", "--output", page]
    code, printed, _ = command(monkeypatch, capsys, run_dir, "--text", texts, *options, "--json", numbers)
    found, html = json.loads(numbers.read_text()), unescape(page.read_text())
    assert code == 0
    assert found["datasets"] == [".txt", ".md"]
    assert f"{found['robustness']['loss_without']:.4f}" in html
    assert [each["step"] for each in found["checkpoints"]] == [1, 6]
    for layer in found["layers"]:
        rates = [f"{rate:.1%}" for rate in (layer["drop_rate"], *layer["drop_rate_by_dataset"])]
        assert all(rate in html for rate in rates)
        assert f"{layer['drop_rate']:.1%}" in printed
        assert f"{layer['spread_by_id']['mean']:.3f}" in html
    for reading in READINGS.values():
        assert reading.title in html
        assert reading.source in html
    assert "://" not in html


def test_sections_without_figures_are_left_out(run_dir):
    """A single checkpoint and a single dataset."""
    titles = [each.reading.title for each in sections(inspect_run(run_dir, replace(NUMPY, checkpoints=1)))]
    missing = {"datasets", "dataset_drops", "early", "separation", "angles"}
    assert titles == [reading.title for key, reading in READINGS.items() if key not in missing]


def test_headlines_have_a_sign_and_are_numbers(run_dir):
    """A loss that falls without first choices, and a layer with one group of tokens."""
    found = inspect_run(run_dir, replace(ROUTING, checkpoints=1))
    alone = [replace(layer, geometry=replace(layer.geometry, separation=float("nan"))) for layer in found.layers]
    for without, shown in ((1.5, "-0.50"), (2.25, "+0.25"), (1.9999, "+0.00")):
        made = headlines(replace(found, layers=alone, robustness=Robustness(2.0, without)))
        values = {each.label: each.value for each in made}
        assert values["Loss without first choices"] == shown
        assert "Separation CH" not in values


def test_a_dataset_without_assignments_has_no_drop_rate(run_dir):
    found = inspect_run(run_dir, replace(ROUTING, checkpoints=1))
    layers = []
    for layer in found.layers:
        load_E, lost = layer.counts.load, layer.counts.dropped_P.sum()
        sets = {"dataset_YE": np.stack([load_E, 0 * load_E]), "dropped_Y": np.array([lost, 0])}
        layers.append(replace(layer, counts=replace(layer.counts, **sets)))
    two = replace(found, keys=replace(found.keys, datasets=("some", "none")), layers=layers)
    (table,) = next(each for each in sections(two) if each.key == "dataset_drops").tables
    assert [[str(cell) for cell in row][1:] for row in table.rows] == [
        [f"{layer.counts.drop_rate:.1%}", "-"] for layer in layers
    ]


def test_text_files_are_packed_between_ends_of_text(run_dir, tmp_path):
    opened = open_run(run_dir, NUMPY)
    (tmp_path / "a.txt").write_text("abc")
    (only,), left_out = file_portions([str(tmp_path / "a.txt")], opened.tokenizer, opened.config, 1000, 1)
    end = opened.tokenizer.end_of_text
    assert only.batch.token_BS.tolist() == [[end, *b"abc"]]
    assert only.batch.target_BS.tolist() == [[*b"abc", end]]
    assert left_out == []
    (tmp_path / "empty.txt").write_text("")
    paths = [str(tmp_path / name) for name in ("a.txt", "empty.txt")]
    found, left_out = file_portions(paths, opened.tokenizer, opened.config, 1000, 1)
    assert [each.dataset for each in found] == paths[:1]
    assert left_out == [f"--text: there is no text in {paths[1]}"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--drop", "oldest"), "--drop oldest: is not a drop policy of this command; expected one of position, pro"),
        (("--backend", "nothing"), "--backend nothing: is not a backend; expected one of "),
        (("--output", "page.pdf"), "--output page.pdf: expected a name that ends in .html"),
        (("--text", "missing.txt"), "--text: no file matches 'missing.txt'"),
        (("--checkpoint", "step-99"), "there is no checkpoint step-99"),
        (("--factor", "1e300"), "Invalid value for '--factor': Input should be less than or equal to 1000000"),
    ],
)
def test_wrong_options_are_refused(run_dir, monkeypatch, capsys, option, message):
    code, _, err = command(monkeypatch, capsys, run_dir, *option)
    assert code == 2
    assert message in err


def test_a_drop_policy_without_a_capacity_is_refused(run_dir):
    dropless = open_run(run_dir, NUMPY).config.model_copy(deep=True)
    moe = dropless.model.moe.model_copy(update={"capacity": CapacityConfig()})
    config = dropless.model_copy(update={"model": dropless.model.model_copy(update={"moe": moe})})
    with pytest.raises(UserError, match=r"--drop position: the run has no capacity.*expected --factor too"):
        with_capacity(config, replace(NUMPY, drop="position"))
    found = with_capacity(config, replace(NUMPY, drop="probability", factor=1.5)).model.moe.capacity
    assert (found.policy, found.factor, found.drop) == ("factor", 1.5, "probability")
    assert with_capacity(config, NUMPY) is config
