"""The diagrams of the documentation, each a whole file that `make generate` writes."""

from collections.abc import Callable

from figures.bound import bound
from figures.double_benchmark import double_benchmark
from figures.exchange import exchange
from figures.layers import layers
from figures.moe_layer import moe_layer
from figures.parity import parity

FIGURES: dict[str, Callable[[], str]] = {
    "docs/images/capacity-bound.svg": bound,
    "docs/images/double-benchmark.svg": double_benchmark,
    "docs/images/exchange.svg": exchange,
    "docs/images/layers.svg": layers,
    "docs/images/moe-layer.svg": moe_layer,
    "docs/images/parity-parts.svg": parity,
}
"""Of each file what it holds."""
