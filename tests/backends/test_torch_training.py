import numpy as np
import pytest
import torch

from moeport.backends.torch import compiling
from moeport.backends.torch.compiling import compile_blocks
from moeport.config.model import AttentionConfig, RopeBasesConfig
from moeport.config.training import OptimizerConfig
from tests.backends.models import assert_same_bits, stepped, training_model
from tests.model.models import ROUTER_CONFIGS, batch_of, model_config, rows
from tests.support import assert_close, assert_gradient, finite_difference

TERMS = ("loss", "cross_entropy", "load_balance", "router_z", "output_z")
every_router = pytest.mark.parametrize("router", ROUTER_CONFIGS)


def accumulated(config, dtype, batches, **options):
    """Loss terms of each micro-batch and the gradients of all, in a form of the experts that time does not choose."""
    training = training_model(config, dtype, kernels="default", **options)
    terms = [training.accumulate(batch, 1 / len(batches)) for batch in batches]
    return terms, training.gradients()


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@every_router
def test_micro_batches_add_up_to_the_whole_batch(router, dtype, tolerance, parts):
    config = model_config(router)
    batch = batch_of(training_model(config).model)
    size = 4 // parts
    whole_terms, whole = accumulated(config, dtype, [batch])
    part_terms, got = accumulated(config, dtype, [rows(batch, i, i + size) for i in range(0, 4, size)])
    for name in TERMS:
        mean = np.mean([getattr(terms, name).item() for terms in part_terms])
        assert_close(mean, getattr(whole_terms[0], name).item(), tolerance, name)
    for name in ("chosen_LE", "served_LE"):
        total = sum(getattr(terms, name) for terms in part_terms)
        assert total.tolist() == getattr(whole_terms[0], name).tolist()
    assert got.keys() == whole.keys()
    for name, want in whole.items():
        assert_close(got[name], want, 4 * tolerance, name)


def compiled_and_plain(router):
    torch._dynamo.reset()
    config = model_config(router)
    plain, compiled = training_model(config), training_model(config)
    compile_blocks(compiled.module, compiled.model)
    batch = batch_of(plain.model)
    want, got = (model.accumulate(batch, 1.0).loss.item() for model in (plain, compiled))
    assert_close(got, want, 1e-6)
    expected = plain.gradients()
    for name, gradient in compiled.gradients().items():
        assert_close(gradient, expected[name], 1e-5, name)


