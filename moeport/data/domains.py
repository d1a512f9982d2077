"""Text of several domains, of which each node of a job trains on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from moeport.data.mixture import MixedTokens
from moeport.data.packed import PackedTokens
from moeport.data.sampler import Sampler


class DomainTokens(MixedTokens):
    """The streams of several domains, each cut into sequences by itself; their indices follow each other.

    Vocabulary ids are counted as if every domain had the same share, so that a table that is made of the counts does
    not depend on the nodes.

    Args:
        parts: by name, the stream of each domain, all with the same sequence length.
    """

    def __init__(self, parts: Mapping[str, PackedTokens | MixedTokens]):
        super().__init__(parts, dict.fromkeys(parts, 1.0))

    def dealt(self, dealing: Dealing, seed: int) -> DomainSampler:
        """Which sequences a step trains on."""
        samplers = [
            stream.sampler(count, seed) if isinstance(stream, MixedTokens) else Sampler(size, count, seed, name)
            for (name, stream), size, count in zip(
                self.parts.items(), np.diff(self._starts).tolist(), dealing.counts.values(), strict=True
            )
        ]
        return DomainSampler(dealing.domain_B, samplers, self._starts[:-1])

    def windows_by_domain(self, batch_size: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """`windows`, each with the index of its domain."""
        for domain, stream in enumerate(self._streams):
            for window in stream.windows(batch_size):
                yield domain, window


class DomainSampler(Sampler):
    """Draws each sequence of a batch from its domain, whose sequences come in a new random order in every epoch.

    A domain with n sequences in a batch gives those that a run with a batch of n and no other domain would train on, so
    a step depends only on its number, the seed and how many sequences each domain has.

    Args:
        domain_B: the domain of each sequence of a batch.
        samplers: by domain, which of its sequences a step trains on.
        starts: by domain, the index of its first sequence.
    """

    def __init__(self, domain_B: np.ndarray, samplers: Sequence[Sampler], starts: np.ndarray):
        self.batch_size = len(domain_B)
        self._domain_B, self._samplers, self._offsets = domain_B, samplers, starts

    @override
    def indices(self, step: int) -> np.ndarray:
        index_B = np.empty(self.batch_size, np.int64)
        for domain in np.unique(self._domain_B):
            index_B[self._domain_B == domain] = self._offsets[domain] + self._samplers[domain].indices(step)
        return index_B


@dataclass(frozen=True)
class Dealing:
    """Which node each sequence of a batch belongs to. Node n trains on domain n modulo the number of domains."""

    names: tuple[str, ...]
    """Of the domains."""
    node_B: np.ndarray
    """The node of each sequence."""
    domain_B: np.ndarray
    """The domain of each sequence."""

    @classmethod
    def of(
        cls, names: Sequence[str], batch_size: int, ranks: Sequence[int], parts: int, simulated: int | None
    ) -> Dealing:
        """The sequences of a batch, of which each rank has consecutive ones.

        Args:
            names: those of the domains.
            batch_size: sequences of a step, over all ranks.
            ranks: the node of each rank.
            parts: micro-batches of a rank.
            simulated: number of nodes that each micro-batch is divided among; None: the ranks' own nodes.
        """
        if simulated is not None:
            size = batch_size // (len(ranks) * parts)
            node_B = np.tile(np.arange(size) * simulated // size, len(ranks) * parts)
        else:
            nodes = [*dict.fromkeys(ranks)]
            node_B = np.repeat([nodes.index(node) for node in ranks], batch_size // len(ranks))
        return cls(tuple(names), node_B, node_B % len(names))

    @property
    def counts(self) -> dict[str, int]:
        """By domain, the sequences of a step."""
        return dict(zip(self.names, np.bincount(self.domain_B, minlength=len(self.names)).tolist(), strict=True))

    def described(self) -> list[str]:
        """Lines that say what each domain gives, and which ones are never trained on."""
        nodes = sorted({*self.node_B.tolist()})
        listed = [
            f"{name} {count / len(self.node_B):.1%} of the sequences ({_named(nodes[domain :: len(self.names)])})"
            for domain, (name, count) in enumerate(self.counts.items())
            if count
        ]
        lines = [f"domains     {'; '.join(listed)}"]
        if unused := [name for name, count in self.counts.items() if not count]:
            there = "is one node" if len(nodes) == 1 else f"are {len(nodes)} nodes"
            lines.append(
                f"warning: data.domains: no node trains on {', '.join(unused)}: node n trains on domain n modulo "
                f"{len(self.names)}, and there {there}; start more nodes, or simulate them with model.moe.router.nodes"
            )
        return lines


def _named(nodes: Sequence[int]) -> str:
    return f"node{'s'[: len(nodes) > 1]} {', '.join(map(str, nodes))}"
