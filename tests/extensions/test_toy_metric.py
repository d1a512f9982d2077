"""A metric is a row and the line that computes it; it then appears in the file, TensorBoard, report and docs."""

import json

import pytest

from tests.extensions.copies import Row, extended_copy
from tests.training.tiny import tiny_values

PLACES = 2


def row(name, kind, default, tag, options):
    """The row of a step metric, inserted after another one with a default."""
    text = f"""
    {name}: Annotated[
        {kind},
        Metric("How {name} it is.", tag="{tag}", {options}),
    ] = {default}
"""
    return Row("moeport/training/metrics_table.py", "] = field(default=0.0)", text)


def measured(name, value):
    """The line of a metric that each MoE layer computes."""
    return Row("moeport/model/moe_metrics.py", "measured: dict[str, Array] = {}", f'    measured["{name}"] = {value}')


def computed(name, value):
    """The line of a metric that the trainer computes."""
    return Row("moeport/training/step_metrics.py", "**of_layers,", f"        {name}={value},")


CHART = 'chart=Chart("Routing", Axis("Toy of {}", "", "{{:.3f}}"))'
PRINTED = 'printed=Printed("sure of {}", "{{:.3f}}")'
TOKENS = "ops.zeros((), ops.dtype(chosen.logits_TE)) + ops.constant_like(chosen.logits_TE.shape[0], chosen.logits_TE)"
LARGEST = "ops.take_last(ops.softmax(chosen.logits_TE), ops.topk_ids(chosen.logits_TE, 1))"


def together(rows):
    """Rows of which those at the same anchor are one."""
    texts = {}
    for each in rows:
        texts.setdefault((each.file, each.after), []).append(each.text)
    return tuple(Row(file, after, "\n".join(found)) for (file, after), found in texts.items())


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy with all the metrics."""
    folder = tmp_path_factory.mktemp("copy")
    return extended_copy(folder, {}, together(each for rows in METRICS.values() for each in rows))


def trained(copy, folder, **sections):
    """Three steps with the copy: their records and the output."""
    values = tiny_values(
        folder,
        training={"steps": 3, "gradient_accumulation": 2},
        metrics={"tensorboard": True, "report": True, "log_interval": 1},
        **sections,
    )
    (folder / "tiny.yaml").write_text(json.dumps(values))
    codes, output = copy.with_torch("train", str(folder / "tiny.yaml"))
    assert codes == [0], output
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 3
    return steps, output


def events(folder, tag):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "run/tensorboard"))
    found.Reload()
    return [event.value for event in found.Scalars(tag)]


def documented(copy):
    """The page of metrics, regenerated like `make generate`."""
    renewed = copy.python("docs/generate")
    assert "docs/training.md: written" in renewed.stdout, renewed.stdout + renewed.stderr
    return (copy.root / "docs/training.md").read_text()


METRICS = {
    "doubt": (
        row("doubt", "float", "0.0", "toy/doubt", f"{CHART.format('doubt')}, {PRINTED.format('doubt')}"),
        computed("doubt", "2 * loss"),
    ),
    "trust": (
        row(
            "trust",
            "float",
            "0.0",
            "toy/trust",
            f'{CHART.format("trust")}, {PRINTED.format("trust")}, reduction="mean"',
        ),
        measured("trust", f"ops.mean({LARGEST})"),
    ),
    "seen": (
        row("seen", "list[float]", "field(default_factory=list)", "toy/seen/{layer}", 'reduction="sum"'),
        measured("seen", TOKENS),
    ),
    "met": (row("met", "float", "0.0", "toy/met", 'reduction="mean"'), measured("met", TOKENS)),
}
"""By name, the rows of a metric: of the trainer; of the layers, the largest probability per token, mean over tokens,
micro-batches and layers; and of the layers, their tokens, added up for each layer or as a mean.
"""


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_two_places(name):
    assert len({each.file for each in METRICS[name]}) == PLACES


def test_the_copy_is_extended_in_these_places_alone(copy):
    assert copy.places == len({each.file for rows in METRICS.values() for each in rows}) == 3


def test_metrics_are_everywhere(copy, tmp_path):
    steps, text = trained(copy, tmp_path)
    assert [step["doubt"] for step in steps] == [2 * step["loss"] for step in steps]
    assert all(0.25 < step["trust"] < 1 for step in steps)
    assert len({step["trust"] for step in steps}) == 3
    page = documented(copy)
    for name in ("doubt", "trust"):
        assert f"sure of {name}: {steps[-1][name]:.3f}" in text
        assert events(tmp_path, f"toy/{name}") == pytest.approx([step[name] for step in steps], rel=1e-6)
        assert f"Toy of {name} over steps" in (tmp_path / "run/report.html").read_text()
        assert f"| `{name}` | How {name} it is. | `toy/{name}` |" in page


def test_a_measurement_is_reduced_as_its_row_says(copy, tmp_path):
    """Tokens of a batch of 128 in two micro-batches and, for this router, two passes through each of two layers."""
    steps, _ = trained(copy, tmp_path, model={"moe": {"router": {"name": "random"}}})
    assert [(step["seen"], step["met"]) for step in steps] == [([256.0, 256.0], 64.0)] * 3
    assert (events(tmp_path, "toy/seen/1"), events(tmp_path, "toy/met")) == ([256.0] * 3, [64.0] * 3)


def test_a_measurement_without_a_row_is_refused(tmp_path):
    copy = extended_copy(tmp_path / "copy", {}, (measured("lost", TOKENS),))
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_values(tmp_path, training={"steps": 1})))
    codes, output = copy.with_torch("train", str(tmp_path / "tiny.yaml"))
    assert codes != [0]
    assert "lost: MoE layers measure it, but it has no row with a reduction in StepMetrics" in output
