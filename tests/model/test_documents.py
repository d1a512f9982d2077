"""Packed documents that attention does not cross give what each document gives by itself, on every backend."""

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from moeport.backends.base import TrainingOptions
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.comm.single import SingleProcess
from moeport.config.model import AttentionConfig, LoadBalanceConfig, RopeBasesConfig
from moeport.config.training import OptimizerConfig
from moeport.data.document_starts import document_starts
from moeport.model.batch import Batch
from moeport.training.evaluate import evaluate
from tests.conformance.targets import COMPOSED, TOLERANCE, Target, build, parameters, training
from tests.model.models import VOCABULARY, changed, model_and_params, model_config
from tests.support import rng

SEQUENCES, LENGTH, END = 2, 12, VOCABULARY - 1
ENDS = ((0, 3), (0, 4), (0, 9), (1, 0), (1, 6))
"""Where the ends of text are: documents of 3, 1, 5 and 3 tokens, and of 6 and 6."""
ATTENTION = {
    "grouped": AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        qk_norm=True,
        rope_bases=RopeBasesConfig(kind="list", values=(50.0, 3.0)),
    ),
    "latent": AttentionConfig(
        kind="mla", num_heads=2, kv_lora_rank=6, qk_nope_head_dim=2, qk_rope_head_dim=4, v_head_dim=3
    ),
}
every_attention = pytest.mark.parametrize("kind", ATTENTION)
REFERENCE = Target("numpy", "cpu", "float64")
TORCH = Target("torch", "cpu", "float64")


@functools.cache
def shapes_and_params(kind, layers=2):
    """A model in which no token's experts depend on another token."""
    quiet = {"router_z_loss": 0.0, "load_balance": LoadBalanceConfig(coefficient=0.0)}
    model, params = model_and_params(model_config(moe=quiet, attention=ATTENTION[kind], num_layers=layers))
    return model, changed(params, 3)


@functools.cache
def packed():
    """Two sequences of documents, with where they begin."""
    tokens = rng(5).integers(0, END, (SEQUENCES, LENGTH + 1))
    for place in ENDS:
        tokens[place] = END
    return Batch(tokens[:, :-1], tokens[:, 1:], document_BS=document_starts(tokens[:, :-1], END))


def documents():
    """Each of them as a batch of its own, whose only sequence is one document."""
    batch = packed()
    for b in range(SEQUENCES):
        starts = [*np.unique(batch.document_BS[b]), LENGTH]
        for start, end in pairwise(starts):
            yield Batch(batch.token_BS[b : b + 1, start:end], batch.target_BS[b : b + 1, start:end])


@functools.cache
def alone(kind, layers=2):
    """The mean loss and its gradients over the documents, one after the other, in float64."""
    model = TORCH.build().training_model(*shapes_and_params(kind, layers), TrainingOptions(OptimizerConfig()))
    loss = 0.0
    for batch in documents():
        share = batch.token_BS.size / packed().token_BS.size
        loss += share * float(model.accumulate(batch, share).cross_entropy)
    return loss, model.gradients()


def loss_of(model, batch):
    return float(model.ops.to_numpy(model.evaluate(batch).cross_entropy))


@every_attention
def test_the_oracle_gives_the_losses_of_the_documents(kind):
    """In numpy, and so does torch, whose gradients the other backends are held against; without the mask it differs."""
    model, params = shapes_and_params(kind)
    oracle = build(REFERENCE).evaluation_model(model, params)
    sizes = [batch.token_BS.size for batch in documents()]
    assert sorted(sizes) == [1, 3, 3, 5, 6, 6]
    expected = np.average([loss_of(oracle, batch) for batch in documents()], weights=sizes)
    assert loss_of(oracle, packed()) == pytest.approx(expected, rel=1e-13)
    assert alone(kind)[0] == pytest.approx(expected, rel=1e-13)
    assert abs(loss_of(oracle, replace(packed(), document_BS=None)) - expected) > 1e-3


def test_positions_count_from_the_beginning_of_a_document():
    """Rotary attention depends on distances alone, so a loss cannot show it beyond rounding; the tables do."""
    model, params = shapes_and_params("grouped")
    passes = []

    def run_block(run, x_BSD, context):
        passes.append(run)
        return x_BSD, ()

    plain = model.forward_pass(NumpyOps(), LENGTH, "float64")
    model.hidden(replace(plain, run_block=run_block), params, packed())
    position_BS = [[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]]
    assert len(passes) == 2
    for run in passes:
        for found, table in zip(run.rope, plain.rope, strict=True):
            np.testing.assert_array_equal(found, np.asarray(table)[position_BS])


def forms():
    """Every backend that trains, with either attention; MindSpore compiles for long, so one of them there is slow."""
    for parameter in parameters(training(COMPOSED)):
        (target,) = parameter.values
        for kind in ATTENTION:
            slow = [pytest.mark.slow] * (target.backend == "mindspore" and kind == "latent")
            yield pytest.param(target, kind, id=f"{target}-{kind}", marks=[*parameter.marks, *slow])


@pytest.mark.parametrize(("target", "kind"), list(forms()))
def test_packed_documents_give_the_loss_and_the_gradients_of_each_by_itself(target, kind):
    layers = 1 if target.static else 2
    expected, gradients = alone(kind, layers)
    model = target.build().training_model(*shapes_and_params(kind, layers), TrainingOptions(OptimizerConfig()))
    loss = float(model.ops.to_numpy(model.accumulate(packed(), 1.0).cross_entropy))
    assert loss == pytest.approx(expected, rel=TOLERANCE[target.dtype])
    found = model.gradients()
    for name, want in gradients.items() if target.dtype != "bfloat16" else ():
        atol = 10 * TOLERANCE[target.dtype] * np.abs(want).max()
        np.testing.assert_allclose(found[name], want, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile": True}], ids=str)
def test_recomputed_and_compiled_blocks_stay_within_documents(options, monkeypatch):
    from moeport.backends.torch import compiling

    monkeypatch.setattr(compiling, "COMPILER", "eager")
    model = TORCH.build().training_model(*shapes_and_params("grouped"), TrainingOptions(OptimizerConfig(), **options))
    expected, gradients = alone("grouped")
    assert float(model.accumulate(packed(), 1.0).cross_entropy) == pytest.approx(expected, rel=1e-12)
    for name, want in gradients.items():
        np.testing.assert_allclose(model.gradients()[name], want, rtol=0, atol=1e-12 * np.abs(want).max(), err_msg=name)


def test_evaluation_stays_within_documents():
    """Windows may be shorter, and begin inside a document."""
    model = build(REFERENCE).evaluation_model(*shapes_and_params("grouped"))
    batch = packed()
    windows = [(batch.token_BS, batch.target_BS), (batch.token_BS[:1, 2:7], batch.target_BS[:1, 2:7])]
    rest = [(0, 2, 3), (0, 3, 4), (0, 4, 7)]
    parts = [
        *documents(),
        *(Batch(batch.token_BS[b : b + 1, i:j], batch.target_BS[b : b + 1, i:j]) for b, i, j in rest),
    ]
    expected = np.average([loss_of(model, part) for part in parts], weights=[part.token_BS.size for part in parts])
    found = evaluate(SingleProcess(model.ops), model, windows, num_bytes=100, first_token=END)
    assert found.loss == pytest.approx(expected, rel=1e-13)
    assert evaluate(SingleProcess(model.ops), model, windows, num_bytes=100).loss != pytest.approx(expected, rel=1e-3)
