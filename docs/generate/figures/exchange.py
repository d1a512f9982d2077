"""What one token sends under each all-to-all: two nodes of two ranks, two experts per rank, four choices."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from figures.drawing import WIDTH, Drawing
from moeport.comm.exchange import EXCHANGES
from moeport.comm.load import Demand, Layout, Stages
from moeport.plan.routes import counted_routes

LAYOUT = Layout(nodes=2, ranks_per_node=2)
ALGORITHMS = ("flat", "hierarchical", "node_dedup")
EXPERTS, CHOSEN = 8, (1, 4, 5, 6)
"""The token is on rank 0, as is expert 1."""
ROW = 8192
"""Bytes of a row: 4,096 numbers in bfloat16."""
PANEL = 196
NODE_X, NODE_WIDTH, RANK_HEIGHT = (16, 244), 180, 46

Hops = Counter[tuple[int, int]]
"""Rows from rank to rank."""


def hops(algorithm: str) -> Hops:
    """The rows that the token sends to other ranks, on the way to its experts."""
    targets = [expert * LAYOUT.ranks // EXPERTS for expert in CHOSEN]
    relays = [target // LAYOUT.ranks_per_node * LAYOUT.ranks_per_node for target in targets]
    ways: dict[str, Iterable[tuple[int, int]]] = {
        "flat": [(0, target) for target in targets],
        "hierarchical": [(0, relay) for relay in relays] + list(zip(relays, targets, strict=True)),
        "node_dedup": [(0, relay) for relay in {*relays}] + list({*zip(relays, targets, strict=True)}),
    }
    return Counter(sorted((source, target) for source, target in ways[algorithm] if source != target))


def sent(algorithm: str) -> tuple[float, float]:
    """Bytes of rows that the token sends inside nodes and between them, as the planner counts them."""
    demand = Demand(tokens=1, top_k=len(CHOSEN), num_experts=EXPERTS, row_bytes=ROW)
    stages = Stages(LAYOUT, demand, counted_routes(LAYOUT, demand, np.array([CHOSEN])))
    loads = [load for load in EXCHANGES[algorithm].load(stages) if load.stage == "dispatch"]
    ranks = LAYOUT.ranks  # of which one token stands for that of each
    return sum(load.intra_bytes for load in loads) / ranks, sum(load.inter_bytes for load in loads) / ranks


def exchange() -> str:
    """A panel for each algorithm."""
    drawing = Drawing("The rows of one token under each all-to-all", PANEL * len(ALGORITHMS) + 50)
    for number, name in enumerate(ALGORITHMS):
        _panel(drawing, 12 + PANEL * number, name)
    y = PANEL * len(ALGORITHMS) + 8
    chosen = ", ".join(f"e{expert}" for expert in CHOSEN)
    drawing.text(WIDTH / 2, y + 12, f"The token is on rank 0 and chose the experts {chosen}.", "small")
    drawing.text(
        WIDTH / 2, y + 30, f"A row takes {ROW // 1024} KiB; on the way back the same rows travel.", "small muted"
    )
    return drawing.svg()


def worked() -> str:
    """The numbers of the picture as a table."""
    rows = []
    for name in ALGORITHMS:
        inside, between = (f"{size / ROW:g} rows, {size / 1024:g} KiB" for size in sent(name))
        rows.append(
            f"| `{name}` | {between} | {inside} |".replace(" 1 rows", " 1 row").replace("0 rows, 0 KiB", "nothing")
        )
    return "\n".join(["| `comm.algorithm` | Between nodes | Inside a node |\n|---|---|---|", *rows])


def _panel(drawing: Drawing, top: float, name: str) -> None:
    inside, between = (int(size / 1024) for size in sent(name))
    drawing.text(16, top + 16, name, "bold left")
    drawing.text(WIDTH - 16, top + 16, f"between nodes {between} KiB, inside {inside} KiB", "small right")
    for node, left in enumerate(NODE_X):
        drawing.box(left, top + 26, NODE_WIDTH, 148, "plain", 8)
        drawing.text(left + NODE_WIDTH / 2, top + 42, f"node {node}", "small muted")
    for rank in range(LAYOUT.ranks):
        x, y = _corner(top, rank)
        drawing.box(x, y, 112, RANK_HEIGHT, "card")
        drawing.text(x + 56, y + 16, f"rank {rank}" + (": token" if rank == 0 else ""), "small")
        for place, expert in enumerate(range(rank * 2, rank * 2 + 2)):
            drawing.box(x + 8 + 49 * place, y + 22, 46, 19, "green" if expert in CHOSEN else "plain", 4)
            drawing.text(x + 31 + 49 * place, y + 36, f"e{expert}", "small")
    for (source, target), rows in hops(name).items():
        crosses = source // LAYOUT.ranks_per_node != target // LAYOUT.ranks_per_node
        (x, y), (to_x, to_y) = _corner(top, source), _corner(top, target)
        if crosses:
            way = [(x + 112, y + 12 + 12 * (target % 2)), (to_x - 1, to_y + 14)]
        else:
            way = [(to_x, y + 23), (to_x - 18, y + 23), (to_x - 18, to_y + 23), (to_x - 1, to_y + 23)]
        drawing.line(way, "line thick " + ("orange" if crosses else "blue"), arrow=True)
        words = f"{rows} row{'s' * (rows > 1)}"
        if crosses:
            middle = (way[0][1] + way[1][1]) / 2
            drawing.text((way[0][0] + way[1][0]) / 2, middle + (22 if target % 2 else -6), words, "small")
        else:
            drawing.text(to_x - 22, (y + to_y) / 2 + 27, words, "small right")


def _corner(top: float, rank: int) -> tuple[float, float]:
    """The upper left corner of a rank's box."""
    node, place = divmod(rank, LAYOUT.ranks_per_node)
    x = NODE_X[node] + (12 if node == 0 else NODE_WIDTH - 124)
    return x, top + 50 + 62 * place
