"""Checkpoints whose arrays are in memory, for tests that compare or change them."""

from dataclasses import replace
from typing import Any

from moeport.training.checkpoint import open_checkpoint


def load_checkpoint(path):
    checkpoint = open_checkpoint(path)
    arrays: Any = {kind: dict(getattr(checkpoint, kind)) for kind in ("model", "optimizer")}
    return replace(checkpoint, **arrays)
