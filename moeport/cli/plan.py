"""`moeport plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeport.cli.options import Flags, Overrides, grouped, output_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from moeport.cli.plan_options import GivenSpeed
    from moeport.config import Config
    from moeport.plan.cost import Cluster, Links
    from moeport.plan.fit import Sample
    from moeport.plan.memory import Limits

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG", help="The YAML config; without it, plan the exchanges measured in the files of --from."
    ),
]
Measured = Annotated[
    list[Path] | None,
    typer.Option(
        "--from", metavar="FILE.json", help="Output of moeport bench comm --json on a cluster of this kind. Repeatable."
    ),
]
Intra = Annotated[
    str | None,
    typer.Option(metavar="400GB/s,2us", help="Links inside a node: bandwidth per rank, latency per message."),
]
Inter = Annotated[
    str | None, typer.Option(metavar="25GB/s,5us", help="Links between nodes: bandwidth per node, latency per message.")
]
TrafficKind = Annotated[
    str, typer.Option(help="How tokens choose experts: uniform, zipf, local:F, or a .npy file of ids (tokens, K).")
]
ComputeMs = Annotated[
    float | None, typer.Option(min=0, help="Compute time of a rank per step in milliseconds, as measured on one rank.")
]
Flops = Annotated[
    str | None, typer.Option(metavar="150T", help="Instead, the floating-point operations per second of a rank.")
]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        metavar="RUN_DIR@2x4",
        help="Instead, a run of moeport train on NODESxRANKS_PER_NODE to take it from. Repeatable.",
    ),
]


@dataclass(frozen=True)
class Machines:
    """The machines that are planned for."""

    nodes: int = 1
    ranks_per_node: int = 8
    memory: str | None = None


MACHINES = Flags(
    nodes=typer.Option(min=1, help="Number of nodes."),
    ranks_per_node=typer.Option(min=1, help="Ranks per node."),
    memory=typer.Option(
        metavar="80GB,512GB",
        help="Memory of an accelerator and of a node (on CPUs, of a node only); larger placements are left out.",
    ),
)
JsonFile = Annotated[Path | None, output_file("--json", help="Write all figures as JSON.")]


@grouped
def plan(
    machines: Annotated[Machines, MACHINES],
    config_file: ConfigFile = None,
    measured: Measured = None,
    intra: Intra = None,
    inter: Inter = None,
    traffic: TrafficKind = "uniform",
    compute_ms: ComputeMs = None,
    flops: Flops = None,
    steps: Steps = None,
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Predict all-to-all, step time and memory on a cluster, and show the best placement and algorithm, and why.

    Links are fitted to the measurements of `moeport bench comm --json`, or given as options, which take precedence.
    Example: moeport plan configs/quickstart.yaml --set training.batch_size=32 --nodes 4 --ranks-per-node 8
    --intra 400GB/s,2us --inter 25GB/s,5us
    """
    from moeport.cli.plan_options import GivenSpeed, given_links, memory_limits, sharing
    from moeport.config import load_config
    from moeport.files import write_json
    from moeport.pages.console import wide_console
    from moeport.plan import text
    from moeport.plan.cost import Cluster
    from moeport.plan.fit import fit, read_samples
    from moeport.plan.routes import routes

    samples = [sample for path in measured or () for sample in read_samples(path, routes)]
    fitted = fit(samples) if samples else None
    shares, speed = sharing(samples), GivenSpeed(compute_ms, flops, tuple(steps or ()))
    cluster = Cluster(
        machines.nodes, machines.ranks_per_node, given_links(fitted, machines.nodes, intra, inter), shares
    )
    config = load_config(config_file, overrides or ()) if config_file else None
    limits = memory_limits(config, cluster.ranks_per_node, machines.memory) if config else None
    figures = {"nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node, "traffic": traffic}
    figures |= {"links": text.plain(cluster.links), "fit_errors": fitted.errors.tolist() if fitted else []}
    if config is None or limits is None:
        answer, found = _exchanges(cluster, samples, traffic)
    else:
        links = fitted.links if fitted else cluster.links
        answer, found = _placements(config, cluster, speed, links, traffic, limits)
    console = wide_console()
    for each in (*text.cluster_lines(cluster, fitted), *answer):
        console.print(each, soft_wrap=isinstance(each, str))
    if json_file:
        write_json(json_file, figures | found)


def _exchanges(cluster: Cluster, samples: Sequence[Sample], traffic: str) -> tuple[list[str | Table], dict[str, Any]]:
    """What to print on the measured exchanges, with the experts divided among all ranks, and the same as figures."""
    from moeport.comm.load import Layout, Stages
    from moeport.errors import UserError
    from moeport.plan import text
    from moeport.plan.layer import exchange_costs, reason
    from moeport.plan.routes import routes

    if not samples:
        raise UserError("CONFIG or --from FILE.json is needed: they say how many tokens go to how many experts")
    layout = Layout(cluster.nodes, cluster.ranks_per_node)
    found = []
    for demand in dict.fromkeys(sample.demand for sample in samples if sample.demand):
        if demand.num_experts % layout.ranks:
            raise UserError(
                f"--nodes {layout.nodes} --ranks-per-node {layout.ranks_per_node}: the {demand.num_experts} experts "
                f"of the files do not divide among {layout.ranks} ranks; expected a divisor of {demand.num_experts}"
            )
        stages = Stages(layout, demand, routes(traffic, layout, demand), cluster.sharing)
        costs = exchange_costs(stages, cluster.links)
        found.append((demand, costs, reason(stages, costs)))
    figures = [
        text.plain(demand) | {"costs": text.plain(costs), "reason": text.sentence(why)} for demand, costs, why in found
    ]
    return [text.exchange_table(found)], {"exchanges": figures}


def _placements(
    config: Config, cluster: Cluster, given: GivenSpeed, links: Links, traffic: str, limits: Limits
) -> tuple[list[str | Table], dict[str, Any]]:
    """What to print on the placements of a config that fit the cluster, and the same as figures.

    `links` are those of the runs that the speed is fitted to.
    """
    from functools import partial

    from moeport.cli.plan_options import vocabulary
    from moeport.plan import text
    from moeport.plan.memory import fitting, memory_lines
    from moeport.plan.planner import Planner
    from moeport.plan.routes import routes

    planner = Planner(config, vocabulary(config), cluster, partial(routes, traffic))
    fitted = given.fitted(links, cluster.shares, traffic)
    found = fitting(planner.places(fitted.speed if fitted else given.speed(planner)), limits)
    lines = [*text.placement_lines(found), *memory_lines(found[0], limits)]
    answer = [*(text.speed_lines(fitted) if fitted else ()), text.placement_table(found), *lines]
    errors = {"step_errors": fitted.errors.tolist()} if fitted else {}
    return answer, errors | {"placements": [text.placement_figures(each) for each in found]}
