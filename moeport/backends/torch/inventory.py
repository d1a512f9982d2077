"""What accelerators PyTorch sees."""

from __future__ import annotations

import torch


def accelerators() -> list[tuple[str, int | None]]:
    """Product name and memory in bytes, where known, of every accelerator."""
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if present is None:
        return []
    module = torch.get_device_module(present)
    found = []
    for index in range(torch.accelerator.device_count()):
        properties = module.get_device_properties(index)
        found.append((properties.name, getattr(properties, "total_memory", None)))
    return found
