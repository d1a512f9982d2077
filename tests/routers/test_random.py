from dataclasses import replace

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.backends.base import TrainingOptions
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import AttentionConfig, LoadBalanceConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig, OptimizerConfig
from moeport.conformance.formulas import softmax
from moeport.core.losses import symmetric_divergence
from moeport.core.parameters import initial_parameters
from moeport.model.decoder import DecoderLM
from moeport.model.loss_terms import COUNTS, FIELDS, MEANS
from moeport.routers.hash import HashConfig
from moeport.routers.random import RandomConfig
from tests.conformance.targets import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    every_target,
    every_training_target,
)
from tests.model.models import VOCABULARY, batch_of, rows
from tests.routers.examples import EXPERTS, build, choices, context, hidden_states, route, router_params
from tests.support import assert_close, assert_gradient, finite_difference, rng

VARIANTS = [RandomConfig(inference="sequence")]
"""Further configs for the tests of all routers."""
ALPHA = 3.0


def drawn(numbers, pass_number=0, num_experts=EXPERTS, ops=None):
    """Experts of four tokens whose noise is `numbers` in one pass and 0 in the other."""
    ops, router = ops or NumpyOps(), build(RandomConfig(), num_experts)
    noise = {name: np.zeros(4, np.float32) for name in ("pass1", "pass2")}
    noise[f"pass{pass_number + 1}"] = np.array(numbers, np.float32)
    noise = {name: ops.from_numpy(values) for name, values in noise.items()}
    its_context = replace(context(router, tokens=4), noise=noise, pass_number=pass_number)
    x_TD = ops.from_numpy(hidden_states(tokens=4))
    return ops.to_numpy(router.route(ops, {"experts": np.zeros((10, 1))}, x_TD, its_context).expert_N).tolist()


@pytest.mark.parametrize("pass_number", [0, 1])
@every_target
def test_in_training_the_first_number_of_the_pass_draws_one_expert_for_all(target, pass_number):
    ops = target.build().ops
    assert drawn([0.0, 0.9, 0.9, 0.9], pass_number, ops=ops) == [0] * 4
    assert drawn([0.5, 0.9, 0.1, 0.2], pass_number, ops=ops) == [4] * 4
    assert drawn([np.float32(1) - np.float32(2**-24), 0, 0, 0], pass_number, ops=ops) == [EXPERTS - 1] * 4
    assert drawn([0.7, 0, 0, 0], pass_number, num_experts=1, ops=ops) == [0] * 4


def test_every_expert_is_drawn_alike():
    uniform = rng(0).random(8000).astype(np.float32)
    counts = np.bincount([drawn([u] * 4)[0] for u in uniform], minlength=EXPERTS)
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize("inference", ["token", "sequence"])
def test_outside_training_the_table_draws(inference):
    config = RandomConfig(inference=inference)
    router, ids = build(config), np.array([3, 3, 8, 9, 3, 5, 3, 9])
    params = router_params(router)
    its_context = replace(context(router, training=False), token_ids_T=ids, num_sequences=2)
    routing = router.route(NumpyOps(), params, hidden_states(tokens=8), its_context)
    keys = {"token": [3, 4, 0, 2, 3, 6, 5, 2], "sequence": [3] * 8}[inference]
    experts, gates = choices(routing)
    assert experts.tolist() == params["experts"][keys].tolist()
    assert (gates == 1).all()


def test_nothing_is_trained():
    assert [spec.name for spec in build(RandomConfig()).parameter_specs() if spec.trainable] == []
    assert build(RandomConfig()).load_balance == 0


def test_divergence_is_the_mean_of_both():
    first, second = rng(0).standard_normal((2, 5, 7))
    p, q = ([softmax(row) for row in logits] for logits in (first, second))
    want = [(np.sum(a * np.log(a / b)) + np.sum(b * np.log(b / a))) / 2 for a, b in zip(p, q, strict=True)]
    assert_close(symmetric_divergence(NumpyOps(), first, second), np.mean(want), 1e-13)
    assert symmetric_divergence(NumpyOps(), first, first + 4) == pytest.approx(0, abs=1e-14)


def model_of(**options):
    """Two layers of 4 experts with weights large enough that experts differ."""
    moe = MoEConfig(**{"num_experts": 4, "expert_hidden": 6, "router": RandomConfig(consistency=ALPHA)} | options)
    config = ModelConfig(
        num_layers=2,
        d_model=8,
        attention=AttentionConfig(num_heads=2),
        init_std=0.5,
        output_z_loss=0.01,
        moe=moe,
    )
    lm = DecoderLM(config, VOCABULARY)
    return lm, initial_parameters(lm.parameter_specs(), 0)


def numpy_loss(lm, params, batch):
    ops = NumpyOps()
    params = {name: value.astype(np.float64) for name, value in params.items()}
    return lm.loss(lm.forward_pass(ops, batch.token_BS.shape[1], "float64", training=True), params, batch)


