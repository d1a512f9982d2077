"""How far a conversion is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from moeport.training.tensor_file import NewTensor

Report = Callable[[str, int, int], None]
"""Takes the name of a tensor that was written, the bytes written so far, and those of all tensors."""


def silent(name: str, done: int, total: int) -> None:
    """Says nothing."""


def reported(tensors: Sequence[NewTensor], report: Report) -> list[NewTensor]:
    """The same tensors; each is reported once it has been written."""
    total, done = sum(tensor.num_bytes for tensor in tensors), 0

    def blocks(tensor: NewTensor) -> Iterator[bytes | memoryview]:
        nonlocal done
        yield from tensor.blocks()
        done += tensor.num_bytes
        report(tensor.name, done, total)

    return [replace(tensor, blocks=partial(blocks, tensor)) for tensor in tensors]
