"""Models that know the domain of each sequence."""

from dataclasses import replace

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.data.document_starts import document_starts
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from tests.model.models import model_config
from tests.support import rng

VOCAB, SEQUENCES, LENGTH = 11, 4, 6


def shapes_and_params():
    """A model of which the domain decides the group of experts, with one table for both."""
    moe = {"num_experts": 4, "expert_hidden": 8, "router": {"name": "rre", "groups": 2, "group_by": "domain"}}
    model = DecoderLM(model_config(num_layers=1, moe=moe), VOCAB)
    return model, initial_parameters(model.parameter_specs(), 0, lambda: np.ones(VOCAB, np.int64))


def batch_of(domain_B):
    token_BS = rng(3).integers(VOCAB, size=(SEQUENCES, LENGTH + 1))
    documents = document_starts(token_BS[:, :-1], 0)
    return Batch(token_BS[:, :-1], token_BS[:, 1:], document_BS=documents, domain_B=np.array(domain_B))


def losses(model, batch):
    return float(model.ops.to_numpy(model.evaluate(batch).cross_entropy))


def test_rows_and_copies_keep_the_domains():
    batch = batch_of([1, 0, 1, 0])
    assert batch.rows(1, 3).domain_B.tolist() == [0, 1]
    assert [x is y for x, y in zip(batch.arrays, batch.mapped(lambda x: x).arrays, strict=True)] == [True] * 4


@pytest.mark.parametrize("name", ["torch", "mindspore"])
def test_every_backend_trains_each_sequence_in_its_domain(name):
    """In float32 MindSpore compiles; there a graph takes the domains as an input."""
    pytest.importorskip(name)
    model, params = shapes_and_params()
    reference = get_backend(BackendConfig(name="numpy", dtype="float64")).evaluation_model(model, params)
    backend = get_backend(BackendConfig(name=name, device="cpu", dtype="float32", compile=name == "mindspore"))
    trained = backend.training_model(model, params, TrainingOptions(OptimizerConfig()))
    for domain_B in ([0, 0, 1, 1], [1, 0, 0, 1]):
        batch = batch_of(domain_B)
        want, terms = losses(reference, batch), trained.accumulate(batch, 1.0)
        assert float(trained.ops.to_numpy(terms.cross_entropy)) == pytest.approx(want, rel=1e-5)
        chosen_LE = trained.ops.to_numpy(terms.chosen_LE)
        assert chosen_LE[0, :2].sum() == chosen_LE[0, 2:].sum() == SEQUENCES // 2 * LENGTH
    unknown = losses(reference, replace(batch_of([0] * SEQUENCES), domain_B=None))
    assert losses(reference, batch_of([0] * SEQUENCES)) == unknown != want
