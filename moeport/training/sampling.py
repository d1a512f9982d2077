"""How the next token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moeport.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a text ends."""

    max_tokens: int = 200
    """Maximum number of tokens to add to a text."""
    temperature: float = 0.8
    """Divides the scores; 0 always takes the most likely token."""
    top_k: int = 50
    """Sample among this many most likely tokens."""
    top_p: float = 1.0
    """Of these, sample among the fewest most likely ones with probabilities that sum to at least this."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 1 or self.max_tokens < 1:
            raise UserError(
                f"temperature must be at least 0 and finite, top_k and max_tokens at least 1 "
                f"(got {self.temperature}, {self.top_k}, {self.max_tokens})"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1 (got {self.top_p})")
        if "" in self.stop:
            raise UserError("stop: is empty, and every text would end at once; expected at least one character")


def draw(logits_V: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """A token, by its scores. Among equal scores, the lower id comes first.

    Raises UserError if a score is NaN, or the largest is infinite.
    """
    logits_V = logits_V.astype(np.float64)
    if not np.isfinite(logits_V.max()):
        raise UserError(
            f"the model's scores of the next token are not finite (the largest is {logits_V.max()}); "
            "its parameters or its compute type are the reason"
        )
    order = _most_likely(logits_V, sampling.top_k)
    if sampling.temperature == 0:
        return int(order[0])
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the most likely token
        probabilities = np.exp((logits_V[order] - logits_V[order[0]]) / sampling.temperature)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        few = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        order, probabilities = order[:few], probabilities[:few] / probabilities[:few].sum()
    return int(random.choice(order, p=probabilities))


def _most_likely(logits_V: np.ndarray, count: int) -> np.ndarray:
    """The ids of the highest scores, highest first; a whole vocabulary is not sorted for them."""
    if count >= len(logits_V):
        return np.argsort(-logits_V, kind="stable")
    candidates = np.flatnonzero(logits_V >= np.partition(logits_V, -count)[-count])
    return candidates[np.argsort(-logits_V[candidates], kind="stable")][:count]
