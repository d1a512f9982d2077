"""What a contender is. The table of all of them is in `contest.contenders`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from contest.problem import Problem

Weights = Sequence[Tensor]


@dataclass
class Layer:
    """A contender's layer with the problem's weights."""

    run: Callable[[Tensor], Tensor]
    """From tokens (T, D) to outputs (T, D)."""
    parameters: Weights
    """What gradients are taken of, besides the tokens."""
    common: Callable[[Weights], Weights] = lambda gradients: gradients
    """From the gradients of `parameters` to those of w_in, w_out and router, in the layout of the problem."""
    backward: bool = True
    """Whether there is a backward pass."""


@dataclass(frozen=True)
class Contender:
    """A layer to time."""

    name: str
    build: Callable[[Problem], Layer]
    packages: tuple[str, ...] = ()
    """Packages that it needs."""
    devices: tuple[str, ...] = ()
    """Types of devices that it runs on; empty: all."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Types that it computes in; empty: all."""
    group: str = "peer"
    """`ours`, `peer`, or `limit`: no layer, but what a layer cannot beat."""
    copies: bool = False
    """Whether it has weights of its own, as large as the problem's, for as long as it takes part."""
    differs: str = ""
    """Why its values cannot be those of the reference; empty: they must be."""

    def missing(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, before it has been tried; None if nothing is known against it."""
        absent = [package for package in self.packages if find_spec(package) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        if self.devices and device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if self.dtypes and dtype not in self.dtypes:
            return f"computes in {', '.join(str(each).removeprefix('torch.') for each in self.dtypes)} only"
        return None
