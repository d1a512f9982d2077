"""Where documents begin in packed sequences."""

from __future__ import annotations

import numpy as np


def document_starts(token_BS: np.ndarray, first_token: int | None) -> np.ndarray | None:
    """Where each token's document begins, (B, S), an index of its sequence; None without a first token.

    A document begins at each end of text: that token is what the document's first token is predicted from, as in
    generation, and the one that follows the document is predicted as its last. A sequence that begins inside a document
    has the rest of it as its first one.

    Args:
        token_BS: inputs of packed sequences.
        first_token: id of the end of text; None: attention is not to stay within documents.
    """
    if first_token is None:
        return None
    position_S = np.arange(token_BS.shape[1])
    return np.maximum.accumulate(np.where(token_BS == first_token, position_S, 0), axis=1)


def hidden_share(document_BS: np.ndarray) -> float:
    """Share of the pairs of a token and itself or an earlier one that are in two documents."""
    batch, length = document_BS.shape
    seen = int((np.arange(length) - document_BS + 1).sum())
    return 1 - seen / (batch * length * (length + 1) / 2)
