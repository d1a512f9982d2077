import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from moeport.config import load_config, resolved_yaml
from moeport.errors import UserError
from moeport.training.profile_table import HELD_LABELS
from moeport.training.report import write_report
from tests.training.metrics_examples import SUMMARY, write_run

HEADINGS = [
    "Validation bits per byte lower is better",
    "Loss",
    "Optimisation",
    "Speed",
    "Routing",
    "Dropped assignments by layer",
    "Expert load by layer",
    "Sample",
    "Setup",
]
CHARTS = [
    "Loss",
    "Validation bits per byte",
    "Learning rate",
    "Gradient norm",
    "Throughput",
    "Model FLOP utilisation",
    "Expert imbalance",
    "Load-balancing loss",
    "Drop rate",
]


class Page(HTMLParser):
    """Tags, attributes, and texts by the tag they are in; fails where tags do not match."""

    EMPTY = frozenset({"meta", "path", "img", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.EMPTY:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


def report(run_dir, steps=30, **options):
    write_run(run_dir, steps, **options)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def without_images(text):
    return re.sub(r"base64,[^\"]*", "", text)


def charts(page):
    suffix = " over steps"
    return [value.removesuffix(suffix) for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]


def test_every_section_is_there(tmp_path):
    page, _ = report(tmp_path / "run", config=resolved_yaml(load_config(None)))
    assert page.texts["h1"] == ["run"]
    assert page.texts["h2"] == HEADINGS
    assert charts(page) == CHARTS
    heat_maps = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert heat_maps == [f"Load of 8 experts of Layer {layer} over steps" for layer in range(4)]
    body = " ".join(page.texts["body"])
    for value in ("2.3456", "1.234", "2.111", "1.987", "12,346", "12m34s", "12.3M", "4.32M active", "1.75"):
        assert value in body
    assert "41.5% fewer bits than gzip -9, 37.9% fewer bits than xz -9" in body
    for value in ("cpu (2 threads)", "float32", "2.11.0", "runs/example/checkpoints/step-1000"):
        assert value in page.texts["dd"]
    assert "num_experts: 8" in page.texts["details"][0]
    assert "4 layers of width 256, 8 experts of width 512, router topk, 2 of 8 experts per token" in body


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("model.moe.router_z_loss", "Router z-loss"),
        ("model.output_z_loss", "Output z-loss"),
        ("model.moe.load_balance.coefficient", "Load-balancing loss"),
    ],
)
def test_a_loss_term_has_a_chart_if_it_has_a_weight(tmp_path, key, title):
    for weight in (0, 0.001):
        config = resolved_yaml(load_config(None, [f"{key}={weight}"]))
        page, _ = report(tmp_path / str(weight), config=config, output_z=0.5)
        assert (title in charts(page)) == (weight > 0)


def test_a_long_loss_is_smoothed_over_the_faint_original(tmp_path):
    def strokes(steps):
        page, _ = report(tmp_path / str(steps), steps=steps)
        return [value for tag, name, value in page.attributes if (tag, name) == ("path", "class")]

    assert strokes(30).count("curve faint") == 0
    assert strokes(200).count("curve faint") == 1


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page, text = report(tmp_path / "run")
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert sources
    assert all(value.startswith("data:") for value in sources)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttpRequest", without_images(text))
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_text_is_escaped(tmp_path):
    nasty = "</pre><script>alert('x')</script><img src=x onerror=\"y\"> & \ud800"
    summary = SUMMARY | {"sample": {"prompt": nasty, "text": nasty}, "device": nasty, "versions": {nasty: nasty}}
    summary["baselines"] = {nasty: 2.0}
    page, text = report(tmp_path / "<b>run", summary=summary, config=f"# {nasty[:-1]}\n")
    readable = nasty[:-1] + "?"
    assert readable * 2 in page.texts["pre"]
    assert readable in page.texts["dd"]
    assert page.texts["h1"] == ["<b>run"]
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert html.escape("<script>", quote=False) in text


def test_one_step(tmp_path):
    page, _ = report(tmp_path / "run", steps=1)
    assert page.texts["h2"] == HEADINGS
    assert charts(page) == CHARTS


