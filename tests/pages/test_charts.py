import base64
import struct
import zlib

import numpy as np
import pytest

from moeport.pages.charts import Axis, Series, heat_map, line_chart, number


def series(y, low=None, high=None, label="training"):
    steps = np.arange(1, len(y) + 1)
    return Series(label, steps, np.array(y, float), [f"step {step}" for step in steps], low, high)


def labels(ticks):
    return {tick.label: tick.percent for tick in ticks}


def test_points_are_placed_between_the_axes():
    chart = line_chart(Axis("Loss", show="{:.1f}"), [series([0.0, 10.0])], last_step=2)
    assert chart.lines[0].path == "M500.0 946.4L1000.0 53.6"
    assert chart.lines[0].hover == {"x": [500.0, 1000.0], "points": ["step 1", "step 2"], "values": ["0.0", "10.0"]}
    assert labels(chart.y_ticks) == {"0": 94.64, "5": 50.0, "10": 5.36}
    assert labels(chart.x_ticks) == {"0": 0, "1": 50.0, "2": 100.0}
    assert chart.last == "step 2: 10.0"


def test_a_line_breaks_at_nan():
    (line,) = line_chart(Axis("Loss"), [series([1.0, 2.0, np.nan, 2.0, 1.0])], 5).lines
    assert [part.count("L") for part in line.path.split("M")[1:]] == [1, 1]
    assert line.hover["points"] == ["step 1", "step 2", "step 4", "step 5"]


def test_a_series_without_values_is_left_out():
    chart = line_chart(Axis("Loss"), [series([1.0]), series([np.nan], label="validation")], 1)
    assert [line.label for line in chart.lines] == ["training"]
    assert line_chart(Axis("MFU"), [series([np.nan])], 1) is None


def test_two_lines_are_named():
    chart = line_chart(Axis("Loss", show="{:.0f}"), [series([1.0]), series([2.0], label="validation")], 1)
    assert chart.last == "step 1: training 1, step 1: validation 2"


def test_a_band_is_drawn_where_extremes_differ():
    y = np.array([1.0, 2.0])
    assert line_chart(Axis("Loss"), [series(y, y - 1, y + 1)], 2).lines[0].band.endswith("Z")
    assert line_chart(Axis("Loss"), [series(y, y, y)], 2).lines[0].band == ""


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 1e12])
def test_a_constant_has_an_axis(value):
    chart = line_chart(Axis("Loss"), [series([value, value])], 2)
    assert len(chart.y_ticks) >= 2
    assert chart.lines[0].path == "M500.0 500.0L1000.0 500.0"


def test_a_logarithmic_axis():
    axis = Axis("Gradient norm", logarithmic=True)
    chart = line_chart(axis, [series([0.1, 1.0, 10.0])], 3)
    ticks = labels(chart.y_ticks)
    assert ticks["1"] == pytest.approx(50.0, abs=0.01)
    assert list(labels(line_chart(axis, [series([1.0, 3.0])], 2).y_ticks)) == ["1.0", "1.5", "2.0", "2.5", "3.0"]


def test_percent_and_reference_lines():
    axis = Axis("MFU", percent=True, from_zero=True, references={"limit": 0.4})
    chart = line_chart(axis, [series([0.25])], 1)
    assert labels(chart.y_ticks)["0%"] == 100.0
    assert labels(chart.references)["limit"] == pytest.approx(labels(chart.y_ticks)["40%"])


def test_labels_of_references_keep_their_distance():
    axis = Axis("Bits", references={"gzip": 2.0, "xz": 1.99, "bz2": 1.0})
    references = line_chart(axis, [series([1.0, 3.0])], 2).references
    assert [reference.label for reference in references] == ["gzip", "xz", "bz2"]
    heights = [reference.label_percent for reference in references]
    assert np.diff(heights).min() >= 7.0
    assert [references[0].percent, references[2].percent] == [heights[0], heights[2]]
    assert references[1].percent < heights[1]


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (2, ["0", "1", "2"]),
        (40, ["0", "10", "20", "30", "40"]),
        (7000, ["0", "2k", "4k", "6k"]),
        (2500, ["0", "500", "1k", "1.5k", "2k", "2.5k"]),
        (4.3e9, ["0", "1G", "2G", "3G", "4G"]),
    ],
)
def test_steps_are_written_as_short_as_they_can_be(last, expected):
    assert [*labels(line_chart(Axis("Loss"), [series([1.0, 2.0])], last).x_ticks)] == expected


def test_marks_are_on_the_plot_and_their_labels_apart():
    axis = Axis("Drops", marks={"now": 50.0, "mean": 55.0, "wanted": 90.0, "beyond": 101.0})
    marks = line_chart(axis, [series([1.0] * 100)], 100).marks
    assert [(mark.label, mark.percent, mark.row) for mark in marks] == [
        ("now", 50.0, 0),
        ("mean", 55.0, 1),
        ("wanted", 90.0, 0),
    ]


def test_a_smoothed_line_follows_the_mean_of_a_noisy_one():
    noise = np.random.default_rng(0).normal(0, 1, 400)
    (line,) = line_chart(Axis("Loss", smooth=True), [series(5 + noise)], 400).lines
    raw, smooth = (
        np.array([float(point.split()[1]) for point in path.replace("M", "L").split("L")[1:]])
        for path in (line.path, line.smooth)
    )
    assert raw.shape == smooth.shape
    assert smooth[20:-20].std() < 0.4 * raw.std()
    assert smooth.mean() == pytest.approx(raw.mean(), abs=0.1 * raw.std())
    assert line_chart(Axis("Loss"), [series(5 + noise)], 400).lines[0].smooth == ""


@pytest.mark.parametrize(
    ("value", "resolution", "text"),
    [
        (0, 1, "0"),
        (0.003, 0.001, "0.003"),
        (3e-5, 1e-5, "3e-05"),
        (0.5, 0.5, "0.5"),
        (50, 10, "50"),
        (1000, 200, "1k"),
        (1500, 500, "1.5k"),
        (12_345_678, 123_456, "12.3M"),
        (2.5e12, 2.5e10, "2.5T"),
    ],
)
def test_numbers(value, resolution, text):
    assert number(value, resolution) == text


def decode_png(address):
    """Width, height and (rows, columns, RGBA) of an indexed PNG."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size) == (zlib.crc32(body),)
        chunks[body[:4]] = body[4:]
        at += 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    colors = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    alphas = np.frombuffer(chunks[b"tRNS"], np.uint8)[:, None]
    return np.hstack([colors, alphas])[rows[:, 1:]]


def test_a_heat_map_shows_under_and_overload():
    chart = heat_map(np.array([[0.0, 1.0], [2.0, 5.0], [0.5, np.nan]]), last_step=2)
    pixels = decode_png(chart.image)
    assert pixels.shape == (3, 2, 4)
    alpha = pixels[..., 3]
    assert alpha[:2].tolist() == [[255, 0], [255, 255]]
    assert alpha[2, 0] == pytest.approx(128, abs=2)
    assert alpha[2, 1] == 0
    assert pixels[0, 0, 2] > pixels[0, 0, 0]
    assert pixels[1, 0, 0] > pixels[1, 0, 2]
    assert labels(chart.y_ticks) == {"0": 16.67, "1": 50.0, "2": 83.33}
