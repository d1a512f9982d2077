"""The HTML page: what is on it, that it needs nothing else, and that names are escaped."""

import base64
import html as escaping
import json
import re
import struct
import zlib
from itertools import pairwise

import numpy as np
import pytest

from moeport.parity import html, html_charts
from moeport.parity.compare import compare
from moeport.parity.recording import Recording, Statistics, Step, TensorRecord
from moeport.parity.result import Report
from moeport.parity.run import run
from moeport.parity.subject import Size
from tests.parity.tiny import config_file
from tests.support import rng
from tests.training.test_report import Page, charts, without_images

HEADINGS = ["Error through depth", "Growth over steps", "Routing", "Worst tensors", "All tensors", "Sides"]
X = rng(0).standard_normal((40, 50))
NOISE = rng(1).standard_normal((40, 50))


class ParityPage(Page):
    EMPTY = Page.EMPTY | {"input"}


def tensor(name, values, kind="activation", op="linear", inputs=(), layer=None, **fields):
    values = np.asarray(values)
    dtype = "float32" if values.dtype.kind == "f" else str(values.dtype)
    return TensorRecord(name, kind, dtype, values.shape, layer, op, inputs, values=values, **fields)


def recording(name, *tensors, **fields):
    return Recording(name, "float32", {t.name: t for t in tensors}, **fields)


def page(*comparisons):
    text = html.page(Report(comparisons[0].verdict, list(comparisons)))
    return ParityPage(text), text


def steps(noise):
    return [Step(n, 5.0 + noise, 5.0, 1.0 + noise, 1.0, 0.0, 0.1, [[0.5 + noise, 0.5 - noise]]) for n in (1, 2, 3)]


def scripts(page):
    return [json.loads(text) for text in page.texts["script"] if text.lstrip().startswith(("[", "{"))]