@pytest.mark.parametrize(("steps", "first"), [(2_500, 8), pytest.param(20_000, 64, marks=pytest.mark.slow)])
def test_a_long_run_makes_a_small_file(tmp_path, steps, first):
    """Twice the steps, in points of twice as many, make a page of the same size."""
    (_, half), (_, text) = (report(tmp_path / f"{n}", steps=n, layers=2, experts=4) for n in (steps // 2, steps))
    assert len(text) < min(3_000_000, 1.1 * len(half))
    assert f"steps 1 to {first}" in text
    assert f"to {steps:,}" in text


def test_many_experts_make_a_small_file(tmp_path):
    page, text = report(tmp_path / "run", steps=40, layers=60, experts=256)
    assert len(text) < 3_000_000
    assert sum(tag == "img" for tag, name, _ in page.attributes if name == "src") == 60


def test_a_report_of_few_lists_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("moeport.training.metrics_thinning.NUMBERS", 320)
    page, text = report(tmp_path / "run", steps=300, layers=4, experts=8, exchanged=[[2_000_000, 500_000]] * 4)
    assert sum(tag == "img" for tag, name, _ in page.attributes if name == "src") == 4
    assert "2.5 MB, 0.5 MB of them between nodes" in text
    assert "step 300" in text


DAMAGED = {"steps": [1, 2], "ranks": 1, "memory": {key: {"max": 0} for key in HELD_LABELS} | {"activations": []}}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps(DAMAGED), json.dumps({**DAMAGED, "memory": []}), '{"steps": [1]}']
)
def test_a_profile_that_cannot_be_read_is_left_out(tmp_path, text):
    write_run(tmp_path / "run", 3)
    (tmp_path / "run" / "profile").mkdir()
    (tmp_path / "run" / "profile" / "profile.json").write_text(text)
    assert "Where a step's time goes" not in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_layers_are_numbered_as_in_the_model(tmp_path):
    config = resolved_yaml(load_config(None, ["model.num_layers=8", "model.moe.first_dense=2", "model.moe.every=2"]))
    page, _ = report(tmp_path / "run", layers=3, config=config)
    layers = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert [re.search(r"Layer \d+", value)[0] for value in layers] == ["Layer 3", "Layer 5", "Layer 7"]


@pytest.mark.parametrize("key", SUMMARY)
@pytest.mark.parametrize("null", [False, True])
def test_any_key_of_the_summary_may_be_missing(tmp_path, key, null):
    summary = {name: value for name, value in SUMMARY.items() if name != key} | ({key: None} if null else {})
    page, _ = report(tmp_path / "run", steps=2, summary=summary)
    assert "Setup" in page.texts["h2"]


def test_a_run_that_is_not_finished(tmp_path):
    page, text = report(tmp_path / "run", steps=30, summary=None, config=resolved_yaml(load_config(None)))
    assert "This run is not finished: 30 of 1,000 steps are done." in text
    assert page.texts["h2"] == [heading for heading in HEADINGS if heading != "Sample"]
    assert "Validation loss" in page.texts["span"]


def test_metrics_alone_suffice(tmp_path):
    page, text = report(tmp_path / "run", steps=3, evaluations=0, summary=None, config="")
    assert "This run is not finished: 3 steps are done." in text
    assert "Validation bits per byte" not in charts(page)
    assert "details" not in page.texts


def test_the_all_to_all_is_shown_where_there_is_one(tmp_path):
    assert "All-to-all" not in report(tmp_path / "alone")[1]
    sent = [[1_500_000, 500_000], [3_000_000, 0]]
    page, text = report(tmp_path / "shared", layers=2, config="model:\n  num_layers: 2\n", exchanged=sent)
    assert "2 MB, 0.5 MB of them between nodes" in text
    assert "3 MB, 0 MB of them between nodes" in text
    assert {"All-to-all inside nodes", "All-to-all between nodes"} <= set(charts(page))


def test_without_drops_it_is_said_so(tmp_path):
    page, text = report(tmp_path / "run", drop=0.0)
    assert "No assignment was dropped." in text
    assert "Drop rate" not in charts(page)


def test_numbers_that_are_not_finite_leave_gaps(tmp_path):
    write_run(tmp_path, 20)
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for record in lines[5:8]:
        record |= {key: None for key in ("loss", "grad_norm") if key in record}
    path.write_text("".join(json.dumps(record) + "\n" for record in lines))
    text = write_report(tmp_path).read_text()
    assert "NaN" not in text
    assert "nan" not in without_images(text)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_a_folder_without_metrics_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: (no such file|has no step yet)"):
        write_report(tmp_path)


def test_the_report_needs_no_framework_and_no_matplotlib(tmp_path):
    write_run(tmp_path, 2)
    code = (
        f"import sys; from moeport.training.report import write_report; write_report({str(tmp_path)!r});"
        "assert not {'torch', 'matplotlib', 'tensorboard'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
