"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): what it updates, and the numbers of its step.

A matrix moves along the momentum of its gradient, made nearly orthogonal by five Newton-Schulz iterations. Only
matrices between hidden states are updated so; embeddings, the output head, routers, norms and biases follow AdamW.
Experts are batches of matrices. Gate and up projection of SwiGLU, which `w_in` holds one above the other, count as two
matrices, as they do where they are stored apart (ours; in Moonlight they are two parameters).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeport.core.parameters import ParameterSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iteration X <- a X + (b A + c A A) X with A = X X^T (Jordan et al.; also the defaults of torch.optim.Muon)."""
ITERATIONS = 5
EPS = 1e-7
"""Least Frobenius norm that a matrix is divided by before the first iteration."""


def batch_shape(spec: ParameterSpec, shape: Sequence[int]) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a parameter of which `shape` is here: some of its experts, or all of it."""
    *batch, rows, columns = shape
    return math.prod(batch) * spec.matrices, rows // spec.matrices, columns


def rate_factor(rows: int, columns: int, adjust: str) -> float:
    """What the learning rate of a matrix is multiplied by.

    `match_rms_adamw` gives the update the root mean square of AdamW's, about 0.2 (Moonlight, arXiv 2502.16982, section
    2.2), so that rate and decay of AdamW serve; `original` is that of Jordan et al.
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
