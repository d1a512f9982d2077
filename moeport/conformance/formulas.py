"""What the operations mean, written out in plain Python and numpy float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def elementwise(fn: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of numbers as one of arrays."""
    return lambda x: np.vectorize(fn, otypes=[np.float64])(x)


def erf_series(x: float) -> float:
    """Maclaurin series; good to 1e-14 for |x| <= 3."""
    terms = [(-1) ** n * x ** (2 * n + 1) / (math.factorial(n) * (2 * n + 1)) for n in range(80)]
    return 2 / math.sqrt(math.pi) * math.fsum(terms)


def normal_cdf(x: float) -> float:
    """The share of a normal distribution below x."""
    return math.erfc(-x / math.sqrt(2)) / 2


def along_last(fn: Callable[[list[float]], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of rows as one of arrays."""
    return lambda x: np.apply_along_axis(lambda row: fn([float(value) for value in row]), -1, x)


def log_sum_exp(row: Sequence[float] | np.ndarray) -> float:
    """The logarithm of the sum of the exponentials."""
    top = max(row)
    return top + math.log(math.fsum(math.exp(value - top) for value in row))


def softmax(row: Sequence[float] | np.ndarray) -> np.ndarray:
    """Exponentials over their sum."""
    return np.array([math.exp(value - log_sum_exp(row)) for value in row])


def order(values: Sequence[Any] | np.ndarray, descending: bool = False) -> np.ndarray:
    """Ids from small to large, or from large to small; equal values in the order of their ids."""
    return np.array(sorted(range(len(values)), key=lambda i: (-values[i] if descending else values[i], i)), np.int64)


def sort_by_group(group_N: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids by group, the place of each id among them, and the number of ids per group."""
    by_group = order(group_N)
    place_N = np.array([list(by_group).index(n) for n in range(len(group_N))], np.int64)
    return by_group, place_N, np.array([list(group_N).count(group) for group in range(groups)])


def segment_sum(values: np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """The sum of the values of each id below n."""
    return np.array([sum((v for v, i in zip(values, ids, strict=True) if i == j), 0 * values[0]) for j in range(n)])


def matmul(x: np.ndarray, y: np.ndarray) -> Any:
    """Products of matrices."""
    return np.einsum("...ij,...jk->...ik", x, y)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Rows over their root mean square, times the weight."""
    return np.apply_along_axis(lambda row: row / math.sqrt(math.fsum(row * row) / len(row) + eps) * weight, -1, x)


def rope(x_BSHA: np.ndarray, angle_SP: np.ndarray) -> np.ndarray:
    """Each pair (i, i + A/2) as a complex number, turned by its angle (S, P) or (B, S, P)."""
    half = x_BSHA.shape[-1] // 2
    turned = (x_BSHA[..., :half] + 1j * x_BSHA[..., half:]) * np.exp(1j * angle_SP)[..., None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    causal: bool = True,
    scale: float | None = None,
    document: np.ndarray | None = None,
) -> np.ndarray:
    """Query by query: the softmax of its scores of the keys that it sees, times their values."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    batch, sequence, heads, width = q.shape
    share, factor = heads // k.shape[2], 1 / math.sqrt(width) if scale is None else scale
    for b, s, h in np.ndindex(batch, sequence, heads):
        seen = np.arange(s + 1 if causal else sequence)
        if document is not None:
            seen = seen[document[b, seen] == document[b, s]]
        keys, values = k[b, seen, h // share], v[b, seen, h // share]
        out[b, s, h] = softmax([float(q[b, s, h] @ key) * factor for key in keys]) @ values
    return out


def cached_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position_BQ: np.ndarray,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The new rows are written, then each query reads the positions up to its own."""
    keys, values = keys.copy(), values.copy()
    for b, i in np.ndindex(*position_BQ.shape):
        keys[b, position_BQ[b, i]], values[b, position_BQ[b, i]] = k[b, i], v[b, i]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        group, seen = h // (q.shape[2] // k.shape[2]), position_BQ[b, i] + 1
        scores = [float(q[b, i, h] @ key) * scale for key in keys[b, :seen, group]]
        out[b, i, h] = softmax(scores) @ values[b, :seen, group]
    return out, keys, values


def swiglu(row: np.ndarray) -> np.ndarray:
    """SiLU of the first half, times the second."""
    half = row.shape[-1] // 2
    gate, up = row[..., :half], row[..., half:]
    return gate / (1 + np.exp(-gate)) * up


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the share of a normal distribution below it."""
    return x * elementwise(normal_cdf)(x)


ACTIVATIONS = {"swiglu": swiglu, "gelu": gelu}


def mlp(x: np.ndarray, w_in: np.ndarray, w_out: np.ndarray, activation: str) -> Any:
    """One expert."""
    return np.einsum("...f,df->...d", ACTIVATIONS[activation](np.einsum("...d,fd->...f", x, w_in)), w_out)


def grouped_mlp(
    x_RD: np.ndarray, w_in: np.ndarray, w_out: np.ndarray, counts: Sequence[int] | np.ndarray, activation: str
) -> np.ndarray:
    """Row by row, each through its expert; rows behind the last expert's are zeros."""
    expert_R = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out = np.zeros_like(x_RD)
    for row, expert in enumerate(expert_R):
        out[row] = mlp(x_RD[row], w_in[expert], w_out[expert], activation)
    return out


def rows_by_expert(expert_N: np.ndarray) -> np.ndarray:
    """Assignments sorted by expert, in token order within an expert."""
    return order([int(expert) for expert in expert_N])


def permute(x_TD: np.ndarray, expert_N: np.ndarray, choices: int) -> np.ndarray:
    """The token of each assignment, sorted by expert."""
    return np.array([x_TD[assignment // choices] for assignment in rows_by_expert(expert_N)])


def unpermute(y_RD: np.ndarray, weight_N: np.ndarray, expert_N: np.ndarray, choices: int) -> np.ndarray:
    """The weighted sum of the rows of each token."""
    out = np.zeros((len(expert_N) // choices, y_RD.shape[1]))
    for row, assignment in enumerate(rows_by_expert(expert_N)):
        out[assignment // choices] += weight_N[assignment] * y_RD[row]
    return out


def routed_mlp(
    x_TD: np.ndarray,
    weight_N: np.ndarray,
    w_in: np.ndarray,
    w_out: np.ndarray,
    expert_N: np.ndarray,
    token_N: np.ndarray,
    activation: str,
) -> np.ndarray:
    """Assignment by assignment, in no order of rows."""
    out = np.zeros_like(x_TD)
    for weight, expert, token in zip(weight_N, expert_N, token_N, strict=True):
        if expert < len(w_in):
            out[token] += weight * mlp(x_TD[token], w_in[expert], w_out[expert], activation)
    return out


def cross_entropy(logits_TV: np.ndarray, target_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per token, the negative logarithm of the target's probability, and the logarithm of the partition sum."""
    log_partition = np.array([log_sum_exp([float(x) for x in row]) for row in logits_TV])
    return log_partition - np.array([row[target] for row, target in zip(logits_TV, target_T, strict=True)]), (
        log_partition
    )


def linear_cross_entropy(
    x_TD: np.ndarray, weight_VD: np.ndarray, target_T: np.ndarray, z_weight: float
) -> tuple[float, float, float]:
    """The loss, and its two means: cross-entropy and z-loss."""
    nll_T, log_partition_T = cross_entropy(np.einsum("td,vd->tv", x_TD, weight_VD), target_T)
    mean, z = math.fsum(nll_T) / len(nll_T), math.fsum(log_partition_T**2) / len(nll_T)
    return mean + z_weight * z, mean, z


def linear_cross_entropy_by_token(
    x_TD: np.ndarray, weight_VD: np.ndarray, target_T: np.ndarray, z_weight: float
) -> tuple[float, np.ndarray, float]:
    """The loss, the cross-entropy of each token, and the z-loss."""
    loss, _, z = linear_cross_entropy(x_TD, weight_VD, target_T, z_weight)
    return loss, cross_entropy(np.einsum("td,vd->tv", x_TD, weight_VD), target_T)[0], z
