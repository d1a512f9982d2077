"""Limits that forms of the experts share, whatever the device."""

from __future__ import annotations

from typing import Any

from moeport.core.dispatch_plan import DispatchPlan


def tokens_choose(x_TD: Any, weight_N: Any, plan: DispatchPlan, *_: Any) -> str | None:
    """The limit of a sum over the K rows of each token; takes the arguments of `routed_mlp`."""
    if plan.choices_per_token is None:
        return "experts choose tokens, or rows are rounded; expected K rows per token"
    return None