def test_the_loss_is_that_of_two_passes_and_their_divergence():
    lm, params = model_of(load_balance=LoadBalanceConfig(coefficient=0.5))
    ops, batch = NumpyOps(), batch_of(lm)
    wide = {name: value.astype(np.float64) for name, value in params.items()}
    run = lm.forward_pass(ops, 5, "float64", training=True)
    logits, counts = [], []
    for number in (0, 1):
        x_BSD, metrics = lm.hidden(replace(run, number=number), wide, batch)
        logits.append(x_BSD.reshape(-1, 8) @ wide["lm_head.weight"].T)
        counts.append([layer.chosen_E.tolist() for layer in metrics])
    for number, of_layers in enumerate(counts):
        for layer, of_experts in enumerate(of_layers):
            expert = int(4 * batch.noise[f"{layer}.pass{number + 1}"][0, 0])
            assert of_experts == [20 if e == expert else 0 for e in range(4)]
    probs = [np.array([softmax(row) for row in x]) for x in logits]
    entropies = [-np.log(p[np.arange(20), batch.target_BS.reshape(-1)]).mean() for p in probs]
    z_losses = [np.mean(np.log(np.exp(x).sum(axis=1)) ** 2) for x in logits]
    divergence = 0.5 * np.mean(np.sum((probs[0] - probs[1]) * np.log(probs[0] / probs[1]), axis=1))
    assert divergence > 0.1
    terms = lm.loss(run, wide, batch)
    balance = 2 * 2 * 0.5 * 4.0
    assert_close(terms.loss, sum(entropies) + 0.01 * sum(z_losses) + ALPHA * divergence + balance, 1e-12)
    assert_close(terms.cross_entropy, np.mean(entropies), 1e-13)
    assert_close(terms.output_z, np.mean(z_losses), 1e-13)
    assert terms.load_balance == 4.0
    assert terms.chosen_LE.tolist() == np.sum(counts, axis=0).tolist()
    assert terms.served_LE.tolist() == np.sum(counts, axis=0).tolist()


def test_equal_draws_agree():
    lm, params = model_of()
    batch = batch_of(lm)
    same = {name: batch.noise[name.replace("pass2", "pass1")] for name in batch.noise}
    terms = numpy_loss(lm, params, replace(batch, noise=same))
    assert_close(terms.loss, 2 * (terms.cross_entropy + 0.01 * terms.output_z), 1e-13)


def test_evaluation_is_one_pass_and_repeats():
    lm, params = model_of()
    batch = batch_of(lm)
    evaluation = get_backend(BackendConfig(name="numpy", device="cpu", dtype="float64")).evaluation_model(lm, params)
    first, second = evaluation.evaluate(batch), evaluation.evaluate(batch)
    assert first.loss == second.loss
    assert np.asarray(first.chosen_LE).sum(axis=1).tolist() == [20, 20]
    parts = [np.asarray(evaluation.evaluate(rows(batch, i, i + 1)).cross_entropy) for i in range(4)]
    assert_close(first.cross_entropy, np.mean(parts), 1e-13)


@every_training_target
def test_loss_terms_and_gradients_are_those_of_the_reference(target):
    """The gradients by finite differences, at a few places."""
    lm, params = model_of()
    batch, backend = batch_of(lm), target.build()
    training = backend.training_model(lm, params, TrainingOptions(OptimizerConfig()))
    got, want = training.accumulate(batch, 1.0), numpy_loss(lm, params, batch)
    for name in ("loss", "cross_entropy", "load_balance", "router_z", "output_z", "chosen_LE", "served_LE"):
        value = backend.ops.to_numpy(getattr(got, name))
        assert_close(value, getattr(want, name), 8 * TOLERANCE[target.dtype], name)
    if target.dtype == "bfloat16":
        return
    for name in ("final_norm.weight", "layers.0.moe.experts.w_out", "lm_head.weight"):
        value = params[name].astype(np.float64)
        places = rng(0).permutation(value.size)[:8]

        def loss(numbers, name=name, value=value, places=places):
            changed = value.copy()
            changed.reshape(-1)[places] = numbers
            return numpy_loss(lm, params | {name: changed}, batch).loss

        slopes = finite_difference(loss, value.reshape(-1)[places])
        assert_gradient(training.gradients()[name].reshape(-1)[places], slopes, GRADIENT_TOLERANCE[target.dtype], name)


def test_recomputed_and_accumulated_gradients_are_the_same():
    lm, params = model_of()
    batch = batch_of(lm)
    backend = get_backend(BackendConfig(name="torch", device="cpu", dtype="float64"))
    plain, recomputed = (
        backend.training_model(lm, params, TrainingOptions(OptimizerConfig(), activation_checkpointing=on))
        for on in (False, True)
    )
    terms = [model.accumulate(batch, 1.0) for model in (plain, recomputed)]
    assert terms[0].loss == terms[1].loss
    for name, want in plain.gradients().items():
        np.testing.assert_array_equal(recomputed.gradients()[name], want)
    whole = plain.gradients()
    plain.step(0.0, plain.gradient_norm())
    for _ in range(2):
        plain.accumulate(batch, 0.5)
    for name, want in whole.items():
        assert_close(plain.gradients()[name], want, 1e-14, name)


def test_two_passes_cost_twice():
    lm, _ = model_of()
    one_pass = model_of(router=HashConfig())[0]
    assert lm.training_flops_per_token(5) == 2 * one_pass.training_flops_per_token(5)
    assert lm.config.parameter_counts(VOCABULARY) == one_pass.config.parameter_counts(VOCABULARY)


def test_routes_in_training_do_not_look_at_ids_or_states():
    assert route(RandomConfig()).expert_N.tolist() == route(RandomConfig(), x_TD=hidden_states(3)).expert_N.tolist()


def test_every_loss_term_is_joined():
    assert {"loss", "capacity_L", *COUNTS, *MEANS} == set(FIELDS)
