"""Models on numpy arrays: evaluation and scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from typing_extensions import override

from moeport.backends.base import EvaluationModel
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.parameters import parameter_dtype
from moeport.core.weights import Weights
from moeport.model.batch import Batch
from moeport.model.cache import NewTokens
from moeport.model.decoding import next_scores
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer


class NumpyEvaluationModel(EvaluationModel):
    """Parameters as numpy arrays."""

    def __init__(self, ops: NumpyOps, dtype: str, model: Transformer, params: Mapping[str, np.ndarray]):
        self.ops, self.dtype, self.model = ops, dtype, model
        self.params: dict[str, np.ndarray] = {}
        self.load_parameters(params)

    @override
    def evaluate(self, batch: Batch) -> LossTerms:
        run = self.model.forward_pass(self.ops, batch.token_BS.shape[1], self.dtype)
        return self.model.loss(run, self.params, batch)

    @override
    def logits(self, token_BS: np.ndarray) -> np.ndarray:
        run = self.model.forward_pass(self.ops, token_BS.shape[1], self.dtype)
        return self.ops.to_numpy(self.model.logits(run, self.params, Batch(token_BS, token_BS)))

    @override
    def token_losses(self, batch: Batch) -> np.ndarray:
        run = self.model.forward_pass(self.ops, batch.token_BS.shape[1], self.dtype)
        return self.ops.to_numpy(self.model.token_losses(run, self.params, batch))

    @override
    def read(self, new: NewTokens) -> np.ndarray:
        return self.ops.to_numpy(next_scores(self.model, self.ops, self.dtype, self.params, new))

    @override
    def parameters(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        return {name: self.params[name].copy() for name in (self.params if names is None else names)}

    @override
    def load_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        kind, copy = parameter_dtype(self.dtype), not isinstance(params, Weights)  # which makes an array per access
        self.params |= {name: value.astype(kind, copy=copy) for name, value in params.items()}
