"""Options of `moeport inspect`. Imports nothing heavy, since the command line shows their defaults as help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What is looked at."""

    checkpoint: str = "latest"
    """latest, best or step-N."""
    tokens: int = 65536
    """Most tokens of text."""
    context: int | None = None
    """Tokens of a sequence; None: as many as in training."""
    batch_size: int = 1
    """Sequences that share a capacity. OpenMoE's analysis of drops by position looks at one."""
    least: int = 128
    """Assignments that a token id, or a range of positions, must have to be looked at; OpenMoE's number."""
    checkpoints: int = 6
    """Most checkpoints, the chosen one included, that are compared; 1: only that one."""
    compared: int = 128
    """Tokens that every expert is given, to compare the experts' outputs; 0: the experts are not compared."""
    robustness: bool = True
    """Whether the text is computed once more with every token's first choice taken away."""
    backend: str | None = None
    """Name of the backend; None: that of the run."""
    factor: float | None = None
    """A capacity factor in place of the run's capacity; None: as the run has it."""
    drop: str | None = None
    """A drop policy in place of the run's; None: as the run has it."""
