"""Where the experts' matrices lie to each other: their first two principal components.

After "A Closer Look into Mixture-of-Experts in Large Language Models" (arXiv 2406.18219), which draws the flattened
matrices of all experts, standardised, in the plane of two components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 2**21
"""Entries of all experts that are turned into float64 at a time."""


@dataclass(frozen=True)
class Components:
    """The experts in the plane of the first two principal components of one of their matrices."""

    place_E2: np.ndarray
    """Each expert's scores; of each component, the largest in absolute value is positive."""
    share_2: np.ndarray
    """Share of the variance that each component explains; 0 where all experts are equal."""


def components(w: np.ndarray) -> Components:
    """Principal components of flattened matrices (E, rows, columns) of at least two experts.

    Each entry is standardised over the experts: mean 0 and standard deviation 1, or 0 where all experts have the same.
    The components of E experts follow from the products of all pairs (E, E), which are added up in blocks of rows, so
    no more memory is taken than for one block.
    """
    experts, rows, columns = w.shape
    gram_EE, step = np.zeros((experts, experts)), max(1, BLOCK // (experts * columns))
    for first in range(0, rows, step):
        flat = w[:, first : first + step].reshape(experts, -1).astype(np.float64)
        flat -= flat.mean(0)
        deviation = flat.std(0)
        flat /= np.where(deviation > 0, deviation, 1.0)
        gram_EE += flat @ flat.T
    variance, vector_EC = np.linalg.eigh(gram_EE)
    first_2 = np.argsort(-variance, kind="stable")[:2]
    found_2 = np.maximum(variance[first_2], 0.0)
    place_E2 = vector_EC[:, first_2] * np.sqrt(found_2)
    place_E2 = place_E2 * np.where(place_E2.max(0) < -place_E2.min(0), -1.0, 1.0)
    total = np.trace(gram_EE)
    return Components(place_E2, found_2 / total if total > 0 else np.zeros(2))
