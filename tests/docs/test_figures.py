"""The diagrams of the documentation show what the code computes, and every image has an alternative text."""

import importlib
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from moeport.parity.floats import _double_benchmark

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "README.md"])
IMAGE = re.compile(r"!\[(.*?)\]\((.+?)\)", re.DOTALL)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def figures():
    """The package that draws the diagrams, and its modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "docs" / "generate")
        yield importlib.import_module("figures")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_image_of_a_page_exists_and_has_a_text(page):
    for text, target in IMAGE.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target.partition("#")[0]).is_file(), target
        assert len(text.split()) >= 5, f"{target}: {text!r} does not say what the image shows"


def test_every_picture_is_on_a_page(figures):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    pictures = sorted(path.name for path in (REPOSITORY / "docs" / "images").iterdir())
    assert {Path(name).name for name in figures.FIGURES} <= {*pictures}
    assert [name for name in pictures if f"images/{name}" not in text] == []


def test_a_diagram_is_text_inside_its_card_and_is_readable_on_a_phone(figures):
    for name, draw in figures.FIGURES.items():
        root = ElementTree.fromstring(draw())
        *_, width, height = map(float, root.get("viewBox").split())
        assert width == 440, name
        for text in root.iter(f"{SVG}text"):
            size = 12 if "small" in text.get("class", "") else 14
            x, extent = float(text.get("x")), 0.55 * size * len(text.text)  # of a wide typeface
            start = {"left": x, "right": x - extent}.get(text.get("class", "").split(" ")[-1], x - extent / 2)
            assert start >= 0, (name, text.text)
            assert start + extent <= width, (name, text.text)
            assert 0 < float(text.get("y")) < height, (name, text.text)


def test_the_double_benchmark_decides_as_its_examples_say(figures):
    example, unit = importlib.import_module("figures.double_benchmark").EXAMPLES, 2.0**-24
    golden = np.linspace(1.0, 2.0, 1000)
    for _, error, verdict, _ in example:
        found = _double_benchmark(golden, golden * (1 + 1e-5), golden * (1 + 1e-5 * error), unit)
        assert found.ratio_rms == pytest.approx(error, rel=1e-6)
        assert ("pass" if found.passed else "fail") == verdict


@pytest.mark.parametrize("algorithm", ["flat", "hierarchical", "node_dedup"])
def test_the_rows_that_are_drawn_are_those_that_the_planner_counts(figures, algorithm):
    exchange = importlib.import_module("figures.exchange")
    inside = between = 0
    for (source, target), rows in exchange.hops(algorithm).items():
        crosses = source // 2 != target // 2
        between += rows * crosses
        inside += rows * (not crosses)
    assert exchange.sent(algorithm) == (inside * exchange.ROW, between * exchange.ROW)


def test_the_curves_of_the_bound_are_one_over_the_probability_of_a_cosine(figures):
    """A cosine with a fixed direction, squared, follows a beta distribution on the sphere."""
    for dim in (64, 1024):
        points = importlib.import_module("figures.bound").curve(dim)
        assert points[0][0] == 90
        for angle, tokens in points:
            beyond = stats.beta.sf(math.cos(math.radians(angle)) ** 2, 0.5, (dim - 1) / 2) / 2
            assert tokens == pytest.approx(1 / (1 - (1 - beyond) ** 16), rel=1e-6)
