"""The stages of an expert block: its products, and the passes between them that a form of it may fuse into them.

Work of a block on R rows, per product: 2 R D F FLOPs. SwiGLU has three such products forward, and twice as many
backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from moeport.backends.torch.cuda import passes
from moeport.backends.torch.cuda.layout import Layout


class Passes(Protocol):
    """The functions of `passes`, which say what each is to do."""

    gather: Callable[[Tensor, Layout], Tensor]
    activate: Callable[[Tensor, str], Tensor]
    activate_backward: Callable[[Tensor, Tensor, Tensor | None, Layout, str], tuple[Tensor, Tensor, Tensor | None]]
    combine: Callable[[Tensor, Tensor | None, Layout], Tensor]
    clear_unused: Callable[[Tensor, Layout], Tensor]


class Stages(Protocol):
    """How a block is computed. Rows behind the last expert's may hold anything in what these return."""

    def up(self, x: Tensor, w_in: Tensor, layout: Layout, activation: str) -> tuple[Tensor, Tensor]:
        """The hidden states before the activation, and after it."""

    def down(self, activated: Tensor, w_out: Tensor, layout: Layout) -> Tensor:
        """The output of each row (R, D), without its gate."""

    def down_backward(
        self, grad: Tensor, gate_N: Tensor | None, w_out: Tensor, hidden: Tensor, layout: Layout, activation: str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """From the gradient of the result, those of the hidden states, of the gates and of w_out."""

    def up_backward(self, grad: Tensor, x: Tensor, w_in: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """From the gradient of the hidden states, those of each row of x (R, D), and of w_in."""

    def combine(self, y_RD: Tensor, gate_N: Tensor | None, layout: Layout) -> Tensor:
        """The sum of each token's rows, weighted by their gates; see `passes.combine`."""


def grouped_mm(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """torch's grouped product.

    Of (R, I) with (E, I, O) it makes (R, O); of (I, R) with (R, O) it makes (E, I, O), along the rows of each expert.
    """
    product: Tensor = torch.nn.functional.grouped_mm(a, b, offs=ends_E)
    return product


class GroupedStages:
    """A grouped product at a time, and passes over memory between them.

    Args:
        passes: the passes.
        product: computes as `grouped_mm` does.
    """

    def __init__(self, passes: Passes, product: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_mm):
        self.passes, self.product = passes, product

    def up(self, x: Tensor, w_in: Tensor, layout: Layout, activation: str) -> tuple[Tensor, Tensor]:
        """Gather, product, activation."""
        hidden = self.product(self.passes.gather(x, layout), w_in.mT, layout.ends_E)
        return hidden, self.passes.activate(hidden, activation)

    def down(self, activated: Tensor, w_out: Tensor, layout: Layout) -> Tensor:
        """One product."""
        return self.product(activated, w_out.mT, layout.ends_E)

    def down_backward(
        self, grad: Tensor, gate_N: Tensor | None, w_out: Tensor, hidden: Tensor, layout: Layout, activation: str
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gather, product, the activation's pass, product along the rows."""
        grad_RD = self.passes.gather(grad, layout)
        grad_activated = self.product(grad_RD, w_out, layout.ends_E)
        grad_hidden, activated, grad_gate_N = self.passes.activate_backward(
            hidden, grad_activated, gate_N, layout, activation
        )
        del grad_activated
        grad_w_out = self.product(grad_RD.mT, activated, layout.ends_E)
        return grad_hidden, grad_gate_N, self.passes.clear_unused(grad_w_out, layout)

    def up_backward(self, grad: Tensor, x: Tensor, w_in: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Gather, product along the rows, product."""
        grad_w_in = self.product(grad.mT, self.passes.gather(x, layout), layout.ends_E)
        return self.product(grad, w_in, layout.ends_E), self.passes.clear_unused(grad_w_in, layout)

    def combine(self, y_RD: Tensor, gate_N: Tensor | None, layout: Layout) -> Tensor:
        """As `passes.combine`."""
        return self.passes.combine(y_RD, gate_N, layout)


def _plain() -> Stages:
    return GroupedStages(_as_passes(passes))


def _triton_passes() -> Stages:
    return GroupedStages(_as_passes(import_module("moeport.backends.torch.cuda.triton.passes")))


def _triton_products(name: str) -> Stages:
    stages: Stages = getattr(import_module("moeport.backends.torch.cuda.triton.products"), name)()
    return stages


def _as_passes(module: Any) -> Passes:
    return module


FORMS: dict[str, Callable[[], Stages]] = {
    "grouped_mm": _plain,
    "grouped_mm_triton": _triton_passes,
    "mixed": partial(_triton_products, "MixedStages"),
    "triton": partial(_triton_products, "TritonStages"),
}
"""How the stages of each form are made; raises ImportError if what they need is not installed."""


@functools.cache
def stages_of(form: str) -> Stages:
    """The stages of a form."""
    return FORMS[form]()
