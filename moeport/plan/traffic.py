"""Which experts the tokens of a communication benchmark go to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeport.core.parameters import generator
from moeport.errors import UserError
from moeport.paths import expanded
from moeport.reading import open_file

KINDS = "uniform, zipf, local:F with F of 0 to 1, or a .npy file of expert ids (tokens, choices)"


def expert_choices(
    kind: str, tokens: int, num_experts: int, top_k: int, *, rank: int, size: int, node: int, nodes: int, seed: int = 0
) -> np.ndarray:
    """Experts of each token of a rank, (T, K); the experts of a token differ.

    Args:
        kind: `uniform`: all sets of K experts alike. `zipf`: the i-th expert, in an order drawn once, is wanted 1/i as
            often as the first (K = 1; for more the next ones come by the same weights without the earlier). `local:F`:
            each choice is on the rank's own node with probability F, as far as the node has experts left. Else the
            path of a .npy file of integers (tokens of all ranks, K), which is divided among the ranks in order and
            repeated or cut to T tokens.
        tokens: T of this rank.
        num_experts: E; expert e is on node e * nodes // E.
        top_k: K.
        rank: this rank.
        size: ranks.
        node: node of this rank.
        nodes: number of nodes.
        seed: of the draws.

    Raises UserError for another kind, or a file that does not fit.
    """
    random = generator(seed, "routes", kind, rank)
    if kind == "uniform":
        return _weighted(random, np.zeros(num_experts), tokens, top_k)
    if kind == "zipf":
        order = generator(seed, "routes", "order").permutation(num_experts)
        return _weighted(random, -np.log1p(order), tokens, top_k)
    if kind.startswith("local:"):
        return _local(random, local_fraction(kind), tokens, num_experts, top_k, node, nodes)
    if kind.endswith(".npy"):
        return _recorded(Path(kind), tokens, num_experts, top_k, rank, size)
    raise UserError(f"--traffic {kind!r}: expected {KINDS}")


def _weighted(random: np.random.Generator, log_weight_E: np.ndarray, tokens: int, top_k: int) -> np.ndarray:
    """K experts without repetition in proportion to weights: the largest of log weight + Gumbel noise."""
    keys_TE = log_weight_E + random.gumbel(size=(tokens, len(log_weight_E)))
    return np.argsort(-keys_TE, axis=1)[:, :top_k]


def _local(
    random: np.random.Generator, fraction: float, tokens: int, num_experts: int, top_k: int, node: int, nodes: int
) -> np.ndarray:
    near_E = np.arange(num_experts) * nodes // num_experts == node
    wanted_T = np.minimum(random.binomial(top_k, fraction, tokens), near_E.sum())
    wanted_T = np.maximum(wanted_T, top_k - (~near_E).sum())
    order_TE = np.argsort(random.random((tokens, num_experts)), axis=1)
    is_near_TE = near_E[order_TE]
    place_TE = np.where(is_near_TE, np.cumsum(is_near_TE, axis=1), np.cumsum(~is_near_TE, axis=1))
    chosen_TE = place_TE <= np.where(is_near_TE, wanted_T[:, None], top_k - wanted_T[:, None])
    return order_TE[chosen_TE].reshape(tokens, top_k)


def local_fraction(kind: str) -> float:
    """F of `local:F`. Raises UserError for another text."""
    try:
        fraction = float(kind.removeprefix("local:"))
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise UserError(f"--traffic {kind!r}: expected {KINDS}")
    return fraction


def _recorded(path: Path, tokens: int, num_experts: int, top_k: int, rank: int, size: int) -> np.ndarray:
    return np.resize(np.array_split(read_choices(path, num_experts, top_k, size), size)[rank], (tokens, top_k))


def read_choices(path: Path, num_experts: int, top_k: int, size: int) -> np.ndarray:
    """Experts of the tokens of `size` ranks, (tokens, K). Raises UserError for a file that does not fit."""
    path = Path(expanded(str(path)))
    try:
        open_file(path).close()
        with np.errstate(over="ignore"):
            recorded = np.load(path, mmap_mode="r")  # which refuses shapes that the file is too small for
    except OSError as error:
        raise UserError(f"--traffic {path}: cannot be read: {error.strerror}") from error
    except (ValueError, EOFError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--traffic {path}: not a .npy file of numpy: {reason}") from error
    if not isinstance(recorded, np.ndarray):
        raise UserError(f"--traffic {path}: not a .npy file of numpy, but an archive of several")
    if recorded.ndim != 2 or recorded.shape[1] != top_k or recorded.dtype.kind not in "iu":
        raise UserError(
            f"--traffic {path}: is {recorded.dtype} {recorded.shape}; expected integers (tokens, {top_k}), top_k of "
            "them a token"
        )
    if not len(recorded):
        raise UserError(f"--traffic {path}: has no tokens; expected at least {size}, one per rank")
    if len(recorded) < size or recorded.min() < 0 or recorded.max() >= num_experts:
        raise UserError(
            f"--traffic {path}: has {len(recorded)} tokens with experts {recorded.min()} .. {recorded.max()}; expected "
            f"at least {size} tokens, one per rank, and experts below --experts ({num_experts})"
        )
    return recorded
