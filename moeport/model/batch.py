"""A batch of examples. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from moeport.core.array import Array

ArrayT = TypeVar("ArrayT", bound=Array)
"""np.ndarray for a batch on the host, Array for one on the device."""
OtherT = TypeVar("OtherT", bound=Array)
"""The same of another batch."""


@dataclass(frozen=True)
class Batch(Generic[ArrayT]):
    """Examples, on the host or as arrays of a backend."""

    token_BS: ArrayT
    """Input ids (B, S); for images the patches, (B, S, P) floats."""
    target_BS: ArrayT
    """Next ids (B, S); for images the classes, (B, 1)."""
    noise: Mapping[str, ArrayT] = field(default_factory=dict)
    """Uniform random numbers (B, S) by `layer.name`, for routers that use them; empty outside training."""
    document_BS: ArrayT | None = None
    """Where each token's document begins, an index of the sequence; attention then stays within documents, and their
    positions count from there. None: a sequence is one document.
    """
    domain_B: ArrayT | None = None
    """The number of each example's domain, in the order of data.domains. None: there are no domains, or they are not
    known."""
    weight_BS: ArrayT | None = None
    """Weight of each target in the loss, 0 or one number for all that count, with a mean of 1 over a step. None: all
    count alike."""

    @property
    def arrays(self) -> tuple[ArrayT, ...]:
        """All arrays, in the order in which `mapped` takes them."""
        optional = (x for x in (self.document_BS, self.domain_B, self.weight_BS) if x is not None)
        return (self.token_BS, self.target_BS, *self.noise.values(), *optional)

    def mapped(self, function: Callable[[ArrayT], OtherT]) -> Batch[OtherT]:
        """The batch of what a function makes of each array, such as its copy on a device."""
        return Batch(
            function(self.token_BS),
            function(self.target_BS),
            {name: function(u_BS) for name, u_BS in self.noise.items()},
            None if self.document_BS is None else function(self.document_BS),
            None if self.domain_B is None else function(self.domain_B),
            None if self.weight_BS is None else function(self.weight_BS),
        )

    def rows(self, start: int, end: int) -> Batch[ArrayT]:
        """Some of the examples."""
        return self.mapped(lambda x: cast(ArrayT, x[start:end]))
