"""The table of metrics: everything that metrics.jsonl, TensorBoard, the printed lines and the report show of a run.

A metric is one row, plus the line that computes it. The row is a field of `StepMetrics` or `EvaluationMetrics`: its
name and type are those in metrics.jsonl, and the `Metric` in its annotation holds the rest. A value derived from other
fields is a property, with its row in `DERIVED`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, get_args, get_origin, get_type_hints

from moeport.pages.charts import Axis
from moeport.training.metric import BITS_PER_BYTE, NATS, Chart, Metric, Printed


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step. A NaN or infinity is null in the file and NaN when read back.

    Fields with a default may be missing in files of older versions; a new one needs a default.
    """

    step: Annotated[int, Metric("Step number, counted from 1.")]
    loss: Annotated[
        float,
        Metric(
            "Mean cross entropy, in nats per token, or for images in nats per image.",
            tag="train/loss",
            printed=Printed("loss", "{:.4f}"),
            chart=Chart("Loss", Axis("Loss", NATS, "{:.4f}", smooth=True), line="training"),
        ),
    ]
    total_loss: Annotated[
        float,
        Metric(
            "The loss that is differentiated: cross entropy plus the weighted auxiliary losses.", tag="train/total_loss"
        ),
    ]
    lr: Annotated[
        float,
        Metric(
            "Learning rate.",
            tag="train/lr",
            printed=Printed("lr", "{:.2e}"),
            chart=Chart("Optimisation", Axis("Learning rate", "", "{:.3e}", from_zero=True)),
        ),
    ]
    grad_norm: Annotated[
        float,
        Metric(
            "Global 2-norm of the gradients before clipping.",
            tag="train/grad_norm",
            printed=Printed("grad_norm", "{:.2f}"),
            chart=Chart("Optimisation", Axis("Gradient norm", "", "{:.3g}", logarithmic=True)),
        ),
    ]
    tokens_per_second: Annotated[
        float,
        Metric(
            "Tokens of the step, over all ranks, divided by its duration.",
            tag="performance/tokens_per_second",
            printed=Printed("tps", "{:,.0f}"),
            chart=Chart("Speed", Axis("Throughput", "tokens/s", "{:,.0f}", from_zero=True)),
        ),
    ]
    step_time: Annotated[
        float,
        Metric("Duration of the step in seconds: batch, forward, backward and update.", tag="performance/step_time"),
    ]
    tokens: Annotated[int, Metric("Tokens trained on since the first step.")]
    mfu: Annotated[
        float | None,
        Metric(
            "Model FLOP utilisation as a fraction; null if the peak is not known.",
            tag="performance/mfu",
            printed=Printed("mfu", "{:.1%}"),
            chart=Chart("Speed", Axis("Model FLOP utilisation", "", "{:.1%}", percent=True, from_zero=True)),
            null_is_none=True,
        ),
    ]
    load_balance: Annotated[
        float,
        Metric(
            "Unweighted load-balancing loss, mean over the layers; 1 is balanced, 0 if it is turned off.",
            tag="moe/load_balance",
            chart=Chart(
                "Routing",
                Axis("Load-balancing loss", "", "{:.4f}", references={"balanced": 1.0}),
                unless_zero=True,
                weight="model.moe.load_balance.coefficient",
            ),
        ),
    ]
    router_z: Annotated[
        float,
        Metric(
            "Unweighted router z-loss, mean over the layers; 0 if it is turned off.",
            tag="moe/router_z",
            chart=Chart(
                "Routing", Axis("Router z-loss", "", "{:.4g}"), unless_zero=True, weight="model.moe.router_z_loss"
            ),
        ),
    ]
    output_z: Annotated[
        float,
        Metric(
            "Unweighted output z-loss; 0 if it is turned off.",
            tag="train/output_z",
            chart=Chart(
                "Loss", Axis("Output z-loss", "", "{:.4g}"), order=2, unless_zero=True, weight="model.output_z_loss"
            ),
        ),
    ]
    imbalance: Annotated[
        float,
        Metric(
            "Largest expert load divided by the mean load, mean over the layers; 1 is balanced.",
            tag="moe/imbalance",
            printed=Printed("imbalance", "{:.2f}"),
            chart=Chart(
                "Routing",
                Axis("Expert imbalance", "largest / mean load", "{:.3f}", references={"balanced": 1.0}),
                order=0,
            ),
        ),
    ]
    drop_rate: Annotated[
        float,
        Metric(
            "Share of the chosen assignments that were dropped.",
            tag="moe/drop_rate",
            printed=Printed("dropped", "{:.1%}"),
            chart=Chart(
                "Routing",
                Axis("Drop rate", "of assignments", "{:.2%}", percent=True, from_zero=True),
                unless_zero=True,
            ),
        ),
    ]
    dead_experts: Annotated[
        float,
        Metric(
            "Experts that no assignment chose in the step, over all layers.",
            tag="moe/dead_experts",
            chart=Chart(
                "Routing",
                Axis("Experts without a token", "over all layers", "{:,.0f}", from_zero=True),
                unless_zero=True,
            ),
        ),
    ] = math.nan
    load_entropy: Annotated[
        float,
        Metric(
            "Entropy of the expert loads divided by log E, mean over the layers: 1 is balanced, 0 a single expert.",
            tag="moe/load_entropy",
            chart=Chart("Routing", Axis("Entropy of the loads", "of log E", "{:.4f}", references={"balanced": 1.0})),
        ),
    ] = math.nan
    expert_load: Annotated[
        list[list[float]], Metric("Each expert's share of the chosen assignments: one list per MoE layer.")
    ] = field(default_factory=list)
    drop_rate_per_layer: Annotated[
        list[float],
        Metric("`drop_rate` of each MoE layer.", tag="moe/drop_rate/{layer}", only_with="capacity_per_layer"),
    ] = field(default_factory=list)
    imbalance_per_layer: Annotated[
        list[float], Metric("Largest expert load of each MoE layer divided by the mean load.")
    ] = field(default_factory=list)
    dead_experts_per_layer: Annotated[
        list[int], Metric("Experts of each MoE layer that no assignment chose in the step.")
    ] = field(default_factory=list)
    load_entropy_per_layer: Annotated[list[float], Metric("`load_entropy` of each MoE layer.")] = field(
        default_factory=list
    )
    assignments_per_layer: Annotated[list[int], Metric("Chosen assignments of each MoE layer.")] = field(
        default_factory=list
    )
    capacity_per_layer: Annotated[
        list[int],
        Metric(
            "Expert capacity of each MoE layer, in assignments per micro-batch; empty without a limit.",
            tag="moe/capacity/{layer}",
        ),
    ] = field(default_factory=list)
    fill_rate: Annotated[
        float,
        Metric(
            "Capacity policy `round`: rows filled by tokens that did not choose the expert, per chosen assignment.",
            reduction="mean",
            tag="moe/fill_rate",
            only_with="fill_rate",
            chart=Chart(
                "Routing",
                Axis("Fill rate", "of assignments", "{:.2%}", percent=True, from_zero=True),
                unless_zero=True,
            ),
            left_out_of_file=0.0,
        ),
    ] = field(default=0.0)
    loss_by_objective: Annotated[
        dict[str, float] | None,
        Metric(
            "Mean cross entropy of each [denoiser](data.md#objectives) in nats per target, by name, except denoisers "
            "without a sequence in the step; missing unless the step has a mixture.",
            tag="train/loss_by_objective/{key}",
            only_if_known=True,
            null_is_none=True,
        ),
    ] = None
    rows_computed: Annotated[
        int,
        Metric(
            "Rows that the routed experts computed, over all MoE layers and ranks: after drops, including rows "
            "that fill tiles, without padding.",
            tag="performance/rows_computed",
        ),
    ] = 0
    local_share: Annotated[
        float | None,
        Metric(
            "Choices of experts on the token's own node, as a share of all choices, mean over the layers; "
            "missing unless there are several nodes, or the [router](routers.md#nodes) simulates some.",
            reduction="mean",
            tag="moe/local_share",
            printed=Printed("local", "{:.1%}"),
            chart=Chart("Routing", Axis("Choices on the own node", "of choices", "{:.1%}", percent=True)),
            only_if_known=True,
            null_is_none=True,
        ),
    ] = None
    delta_per_layer: Annotated[
        list[float],
        Metric(
            "Cosine of the tokens with the gate row of their first choice, for each MoE layer, as defined by `delta` "
            "of the [capacity](capacity.md); empty unless the capacity is estimated."
        ),
    ] = field(default_factory=list)
    kept_per_layer: Annotated[
        list[float],
        Metric(
            "Number of an expert's own tokens in a micro-batch that have a cosine to its gate row of at least delta, "
            "for each MoE layer; empty unless the capacity is estimated."
        ),
    ] = field(default_factory=list)
    competitors_per_layer: Annotated[
        list[float],
        Metric(
            "Number of rivals, s q: tokens of a micro-batch with another first choice that have a cosine to an "
            "expert's gate row of at least delta, for each MoE layer; empty unless the capacity is estimated. Older "
            "versions counted own tokens too."
        ),
    ] = field(default_factory=list)
    drop_rate_by_position: Annotated[
        list[float],
        Metric("`drop_rate` over all layers in up to 16 equal ranges of sequence positions; empty for `dropless`."),
    ] = field(default_factory=list)
    exchange_time: Annotated[
        float,
        Metric(
            "Seconds spent in the experts' all-to-alls, forward and backward, mean over the ranks, including the wait "
            "for other ranks; on an accelerator, only until they are launched. 0 unless ranks share the experts."
        ),
    ] = 0.0
    exchanged_rows_per_layer: Annotated[
        list[list[int]],
        Metric(
            "Rows that all ranks sent to other ranks in the all-to-alls of each MoE layer, forward and backward: "
            "[inside nodes, between nodes]; empty unless ranks share the experts."
        ),
    ] = field(default_factory=list)
    exchanged_bytes_per_layer: Annotated[
        list[list[int]],
        Metric(
            "Bytes of these rows with their counts and gates, for each MoE layer: [inside nodes, between nodes]; empty "
            "unless ranks share the experts."
        ),
    ] = field(default_factory=list)
    save_time: Annotated[
        float,
        Metric(
            "Seconds that training waited for a checkpoint before this step, or only for the copy of the model if it "
            "is written in the background. Missing if there was none.",
            tag="performance/save_time",
            only_with="save_time",
            left_out_of_file=0.0,
        ),
    ] = 0.0
    profiled: Annotated[
        int, Metric("1 if the step was profiled, which takes longer; missing otherwise.", left_out_of_file=0)
    ] = 0

    @property
    def capacity(self) -> float:
        """Mean of `capacity_per_layer`; NaN without a limit."""
        return sum(self.capacity_per_layer) / len(self.capacity_per_layer) if self.capacity_per_layer else math.nan

    @property
    def inside_nodes_mb(self) -> float:
        """Megabytes (1e6) exchanged inside nodes, over all layers; NaN unless ranks share the experts."""
        sent = self.exchanged_bytes_per_layer
        return sum(inside for inside, _ in sent) / 1e6 if sent else math.nan

    @property
    def between_nodes_mb(self) -> float:
        """Megabytes (1e6) exchanged between nodes, over all layers; NaN unless ranks share the experts."""
        sent = self.exchanged_bytes_per_layer
        return sum(between for _, between in sent) / 1e6 if sent else math.nan