def test_a_block_is_one_graph(monkeypatch):
    """Which others of the same kind share."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "COMPILER", count)
    compiled_and_plain("topk")
    assert len(graphs) == 1


@pytest.mark.slow
@every_router
def test_every_router_trains_compiled(router):
    compiled_and_plain(router)


@every_router
def test_gradients_are_those_of_finite_differences(router):
    """A few numbers of every parameter, through the whole training loss."""
    config = model_config(router)
    training = training_model(config, "float64")
    batch = batch_of(training.model)
    training.accumulate(batch, 1.0)
    params = {name: value.astype(np.float64) for name, value in training.parameters().items()}
    probe = training_model(config, "float64")
    probe.module.train()
    placed = probe.on_device(batch)
    for name, gradient in training.gradients().items():
        place = tuple(size // 2 for size in gradient.shape)

        def loss(x, name=name, place=place):
            moved = params[name].copy()
            moved[place] = x
            probe.load_parameters({name: moved})
            with torch.no_grad():
                return probe.module(placed).loss.item()

        assert_gradient(gradient[place], finite_difference(loss, params[name][place]), 1e-12, name)
        probe.load_parameters({name: params[name]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_router
def test_recomputing_activations_changes_nothing(router, dtype):
    """Neither gradients nor reported numbers, which a second forward pass must not count twice."""
    config = model_config(router)
    batch = batch_of(training_model(config).model)
    (plain,), gradients = accumulated(config, dtype, [batch])
    (recomputed,), again = accumulated(config, dtype, [batch], activation_checkpointing=True)
    for want, got in zip(plain.flat(), recomputed.flat(), strict=True):
        assert got.tolist() == want.tolist()
    assert_same_bits(again, gradients)
    assert plain.chosen_LE.sum(1).max().item() <= 20 * config.moe.router.experts_per_token


def test_activations_are_recomputed(monkeypatch):
    calls = []
    training = training_model(model_config(), activation_checkpointing=True)
    block = training.module.layers[0].block
    forward = block.forward

    def counted(*args):
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(block, "forward", counted)
    training.accumulate(batch_of(training.model), 1.0)
    assert len(calls) == 2


@every_router
def test_the_same_seed_gives_the_same_bits(router):
    config = model_config(router)
    runs = [training_model(config, optimizer=OptimizerConfig(clip_norm=0.5)) for _ in range(2)]
    for seed in range(3):
        for training in runs:
            stepped(training, batch_of(training.model, seed=seed))
    assert_same_bits(runs[0].parameters(), runs[1].parameters())


def test_another_seed_gives_other_parameters():
    one, other = (training_model(model_config(), seed=seed).parameters() for seed in (0, 1))
    assert one["lm_head.weight"].tolist() != other["lm_head.weight"].tolist()


def test_bfloat16_keeps_parameters_gradients_and_moments_in_float32():
    training = training_model(model_config("sigmoid_bias"), "bfloat16")
    batch = batch_of(training.model)
    terms = training.accumulate(batch, 1.0)
    kinds = {x.dtype for x in (*training.parameters().values(), *training.gradients().values())}
    training.step(0.01, training.gradient_norm())
    kinds |= {value.dtype for value in training.optimizer_state().values()}
    assert kinds == {np.dtype(np.float32)}
    assert {getattr(terms, name).dtype for name in TERMS} == {torch.float32}
    tokens = training.ops.from_numpy(batch.token_BS)
    assert training.module.logits(tokens).dtype == torch.bfloat16


def test_small_updates_are_not_lost_in_bfloat16():
    """Steps of 1e-4 on weights near 1 are below half a unit of bfloat16; ten of them must add up."""
    training = training_model(model_config(), "bfloat16")
    before = training.parameters()["final_norm.weight"]
    for _ in range(10):
        stepped(training, batch_of(training.model), learning_rate=1e-4)
    moved = np.abs(training.parameters()["final_norm.weight"] - before)
    assert 3e-4 < moved.max() < 2e-3


def test_float64_keeps_everything_in_float64():
    training = training_model(model_config(), "float64")
    terms = training.accumulate(batch_of(training.model), 1.0)
    arrays = (*training.parameters().values(), *training.gradients().values())
    assert {value.dtype for value in arrays} == {np.dtype(np.float64)}
    assert {getattr(terms, name).dtype for name in TERMS} == {torch.float64}


def test_evaluation_neither_draws_noise_nor_leaves_gradients():
    training = training_model(model_config("gshard"))
    batch = batch_of(training.model)
    trained, evaluated = training.accumulate(batch, 1.0), training.evaluate(batch)
    assert evaluated.chosen_LE.sum().item() == 2 * 2 * 20 > trained.chosen_LE.sum().item()
    assert not evaluated.loss.requires_grad
    again = training.accumulate(batch, 1.0)
    assert again.loss.item() == trained.loss.item()


def test_terms_are_detached():
    terms = training_model(model_config()).accumulate(batch_of(training_model(model_config()).model), 1.0)
    assert not any(term.requires_grad for term in terms.flat())


def test_some_parameters_can_be_read_and_replaced():
    training = training_model(model_config("sigmoid_bias"))
    name = "layers.0.moe.router.bias"
    training.load_parameters({name: np.arange(4, dtype=np.float32)})
    assert {k: v.tolist() for k, v in training.parameters([name]).items()} == {name: [0.0, 1.0, 2.0, 3.0]}


@pytest.mark.slow
@pytest.mark.parametrize("bases", [(), (50.0, 3.0)], ids=["one rotary base", "two"])
def test_compiled_blocks_give_the_same_loss_and_gradients(bases):
    options = {"rope_bases": RopeBasesConfig(kind="list", values=bases)} if bases else {}
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm=True, **options)
    config = model_config(num_layers=1, attention=attention)
    batch = batch_of(training_model(config).model)
    (plain,), gradients = accumulated(config, "float32", [batch])
    (compiled,), again = accumulated(config, "float32", [batch], compile=True)
    assert_close(compiled.loss.item(), plain.loss.item(), 1e-6)
    for name, want in gradients.items():
        assert_close(again[name], want, 1e-5, name)
