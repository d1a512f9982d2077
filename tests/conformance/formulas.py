"""What the operations mean, written out in plain Python and numpy float64."""

import math

import numpy as np


def elementwise(fn):
    return lambda x: np.vectorize(fn, otypes=[np.float64])(x)


def erf_series(x):
    """Maclaurin series; good to 1e-14 for |x| <= 3."""
    terms = [(-1) ** n * x ** (2 * n + 1) / (math.factorial(n) * (2 * n + 1)) for n in range(80)]
    return 2 / math.sqrt(math.pi) * math.fsum(terms)


def normal_cdf(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def along_last(fn):
    return lambda x: np.apply_along_axis(lambda row: fn([float(value) for value in row]), -1, x)


def log_sum_exp(row):
    top = max(row)
    return top + math.log(math.fsum(math.exp(value - top) for value in row))


def softmax(row):
    return np.array([math.exp(value - log_sum_exp(row)) for value in row])


def order(values, descending=False):
    """Ids from small to large, or from large to small; equal values in the order of their ids."""
    return np.array(sorted(range(len(values)), key=lambda i: (-values[i] if descending else values[i], i)), np.int64)


def segment_sum(values, ids, n):
    return np.array([sum((v for v, i in zip(values, ids, strict=True) if i == j), 0 * values[0]) for j in range(n)])


def matmul(x, y):
    return np.einsum("...ij,...jk->...ik", x, y)


def rms_norm(x, weight, eps):
    return np.apply_along_axis(lambda row: row / math.sqrt(math.fsum(row * row) / len(row) + eps) * weight, -1, x)


def rope(x_BSHA, angle_SP):
    """Each pair (i, i + A/2) as a complex number, turned by its angle."""
    half = x_BSHA.shape[-1] // 2
    turned = (x_BSHA[..., :half] + 1j * x_BSHA[..., half:]) * np.exp(1j * angle_SP)[None, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(q, k, v, causal=True):
    out = np.zeros_like(q)
    batch, sequence, heads, width = q.shape
    share = heads // k.shape[2]
    for b, s, h in np.ndindex(batch, sequence, heads):
        seen = s + 1 if causal else sequence
        keys, values = k[b, :seen, h // share], v[b, :seen, h // share]
        out[b, s, h] = softmax([float(q[b, s, h] @ key) / math.sqrt(width) for key in keys]) @ values
    return out


def swiglu(row):
    half = row.shape[-1] // 2
    gate, up = row[..., :half], row[..., half:]
    return gate / (1 + np.exp(-gate)) * up


def gelu(x):
    return x * elementwise(normal_cdf)(x)


ACTIVATIONS = {"swiglu": swiglu, "gelu": gelu}


def mlp(x, w_in, w_out, activation):
    return np.einsum("...f,df->...d", ACTIVATIONS[activation](np.einsum("...d,fd->...f", x, w_in)), w_out)


def grouped_mlp(x_RD, w_in, w_out, counts, activation):
    expert_R = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out = np.zeros_like(x_RD)
    for row, expert in enumerate(expert_R):
        out[row] = mlp(x_RD[row], w_in[expert], w_out[expert], activation)
    return out


def rows_by_expert(expert_N):
    """Assignments sorted by expert, in token order within an expert."""
    return order([int(expert) for expert in expert_N])


def permute(x_TD, expert_N, choices):
    return np.array([x_TD[assignment // choices] for assignment in rows_by_expert(expert_N)])


def unpermute(y_RD, weight_N, expert_N, choices):
    out = np.zeros((len(expert_N) // choices, y_RD.shape[1]))
    for row, assignment in enumerate(rows_by_expert(expert_N)):
        out[assignment // choices] += weight_N[assignment] * y_RD[row]
    return out


def routed_mlp(x_TD, weight_N, w_in, w_out, expert_N, token_N, activation):
    """Assignment by assignment, in no order of rows."""
    out = np.zeros_like(x_TD)
    for weight, expert, token in zip(weight_N, expert_N, token_N, strict=True):
        if expert < len(w_in):
            out[token] += weight * mlp(x_TD[token], w_in[expert], w_out[expert], activation)
    return out


def cross_entropy(logits_TV, target_T):
    log_partition = np.array([log_sum_exp([float(x) for x in row]) for row in logits_TV])
    return log_partition - np.array([row[target] for row, target in zip(logits_TV, target_T, strict=True)]), (
        log_partition
    )


def linear_cross_entropy(x_TD, weight_VD, target_T, z_weight):
    nll_T, log_partition_T = cross_entropy(np.einsum("td,vd->tv", x_TD, weight_VD), target_T)
    mean, z = math.fsum(nll_T) / len(nll_T), math.fsum(log_partition_T**2) / len(nll_T)
    return mean + z_weight * z, mean, z
