"""Work that the caller's modes must not reach."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def undisturbed(device: torch.device, function: Callable[[], T]) -> T:
    """The result of a function that runs in a thread of its own.

    Autograd, autocast, inference mode, hooks on saved tensors (with which activation checkpointing counts them), fake
    tensors and transforms such as torch.func.grad belong to a thread, so none of the caller's applies.
    """
    index = None if device.type == "cpu" else torch.accelerator.current_device_index()

    def run() -> T:
        if index is not None:
            torch.accelerator.set_device_index(index)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
