"""Texts that are continued token by token. Shape suffixes as in `moeport.core.ops`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moeport.core.array import Array
from moeport.core.ops import Ops
from moeport.model.batch import Batch
from moeport.model.cache import Cache, Continuation, LayerCache, NewTokens
from moeport.model.forward_pass import Pass, RunBlock
from moeport.model.transformer import Transformer


def new_cache(model: Transformer, ops: Ops, dtype: str, context: int) -> Cache:
    """An empty cache of texts of up to `context` tokens."""
    return Cache(ops, model.rope(ops, context, dtype), [LayerCache() for _ in model.blocks])


def next_scores(
    model: Transformer,
    ops: Ops,
    dtype: str,
    params: Mapping[str, Array],
    new: NewTokens,
    run_block: RunBlock | None = None,
) -> Array:
    """Read new tokens, which are added to their cache.

    Args:
        model: a causal model.
        ops: operations on the device.
        dtype: compute type.
        params: as of `Transformer.hidden`.
        new: the tokens.
        run_block: as in `Pass`.

    Returns: scores (B, V) of the token after the last new one of each text, in the compute type.
    """
    token_BQ, position_BQ = ops.from_numpy(new.token_BQ), ops.from_numpy(new.position_BQ)
    batch, count = new.token_BQ.shape
    first_id_BQ = ops.from_numpy(np.repeat(new.first_id_B[:, None], count, axis=1))
    cos, sin = (ops.take_rows(table, position_BQ) for table in new.cache.rope)
    continuation = Continuation(position_BQ, first_id_BQ, new.cache.layers)
    run = Pass(ops, dtype, (cos, sin), run_block=run_block, continuation=continuation)
    x_BQD, _ = model.hidden(run, params, Batch(token_BQ, token_BQ))
    row_B = ops.from_numpy(np.arange(batch) * count + new.last_B)
    x_BD = ops.take_rows(ops.reshape(x_BQD, (batch * count, -1)), row_B)
    return ops.linear(model.features(ops, x_BD), model.head(params))


class Decoder(ABC):
    """Several texts, of which a model sees a window each, and the scores of the tokens that may follow.

    A window holds up to `context` tokens. When one more does not fit, it goes on with the last half of the text that it
    held, so that positions stay below the length that the model was trained on, and half of the steps' work is not done
    again at every step. A text gives the same scores in any company, up to rounding.

    Args:
        context: most tokens that the model sees at once.
    """

    def __init__(self, context: int):
        self.context = context
        self.windows: list[list[int]] = []
        """The tokens of each text that the model sees."""

    def start(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Read the last `context` tokens of each text, of which there is at least one. Returns scores (B, V)."""
        self.windows = [[int(token) for token in text[-self.context :]] for text in texts]
        return self._scores()

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Add one token to each text. Returns scores (B, V)."""
        cut = []
        for text, (window, token) in enumerate(zip(self.windows, tokens, strict=True)):
            if len(window) == self.context:
                del window[: len(window) - self.context // 2]
                cut.append(text)
            window.append(int(token))
        return self._scores_after_one(cut)

    def keep(self, texts: Sequence[int]) -> None:
        """Go on with the texts of these indices only, in this order; one that is named twice goes on twice."""
        self.windows = [[*self.windows[text]] for text in texts]

    @abstractmethod
    def _scores(self) -> np.ndarray:
        """The scores after windows of which nothing has been read."""

    @abstractmethod
    def _scores_after_one(self, cut: Sequence[int]) -> np.ndarray:
        """The scores after windows of which all but the last token has been read, except those that were cut."""


class RecomputingDecoder(Decoder):
    """Computes each window anew for each token, and each by itself.

    It is for models in which a token's experts depend on the tokens after it or beside it: routers that look ahead, and
    capacities. Then what was computed for a shorter text is not what a longer one gives.

    Args:
        context: most tokens that the model sees at once.
        logits: `EvaluationModel.logits`.
    """

    def __init__(self, context: int, logits: Callable[[np.ndarray], np.ndarray]):
        super().__init__(context)
        self.logits = logits

    def _scores(self) -> np.ndarray:
        return np.stack([self.logits(np.array([window]))[0, -1] for window in self.windows])

    def _scores_after_one(self, cut: Sequence[int]) -> np.ndarray:
        return self._scores()


class CachedDecoder(Decoder):
    """Keeps keys and values, so that a step computes one position of each text.

    Args:
        context: most tokens that the model sees at once.
        new_cache: makes an empty cache.
        read: `EvaluationModel.read`.
    """

    def __init__(self, context: int, new_cache: Callable[[], Cache], read: Callable[[NewTokens], np.ndarray]):
        super().__init__(context)
        self.new_cache, self.read = new_cache, read
        self.cache = new_cache()

    def _scores(self) -> np.ndarray:
        self.cache, scores = self._read_whole(self.windows)
        return scores

    def _read_whole(self, windows: Sequence[Sequence[int]]) -> tuple[Cache, np.ndarray]:
        """A new cache of whole windows.

        Shorter ones are filled up at the end with tokens that no other sees, and whose places their next tokens take.
        """
        cache, longest = self.new_cache(), max(map(len, windows))
        token_BQ = np.array([[*window, *[0] * (longest - len(window))] for window in windows])
        position_BQ = np.broadcast_to(np.arange(longest), token_BQ.shape)
        last_B = np.array([len(window) - 1 for window in windows])
        return cache, self.read(NewTokens(token_BQ, position_BQ, token_BQ[:, 0], last_B, cache))

    def _scores_after_one(self, cut: Sequence[int]) -> np.ndarray:
        if len(cut) == len(self.windows):
            return self._scores()
        self.cache.make_room(max(map(len, self.windows)))
        ends = [(window[-1], len(window) - 1, window[0]) for window in self.windows]
        token_B, position_B, first_B = np.array(ends).T
        last_B = np.zeros_like(token_B)
        scores = self.read(NewTokens(token_B[:, None], position_B[:, None], first_B, last_B, self.cache))
        for text in cut:  # what the step has given for it does not count
            other, scores[text : text + 1] = self._read_whole([self.windows[text]])
            self.cache.replace(text, other)
        return scores

    def keep(self, texts: Sequence[int]) -> None:
        """Also of the cache."""
        super().keep(texts)
        self.cache.keep(texts)
