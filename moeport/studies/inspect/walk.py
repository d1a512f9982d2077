"""A model computed one layer at a time: all text goes through a layer before the next one's weights are read.

So the weights of one layer are in memory, with the hidden states of the text that is inspected.
Shape suffixes as in `moeport.core.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeport.backends.base import Backend
from moeport.core.array import Array
from moeport.core.dispatch import RunPart
from moeport.core.drop import drop_overflow
from moeport.core.ops import Ops
from moeport.core.parameters import subtree
from moeport.core.routing import RouterContext, Routing, SoftRouting
from moeport.core.weights import Weights
from moeport.errors import UserError
from moeport.model.batch import Batch
from moeport.model.capacity import expert_capacity
from moeport.model.decoder import DecoderLM
from moeport.model.forward_pass import BlockOutput, Pass
from moeport.model.moe import MoELayer
from moeport.studies.inspect.texts import Portion


@dataclass(frozen=True)
class Routed:
    """What one layer did with one portion of the text, in numpy."""

    portion: Portion
    x_TD: np.ndarray
    """What router and experts read, in the compute type of the router: float32 or wider."""
    probs_TE: np.ndarray
    """Normalised scores of the E experts."""
    token_N: np.ndarray
    """The token of each assignment."""
    expert_N: np.ndarray
    """Its expert; E where the router declined."""
    served_N: np.ndarray
    """Whether an expert computed it: it was not declined, and the capacity had room."""
    capacity: int | None
    """Most assignments that an expert served; None: there is no limit."""
    cosine_TE: np.ndarray | None
    """Cosines of tokens and gate rows; None for a router without gate rows."""


@dataclass(frozen=True)
class Layer:
    """One layer with experts: its weights, and what it did with the text."""

    name: str
    """The layer's label, as in metrics and reports."""
    moe: MoELayer
    params: Mapping[str, np.ndarray]
    """Its parameters by the names of `MoELayer.parameter_specs`."""
    routed: Sequence[Routed]
    """By portion."""

    @property
    def num_experts(self) -> int:
        """E."""
        return self.moe.config.num_experts


@dataclass
class _Stream:
    """A portion on its way through the blocks."""

    portion: Portion
    batch: Batch[Array]
    x_BSD: Array
    runs: list[tuple[Pass, RouterContext]]
    """How each block is run."""


class Walk:
    """One pass over the text. Iterating gives the layers with experts in order; afterwards `nats` is known.

    Args:
        lm: the shapes.
        weights: the parameters by name; those of one block are read at a time.
        backend: what computes.
        portions: the text.
        without_first_choice: whether every token goes without its first choice in every layer: the assignment is
            unrouted, and the gates of the others stay as they are.
        entered: is called before each block, with its number.
    """

    def __init__(
        self,
        lm: DecoderLM,
        weights: Weights | Mapping[str, np.ndarray],
        backend: Backend,
        portions: Sequence[Portion],
        without_first_choice: bool = False,
        entered: Callable[[int], None] = lambda _: None,
    ):
        self.lm, self.weights, self.backend, self.portions = lm, weights, backend, portions
        self.without_first_choice, self.entered = without_first_choice, entered
        self._streams: list[_Stream] = []

    def __iter__(self) -> Iterator[Layer]:
        names = iter(self.lm.config.moe_layer_names)
        outside = self._outside()
        self._streams = [self._start(portion, outside) for portion in self.portions]
        for block in self.lm.blocks:
            self.entered(block.layer)
            host = self._read(f"layers.{block.layer}.")
            params = {name: self._placed(value) for name, value in host.items()}
            routed: dict[str, list[Routed]] = {suffix: [] for suffix in block.moe}
            for stream in self._streams:
                run, context = stream.runs[block.layer]
                watch = _Watch(self, stream, params, block.moe, context, routed)
                stream.x_BSD, _ = block.forward(run, params, stream.x_BSD, context, run_part=watch.part_of)
            for suffix, moe in block.moe.items():
                yield Layer(next(names), moe, subtree(f"moe{suffix}", host), routed[suffix])

    def nats(self) -> np.ndarray:
        """Negative log-likelihood of every target, in the order of the portions; after all layers were given."""
        outside, found = self._outside(), []
        for stream in self._streams:

            def finished(run: Pass, x_BSD: Array, context: RouterContext, stream: _Stream = stream) -> BlockOutput:
                return stream.x_BSD, ()

            run = replace(self._pass(stream.portion), run_block=finished)
            nats_BS = self.lm.token_losses(run, outside, stream.batch)
            found.append(self.backend.ops.to_numpy(nats_BS).astype(np.float64).reshape(-1))
        return np.concatenate(found)

    def _start(self, portion: Portion, outside: Mapping[str, Array]) -> _Stream:
        """A portion before the first block: `Transformer.hidden`, whose blocks only take note of how they are run."""
        runs: list[tuple[Pass, RouterContext]] = []
        first: list[Array] = []

        def noted(run: Pass, x_BSD: Array, context: RouterContext) -> BlockOutput:
            runs.append((replace(run, run_block=None), context))
            first.append(x_BSD)
            return x_BSD, ()

        batch = portion.batch.mapped(self.backend.ops.from_numpy)
        self.lm.hidden(replace(self._pass(portion), run_block=noted), outside, batch)
        return _Stream(portion, batch, first[0], runs)

    def _pass(self, portion: Portion) -> Pass:
        return self.lm.forward_pass(self.backend.ops, portion.batch.token_BS.shape[1], self.backend.dtype)

    def _outside(self) -> dict[str, Array]:
        """The parameters outside the blocks."""
        specs = [*self.lm.embedding_specs(), *self.lm.head_specs()]
        names = [*(spec.name for spec in specs), "final_norm.weight"]
        return {name: self._placed(self.weights[name]) for name in names}

    def _read(self, prefix: str) -> dict[str, np.ndarray]:
        """Parameters whose names begin with a prefix, by the rest of their names; untrained state may be missing."""
        found = {}
        for spec in self.lm.parameter_specs():
            if spec.name.startswith(prefix):
                value = self.weights[spec.name] if spec.name in self.weights else np.zeros(spec.shape, np.float32)
                found[spec.name[len(prefix) :]] = value
        return found

    def _placed(self, value: np.ndarray) -> Array:
        return self.backend.ops.from_numpy(value.astype(self.backend.parameter_dtype))


