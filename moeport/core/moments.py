"""What optimisers keep of a parameter between steps: by name, and in which shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeport.core.parameters import ParameterSpec

MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
    "adafactor": ("row_var", "col_var"),
    "adafactor_vector": ("variance",),
}
"""What is kept of a parameter between steps, by the rule that updates it."""


def rule_of(spec: ParameterSpec, optimizer: str) -> str:
    """The rule in MOMENTS that updates a parameter under `optimizer.name`."""
    if optimizer == "adafactor":
        return "adafactor" if len(spec.shape) >= 2 else "adafactor_vector"
    return "muon" if optimizer == "muon" and spec.matrices else "adamw"


def moment_names(specs: Sequence[ParameterSpec], optimizer: str) -> dict[str, ParameterSpec]:
    """The parameter of each array of the optimiser's state, such as `exp_avg.NAME`, with the shape of the array."""
    trained = [spec for spec in specs if spec.trainable]
    return {
        f"{moment}.{spec.name}": moment_of(spec, moment)
        for spec in trained
        for moment in MOMENTS[rule_of(spec, optimizer)]
    }


def moment_of(spec: ParameterSpec, moment: str) -> ParameterSpec:
    """The parameter with the shape of a moment of it: its own, or that of the rows, or of the columns, of each of its
    matrices, which an expert's are by itself.
    """
    if moment == "row_var":
        return replace(spec, shape=spec.shape[:-1])
    if moment == "col_var":
        return replace(spec, shape=(*spec.shape[:-2], max(1, spec.matrices), spec.shape[-1]))
    return spec
