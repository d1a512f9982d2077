"""Which kind of work an event of a trace is.

A mark says where an operation was called in the forward pass. An operation that autograd records has a sequence number,
and so has the function that computes its gradient: so the gradient belongs to the part of the operation. Only inside a
part of several kinds, as a fused layer of experts is, does the name of an operation decide between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from moeport.backends.torch.profiling.marks import MARK
from moeport.core.parts import PARTS, Part

Event = Mapping[str, Any]

BACKWARD = "autograd::engine::evaluate_function: "
ACCUMULATE = "torch::autograd::AccumulateGrad"
_BY_NAME = {
    "communication": ("FSDP::", "c10d::", "gloo:", "nccl:", "hccl:", "record_param_comms"),
    "optimizer": ("Optimizer.",),
}
"""Beginnings of names of ranges that PyTorch itself marks, by part."""
_PRODUCTS = "mm bmm addmm baddbmm matmul linear mkldnn_linear _grouped_mm grouped_mm einsum addmv mv"
_MOVES = (
    "index_select index gather scatter scatter_ scatter_add scatter_add_ index_add index_add_ index_put_ "
    "_index_put_impl_ embedding embedding_dense_backward sort argsort topk bincount"
)
_CLASSES = dict.fromkeys(_PRODUCTS.split(), "products") | dict.fromkeys(_MOVES.split(), "moves")
_KERNEL_CLASSES = {
    "products": re.compile(r"gemm|grouped|matmul|cutlass|nvjet|xmma", re.IGNORECASE),
    "moves": re.compile(r"gather|scatter|sort|index|permute", re.IGNORECASE),
}
UNKNOWN = Part("other")
_COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")
"""Beginnings of names of ranges in which one graph computes what was several parts."""


class State(NamedTuple):
    """Where a thread is."""

    part: Part | None = None
    """None: outside of all parts."""
    work: str = ""
    """`products`, `moves`, or `other` inside an operation; empty between operations."""
    top: str = ""
    """The outermost operation or function that belongs to no part."""

    @property
    def kind(self) -> str:
        """One of `moeport.core.parts.KINDS`."""
        part = self.part
        if part is None:
            return "other" if self.work else "host"
        if part.whole:
            return part.kind
        found = {"products": part.products, "moves": part.moves, "": part.waits}.get(self.work)
        return found or part.kind

    def on_device(self, kernel: str) -> State:
        """That of a kernel launched from here: its name tells more than a function that launches several."""
        if kernel.lower().startswith(("nccl", "hccl")):
            return State(PARTS["communication"])
        if self.work in ("products", "moves") or self.part is None or self.part.whole:
            return self._replace(work=self.work or "other", top=self.top or kernel)
        work = next((name for name, pattern in _KERNEL_CLASSES.items() if pattern.search(kernel)), "other")
        return self._replace(work=work)


class Attribution:
    """Follows the nested events of threads.

    Args:
        gradients: see `forward_parts`; None while it is being collected.
    """

    def __init__(self, gradients: Mapping[tuple[int, int], Part] | None = None):
        self.gradients = gradients

    def inside(self, state: State, event: Event) -> State:
        """The state inside an event, from the one around it."""
        name = event["name"]
        if name.startswith(MARK):
            return self._in_part(state, PARTS.get(name[len(MARK) :], UNKNOWN))
        for part, beginnings in _BY_NAME.items():
            if name.startswith(beginnings):
                return self._in_part(state, PARTS[part])
        if name.startswith(_COMPILED):
            return State(UNKNOWN, "other", "compiled blocks")
        if name.startswith(BACKWARD):
            function = name[len(BACKWARD) :]
            if function == ACCUMULATE:
                return State(PARTS["optimizer"], top=function)
            return State((self.gradients or {}).get(gradient_key(event), UNKNOWN), top=function)
        if event.get("cat") != "cpu_op":
            return state
        top = state.top or (name if state.part is None else "")
        if not name.startswith("aten::"):  # a function of ours, or a library's operation
            return state._replace(top=top, work=state.work or ("other" if state.part is None else ""))
        work = state.work if state.work in ("products", "moves") else _CLASSES.get(name[6:], "other")
        return state._replace(work=work, top=top)

    @staticmethod
    def _in_part(state: State, part: Part) -> State:
        keeps = state.part is not None and state.part.whole and part is not PARTS["communication"]
        return state if keeps else State(part)


def gradient_key(event: Event) -> tuple[int, int]:
    """Number of the forward thread and sequence number of an event of the backward pass."""
    args = event.get("args", {})
    return args.get("Fwd thread id", 0), args.get("Sequence number", -1)