DERIVED: dict[str, Metric] = {
    "capacity": Metric(
        "Mean of `capacity_per_layer`.",
        tag="moe/capacity",
        printed=Printed("capacity", "{:.0f}"),
        chart=Chart(
            "Routing",
            Axis("Expert capacity", "assignments, mean over the layers", "{:,.0f}", from_zero=True),
            unless_zero=True,
        ),
        only_with="capacity_per_layer",
    ),
    "inside_nodes_mb": Metric(
        "Megabytes (1e6) exchanged inside nodes, over all layers.",
        tag="communication/inside_nodes_mb",
        chart=Chart("Speed", Axis("All-to-all inside nodes", "MB/step", "{:,.3g}", from_zero=True), unless_zero=True),
        only_with="exchanged_bytes_per_layer",
    ),
    "between_nodes_mb": Metric(
        "Megabytes (1e6) exchanged between nodes, over all layers.",
        tag="communication/between_nodes_mb",
        chart=Chart("Speed", Axis("All-to-all between nodes", "MB/step", "{:,.3g}", from_zero=True), unless_zero=True),
        only_with="exchanged_bytes_per_layer",
    ),
}
"""Rows of the properties of `StepMetrics`, which are derived from its fields and not in metrics.jsonl."""


@dataclass(frozen=True)
class EvaluationMetrics:
    """The whole validation set after `step` steps. A value of None is left out of the file."""

    step: Annotated[int, Metric("Number of optimiser steps done.")]
    val_loss: Annotated[
        float,
        Metric(
            "Mean cross entropy of the validation set, in nats per token, or for images in nats per image.",
            tag="validation/loss",
            printed=Printed("val_loss", "{:.4f}"),
            chart=Chart("Loss", Axis("Loss", NATS, "{:.4f}", smooth=True), line="validation"),
        ),
    ]
    val_bits_per_byte: Annotated[
        float | None,
        Metric(
            "Bits per byte of the validation text; missing for images.",
            tag="validation/bits_per_byte",
            printed=Printed("val_bits_per_byte", "{:.4f}"),
            chart=Chart("Loss", Axis("Validation bits per byte", BITS_PER_BYTE, "{:.4f}")),
        ),
    ] = None
    val_accuracy: Annotated[
        float | None,
        Metric(
            "Share of the validation images for which the right class has the highest score; missing for text.",
            tag="validation/accuracy",
            printed=Printed("val_accuracy", "{:.2%}"),
            chart=Chart("Loss", Axis("Validation accuracy", "", "{:.2%}", percent=True)),
        ),
    ] = None
    val_loss_by_domain: Annotated[
        dict[str, float] | None,
        Metric(
            "`val_loss` on the validation documents of each domain, by name; missing without "
            "[domains](data.md#text-that-differs-from-node-to-node).",
            tag="validation/loss_by_domain/{key}",
        ),
    ] = None
    val_loss_by_frequency: Annotated[
        dict[str, float] | None,
        Metric(
            "`val_loss` on targets that are `rare` and on those that are `frequent`: the frequent ids are the smallest "
            "set that makes up 80% of the training tokens, the rare ones are all others. Only in the last evaluation, "
            "with `metrics.loss_by_frequency`.",
            tag="validation/loss_by_frequency/{key}",
        ),
    ] = None
    val_loss_by_objective: Annotated[
        dict[str, float] | None,
        Metric(
            "Cross entropy of each [denoiser](data.md#objectives) in nats per target, by name: the denoisers take the "
            "full validation sequences in turn. Missing unless `data.objective.name` is `ul2`.",
            tag="validation/loss_by_objective/{key}",
        ),
    ] = None


