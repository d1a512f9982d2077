"""The layers that are timed, and how their sizes make FLOPs and bytes. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A layer, the number of its tokens, and how they are spread over the experts."""

    name: str
    tokens: int
    """T."""
    width: int
    """D."""
    experts: int
    """E."""
    top_k: int
    """k."""
    hidden: int
    """F, of one expert."""
    zipf: float = 0.0
    """Expert number r, in an arbitrary order, is preferred by r to the power of minus this; 0: all alike."""

    @property
    def label(self) -> str:
        """Its name, and its loads if they are not even."""
        return self.name + (f" Zipf({self.zipf:g})" if self.zipf else "")

    def flops(self, backward: bool) -> float:
        """FLOPs of the experts' products."""
        return (18.0 if backward else 6.0) * self.tokens * self.top_k * self.width * self.hidden

    def least_held(self, item_bytes: int) -> int:
        """Bytes that any layer holds between forward and backward: tokens, pre-activations, gates, indices."""
        rows = self.tokens * self.top_k
        return item_bytes * (self.tokens * self.width + 2 * rows * self.hidden) + 2 * 4 * rows

    def small(self) -> Shape:
        """The same kind of layer in a size in which it is compared with float32."""
        return replace(
            self,
            tokens=min(self.tokens, 256),
            width=min(self.width, 128),
            experts=min(self.experts, 16),
            hidden=min(self.hidden, 128),
            zipf=0.0,
        )

    def as_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral", 16384, 4096, 8, 2, 14336),
        Shape("olmoe", 16384, 2048, 64, 8, 1024),
        Shape("qwen3", 16384, 2048, 128, 8, 768),
        Shape("deepseek", 16384, 7168, 256, 8, 2048),
        Shape("a", 4096, 512, 8, 2, 1024),
        Shape("b", 8192, 256, 64, 8, 512),
        Shape("tiny", 128, 64, 8, 2, 64),
        Shape("tiny-many", 128, 32, 16, 4, 32),
    )
}
"""Mixtral-8x7B, OLMoE-1B-7B, Qwen3-30B-A3B and DeepSeek-V3; two for CPUs; two that only check the benchmark."""
ON_DEVICES = ("mixtral", "olmoe", "qwen3", "deepseek")
ON_CPUS = ("a", "b")
TINY = ("tiny", "tiny-many")

CURVES = {
    "tokens": ("tokens", (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)),
    "experts": ("experts", (1 / 8, 1 / 4, 1 / 2, 1, 2)),
    "top_k": ("top_k", (1 / 8, 1 / 4, 1 / 2, 1, 2)),
}
"""By name: the size that changes, and the factors of that of the shape."""


def curve(shape: Shape, name: str) -> list[Shape]:
    """Shapes that differ from a shape in one size only, the smallest first."""
    field, factors = CURVES[name]
    sizes = sorted({max(1, round(getattr(shape, field) * factor)) for factor in factors})
    if name == "experts":
        sizes = [size for size in sizes if size >= shape.top_k]
    if name == "top_k":
        sizes = [size for size in sizes if size <= shape.experts]
    return [replace(shape, **{"name": f"{shape.name} {field}={size}", field: size}) for size in sizes]