class _Watch:
    """Runs the router of one block on one portion, and keeps what it chose."""

    def __init__(
        self,
        walk: Walk,
        stream: _Stream,
        params: Mapping[str, Array],
        layers: Mapping[str, MoELayer],
        context: RouterContext,
        routed: Mapping[str, list[Routed]],
    ):
        self.walk, self.stream, self.params, self.layers = walk, stream, params, layers
        self.context, self.routed = context, routed

    def part_of(self, suffix: str) -> RunPart:
        """What supplies the parts of one layer of the block with their parameters."""

        def run_part(part: str, compute: Callable[..., Any], *arrays: Array) -> Any:
            own = subtree(f"moe{suffix}", self.params)
            result = compute(subtree(part, own), *arrays)
            if part != "router":
                return result
            if isinstance(result, SoftRouting):
                raise UserError(
                    "model.moe.router.name: soft gives every expert a share of every token, so there are no "
                    "assignments to inspect; expected a run with another router"
                )
            chosen = _without_first(self.walk.backend.ops, result) if self.walk.without_first_choice else result
            self.routed[suffix].append(self._routed(self.layers[suffix], own, chosen, *arrays))
            return chosen

        return run_part

    def _routed(self, moe: MoELayer, params: Mapping[str, Array], chosen: Routing, x_TD: Array) -> Routed:
        ops, config = self.walk.backend.ops, moe.config
        capacity = expert_capacity(ops, config.capacity, params, chosen)
        kept = chosen if capacity is None else drop_overflow(ops, chosen, capacity, config.capacity.drop)
        cosine_TE = (
            moe.router.gate_cosines(ops, subtree("router", params), x_TD) if config.router.has_gate_rows else None
        )
        if chosen.choices_per_token is None:
            assert chosen.token_N is not None
            token_N = ops.to_numpy(chosen.token_N)
        else:
            token_N = np.repeat(np.arange(chosen.num_tokens), chosen.choices_per_token)
        return Routed(
            self.stream.portion,
            ops.to_numpy(ops.accurate(x_TD)),
            ops.to_numpy(chosen.probs_TE)[:, : chosen.num_experts],
            token_N,
            ops.to_numpy(chosen.expert_N),
            ops.to_numpy(kept.expert_N) < chosen.num_experts,
            capacity if capacity is None or isinstance(capacity, int) else int(ops.to_numpy(capacity).item()),
            None if cosine_TE is None else ops.to_numpy(cosine_TE),
        )


def _without_first(ops: Ops, routing: Routing) -> Routing:
    """The routing in which the first choice of every token is unrouted."""
    choices = routing.choices_per_token
    assert choices is not None  # where experts choose, no token has a first choice, and nobody asks
    expert_TK, weight_TK = (ops.reshape(x_N, (-1, choices)) for x_N in (routing.expert_N, routing.weight_N))
    none_T1 = expert_TK[:, :1] * ops.index(0) + ops.index(routing.num_experts)
    zero_T1 = weight_TK[:, :1] * ops.constant_like(0.0, weight_TK)
    return replace(
        routing,
        expert_N=ops.reshape(ops.concat([none_T1, expert_TK[:, 1:]], axis=1), (-1,)),
        weight_N=ops.reshape(ops.concat([zero_T1, weight_TK[:, 1:]], axis=1), (-1,)),
        all_routed=False,
    )