Record = StepMetrics | EvaluationMetrics
"""A line of metrics.jsonl."""
Kind = type[StepMetrics] | type[EvaluationMetrics]


def _rows(kind: Kind) -> dict[str, Metric]:
    hints = get_type_hints(kind, include_extras=True)
    return {known.name: get_args(hints[known.name])[1] for known in fields(kind)}


ROWS: Mapping[Kind, Mapping[str, Metric]] = {
    StepMetrics: _rows(StepMetrics) | DERIVED,
    EvaluationMetrics: _rows(EvaluationMetrics),
}
"""The rows of each class by name: its fields in order, then those derived from them."""
PER_LAYER = frozenset(name for name, hint in get_type_hints(StepMetrics).items() if get_origin(hint) is list)
"""Metrics of a step that are lists."""


def scalars(record: Record) -> dict[str, float]:
    """TensorBoard tags and values of a record."""
    found: dict[str, float] = {}
    for name, row in ROWS[type(record)].items():
        value = getattr(record, name)
        if row.tag is None or value is None or not row.applies(record):
            continue
        if isinstance(value, dict):
            found |= {row.tag.format(key=key): entry for key, entry in value.items()}
        elif "{layer}" in row.tag:
            found |= {row.tag.format(layer=layer): entry for layer, entry in enumerate(value)}
        else:
            found[row.tag] = value
    return found


def printed(record: Record) -> dict[str, str]:
    """Names and values of a record as its run prints them."""
    return {
        row.printed.name: row.printed.show.format(getattr(record, name))
        for name, row in ROWS[type(record)].items()
        if row.printed and getattr(record, name) is not None and row.applies(record)
    }
