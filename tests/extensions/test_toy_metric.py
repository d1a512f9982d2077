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
    return Row("moeport/training/metrics_table.py", "] = 0.0", text)


def measured(name, value):
    """The line of a metric that each MoE layer computes."""
    return Row("moeport/model/moe_metrics.py", "measured: dict[str, Array] = {}", f'    measured["{name}"] = {value}')


def computed(name, value):
    """The line of a metric that the trainer computes."""
    return Row("moeport/training/trainer.py", "**measured(terms),", f"            {name}={value},")


CHART = 'chart=Chart("Routing", Axis("Toy of {}", "", "{{:.3f}}"))'
PRINTED = 'printed=Printed("sure", "{:.3f}")'
TOKENS = "ops.zeros((), ops.dtype(chosen.logits_TE)) + ops.constant_like(chosen.logits_TE.shape[0], chosen.logits_TE)"
LARGEST = "ops.take_last(ops.softmax(chosen.logits_TE), ops.topk_ids(chosen.logits_TE, 1))"


def trained(folder, rows, **sections):
    """Run three steps with the extended copy: the copy, the records of the steps and the output."""
    copy = extended_copy(folder / "copy", {}, rows)
    values = tiny_values(
        folder,
        training={"steps": 3, "gradient_accumulation": 2},
        metrics={"tensorboard": True, "report": True, "log_interval": 1},
        **sections,
    )
    (folder / "tiny.yaml").write_text(json.dumps(values))
    done = copy.moeport("train", str(folder / "tiny.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 3
    return copy, steps, done.stdout


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


def test_a_metric_of_the_trainer_is_two_places(tmp_path):
    options = f"{CHART.format('doubt')}, {PRINTED}"
    rows = (row("doubt", "float", "0.0", "toy/doubt", options), computed("doubt", "2 * loss"))
    copy, steps, text = trained(tmp_path, rows)
    assert copy.places == PLACES
    assert [step["doubt"] for step in steps] == [2 * step["loss"] for step in steps]
    assert f"sure: {steps[-1]['doubt']:.3f}" in text
    assert events(tmp_path, "toy/doubt") == pytest.approx([step["doubt"] for step in steps], rel=1e-6)
    assert "Toy of doubt over steps" in (tmp_path / "run/report.html").read_text()
    assert "| `doubt` | How doubt it is. | `toy/doubt` |" in documented(copy)


def test_a_metric_of_the_layers_is_two_places(tmp_path):
    """The largest probability per token, mean over tokens, micro-batches and layers."""
    options = f'{CHART.format("trust")}, {PRINTED}, reduction="mean"'
    rows = (row("trust", "float", "0.0", "toy/trust", options), measured("trust", f"ops.mean({LARGEST})"))
    copy, steps, text = trained(tmp_path, rows)
    assert copy.places == PLACES
    assert all(0.25 < step["trust"] < 1 for step in steps)
    assert len({step["trust"] for step in steps}) == 3
    assert f"sure: {steps[-1]['trust']:.3f}" in text
    assert events(tmp_path, "toy/trust") == pytest.approx([step["trust"] for step in steps], rel=1e-6)
    assert "Toy of trust over steps" in (tmp_path / "run/report.html").read_text()
    assert "| `trust` | How trust it is. | `toy/trust` |" in documented(copy)


@pytest.mark.parametrize(
    ("reduction", "kind", "value"),
    [("sum", "list[float]", [256.0, 256.0]), pytest.param("mean", "float", 64.0, marks=pytest.mark.slow)],
)
def test_a_measurement_is_reduced_as_its_row_says(tmp_path, reduction, kind, value):
    """Tokens of a batch of 128 in two micro-batches and, for this router, two passes through each of two layers."""
    tag = "toy/seen/{layer}" if kind.startswith("list") else "toy/seen"
    default = "field(default_factory=list)" if kind.startswith("list") else "0.0"
    rows = (row("seen", kind, default, tag, f'reduction="{reduction}"'), measured("seen", TOKENS))
    copy, steps, _ = trained(tmp_path, rows, model={"moe": {"router": {"name": "random"}}})
    assert copy.places == PLACES
    assert [step["seen"] for step in steps] == [value] * 3
    assert events(tmp_path, tag.format(layer=1)) == [256.0 if kind.startswith("list") else 64.0] * 3


def test_a_measurement_without_a_row_is_refused(tmp_path):
    copy = extended_copy(tmp_path / "copy", {}, (measured("lost", TOKENS),))
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_values(tmp_path, training={"steps": 1})))
    done = copy.moeport("train", str(tmp_path / "tiny.yaml"))
    assert "lost: MoE layers measure it, but it has no row with a reduction in StepMetrics" in done.stdout + done.stderr