def pixels(address):
    """Entries of an indexed PNG: 127 for no difference, up to 254 for all of them."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    columns, rows = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    raw = np.frombuffer(zlib.decompress(data[start:]), np.uint8).reshape(rows, columns + 1)
    return raw[:, 1:]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    pytest.importorskip("torch")
    file = config_file(tmp_path_factory.mktemp("html"))
    variants = ["torch-cpu", "torch-cpu model.norm_eps=0.1"]
    return run(file, variants, size=Size(2, 12, 3), isolate=True).comparisons[0]


def test_a_run_that_fails(faulty):
    found, text = page(faulty)
    assert found.texts["title"] == ["FAIL \N{MIDDLE DOT} parity \N{MIDDLE DOT} moeport"]
    assert found.texts["h1"] == ["Parity fail"]
    assert found.texts["h2"] == [faulty.headline, *HEADINGS]
    assert found.texts["h2"][0].startswith("FAIL layers.0/attention_norm:rms_norm: ")
    assert "layers.0/attention_norm:rms_norm" in found.texts["code"]
    assert "the error is its own" in text
    drawn = charts(found)
    for title in ("Activations", "Router scores", "Gradients", "Optimiser updates"):
        assert f"{title} over the order of execution" in drawn
    for title in ("Loss", "Difference of the loss", "Difference of the gradient norm"):
        assert title in drawn
    assert ["config model.norm_eps", "1e-05", "0.1"] in [row[:3] for row in map(cells, rows_of(text))]
    assert len(text) < 500_000


def rows_of(text):
    return re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.DOTALL)


def cells(row):
    return [escaping.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<td>(.*?)</td>", row)]


def test_every_tensor_is_in_the_table(faulty):
    listed = [row for row in map(cells, rows_of(page(faulty)[1])) if len(row) == 15]
    assert [row[2] for row in listed] == [t.name for t in faulty.tensors]
    assert {row[1] for row in listed} == {"pass", "fail", "warn"} & {t.verdict for t in faulty.tensors}


def test_the_depth_chart_has_the_errors_and_the_culprit(faulty):
    charts_of = [part for part in scripts(page(faulty)[0]) if isinstance(part, list)]
    activations = [t for t in faulty.tensors if t.kind == "activation" and t.error]
    names = [t.name for t in activations]
    values = [line["values"] for lines in charts_of for line in lines if line["points"] == names]
    assert [f"{t.error:.1e}" for t in activations] in values  # the errors against float64 are in another line
    marked = [line["points"] for lines in charts_of for line in lines if len(line["points"]) == 1]
    assert [faulty.culprit.name] in marked


def test_worst_tensors_have_histograms(faulty):
    found, text = page(faulty)
    labels = [value for tag, name, value in found.attributes if (tag, name) == ("svg", "aria-label")]
    count = sum(t.distribution is not None for t in faulty.tensors)
    assert labels.count("A and B") == labels.count("B \N{MINUS SIGN} A") == count > html.CARDS
    worst = next(t for t in faulty.tensors if t.distribution)
    assert sum(worst.distribution.a) == sum(worst.distribution.b) == sum(worst.distribution.difference)
    assert f"{count - html.CARDS} more" in text


def test_nothing_is_loaded_from_elsewhere(faulty):
    found, text = page(faulty)
    sources = [value for _, name, value in found.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert sources
    assert all(value.startswith("data:") for value in sources)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\(|XMLHttpRequest", without_images(text))
    (policy,) = [value for _, name, value in found.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_names_are_escaped():
    nasty = "</script><script>alert('x')</script><img src=x onerror=\"y\">&\ud800"
    sides = [
        recording(nasty, tensor(nasty, x, layer=0), config={nasty: i}, environment={"device": nasty, nasty: i})
        for i, x in enumerate((X, X + NOISE))
    ]
    found, text = page(compare(*sides))
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert nasty in found.texts["td"]
    assert nasty in next(part for part in scripts(found) if isinstance(part, list))[0]["points"]


def decided(name, choices, scores, layer):
    return [
        tensor(f"{name}.x", scores, "score", None, layer=layer),
        tensor(name, choices, "decision", "topk_ids", layer=layer),
    ]


def test_a_flip_shows_in_the_heat_map():
    scores = np.tile([1.0, 0.0], (6, 1))
    tied = scores.copy()
    tied[4] = [1.0, 1.0 - 1e-6]
    other = tied.copy()
    other[4] = [1.0 - 1e-6, 1.0]
    plain = np.zeros((6, 1), int)
    flipped = plain.copy()
    flipped[4] = 1
    a = recording("a", *decided("one", plain, scores, 0), *decided("two", plain, tied, 1))
    b = recording("b", *decided("one", plain, scores, 0), *decided("two", flipped, other, 1))
    again = recording("b", *decided("one", plain, scores, 0), *decided("two", plain, tied, 1), replayed="a")
    found, text = page(compare(a, b, replayed=again))
    own, replayed = [part for part in scripts(found) if "flips" in part]
    assert own["names"] == ["one", "two"]
    assert own["flips"] == [[0] * 6, [0, 0, 0, 0, 1, 0]]
    assert own["columns"][4] == "row 4"
    assert replayed["flips"] == [[0] * 6, [0] * 6]
    images = [value for tag, name, value in found.attributes if (tag, name) == ("img", "src")]
    np.testing.assert_array_equal(pixels(images[0]), 127 + 127 * np.array(own["flips"]))
    assert (pixels(images[1]) == 127).all()
    assert ["two", "6", "83.33%", "100.00%", "0", "0", "0"] in [*map(cells, rows_of(text))]


def test_many_rows_are_shown_in_blocks():
    scores = np.tile([1.0, 1.0 + 1e-7], (1000, 1))
    choices = np.ones((1000, 1), int)
    flipped = choices.copy()
    flipped[:8] = 0
    sides = [recording(name, *decided("d", c, scores, 0)) for name, c in (("a", choices), ("b", flipped))]
    (part,) = [part for part in scripts(page(compare(*sides))[0]) if "flips" in part]
    assert len(part["columns"]) == html_charts.COLUMNS
    assert part["columns"][0] == "rows 0 to 7"
    assert part["flips"][0] == [8] + [0] * (html_charts.COLUMNS - 1)


def test_equal_sides():
    sides = [recording(name, tensor("t", X), trajectory=steps(0.0)) for name in ("a", "b")]
    found, text = page(compare(*sides))
    assert "All tensors are bit-identical." in text
    assert "Bit-identical: activations." in text
    assert charts(found) == ["Loss"]


def test_growth_over_steps():
    sides = [recording(n, tensor("t", X), trajectory=steps(e)) for n, e in (("a", 0.0), ("b", 1e-5))]
    found, _ = page(compare(*sides))
    assert charts(found) == [
        "Loss",
        "Difference of the loss",
        "Difference of the gradient norm",
        "Largest difference of an expert's load",
    ]
    (line,) = scripts(found)[1]
    assert line["points"] == ["step 1", "step 2", "step 3"]
    assert line["values"] == ["2.0e-06"] * 3


def test_statistics_alone_have_no_histogram():
    def reduced(rms):
        record = TensorRecord("t", "activation", "float32", (40, 50), keep="statistics")
        return recording("x", TensorRecord(**vars(record) | {"statistics": Statistics(0.0, rms)}))

    _, text = page(compare(reduced(1.0), reduced(1.1)))
    assert "Only statistics were kept, so there are no histograms." in text
    assert "For 1 tensors only statistics were kept" in text


def test_what_is_not_finite_is_shown():
    b = X.copy()
    b[3, 4] = np.nan
    _, text = page(compare(recording("a", tensor("t", X)), recording("b", tensor("t", b))))
    assert "NaN or infinity in B, not at the same positions" in text
    assert "inf" in [row[4] for row in map(cells, rows_of(text)) if len(row) == 15]


def test_several_comparisons_have_a_table_of_contents(faulty):
    found, _ = page(faulty, faulty)
    assert [value for tag, name, value in found.attributes if (tag, name) == ("a", "href")] == [
        "#comparison-1",
        "#comparison-2",
    ]


def test_a_large_model_makes_a_small_page():
    tensors = [tensor(f"t{i}", np.full(4, float(i + 1)), layer=i // 10) for i in range(2100)]
    others = [tensor(f"t{i}", np.full(4, (i + 1) * (1 + 1e-6 * (i % 7))), layer=i // 10) for i in range(2100)]
    _, text = page(compare(recording("a", *tensors), recording("b", *others)))
    assert len(text) < 2_000_000
    assert f"{html.LISTED} tensors of 2100" in text


@pytest.mark.parametrize(("layers", "shown"), [(12, [0, *range(2, 12)]), (24, [0, *range(4, 24, 3)]), (3, range(3))])
def test_labels_of_layers_do_not_cover_each_other(layers, shown):
    """In percent of the width: on a phone a plot has about 220 pixels, `layer 0` 42, a number up to 14."""
    sides = (
        recording(side, *(tensor(f"t{i}", np.full(4, i + factor), layer=i) for i in range(layers)))
        for side, factor in (("a", 1.0), ("b", 1.0 + 1e-6))
    )
    _, text = page(compare(*sides))
    axis = re.search(r'<div class="x-axis">(.*?)</div>', text, re.DOTALL)[1]
    places, labels = zip(*re.findall(r'left:([\d.]+)%">([^<]+)<', axis), strict=True)
    assert [*labels] == [str(each) if each else "layer 0" for each in shown]
    apart = [after - before for before, after in pairwise(map(float, places))]
    assert apart[0] >= 14
    assert min(apart) >= 9
