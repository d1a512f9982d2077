import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import AttentionConfig, LoadBalanceConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig
from moeport.model import transformer
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from tests.conformance.targets import COMPOSED, TOLERANCE, parameters
from tests.model.models import ROUTER_CONFIGS, VOCABULARY, batch_of, changed, model_and_params, model_config, rows
from tests.support import assert_close

every_router = pytest.mark.parametrize("router", ROUTER_CONFIGS)


def on_numpy(config, dtype="float64"):
    """(model, its evaluation by numpy)."""
    model, params = model_and_params(config)
    backend = get_backend(BackendConfig(name="numpy", device="cpu", dtype=dtype))
    return model, backend.evaluation_model(model, changed(params, 50))


def test_names_and_shapes():
    config = model_config(
        "sigmoid_bias", moe={"first_dense": 1, "num_shared_experts": 1}, attention=AttentionConfig(num_heads=2)
    )
    attention = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "out": (8, 8)}
    want = {"embedding.weight": (11, 8), "layers.0.attention_norm.weight": (8,)}
    want |= {f"layers.0.attention.{name}": shape for name, shape in attention.items()}
    want |= {"layers.0.mlp_norm.weight": (8,), "layers.0.mlp.w_in": (36, 8), "layers.0.mlp.w_out": (8, 18)}
    want |= {"layers.1.attention_norm.weight": (8,)}
    want |= {f"layers.1.attention.{name}": shape for name, shape in attention.items()}
    want |= {
        "layers.1.mlp_norm.weight": (8,),
        "layers.1.moe.router.weight": (4, 8),
        "layers.1.moe.router.bias": (4,),
        "layers.1.moe.experts.w_in": (4, 12, 8),
        "layers.1.moe.experts.w_out": (4, 8, 6),
        "layers.1.moe.shared.w_in": (12, 8),
        "layers.1.moe.shared.w_out": (8, 6),
        "final_norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    specs = DecoderLM(config, VOCABULARY).parameter_specs()
    assert [(spec.name, spec.shape) for spec in specs] == list(want.items())
    assert [spec.name for spec in specs if not spec.trainable] == ["layers.1.moe.router.bias"]


def test_grouped_heads_norms_and_head_width():
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True)
    specs = DecoderLM(model_config(attention=attention), VOCABULARY).parameter_specs()
    shapes = {spec.name.removeprefix("layers.0.attention."): spec.shape for spec in specs}
    assert [shapes[name] for name in ("q", "k", "v", "out")] == [(24, 8), (12, 8), (12, 8), (8, 24)]
    assert [shapes[name] for name in ("q_norm", "k_norm")] == [(6,), (6,)]


def test_norms_of_all_heads_together_and_biases():
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm="whole", bias="all")
    specs = DecoderLM(model_config(attention=attention), VOCABULARY).parameter_specs()
    shapes = {spec.name.removeprefix("layers.0.attention."): spec.shape for spec in specs}
    assert [shapes[name] for name in ("q_norm", "k_norm")] == [(24,), (12,)]
    assert [shapes[f"{name}_bias"] for name in ("q", "k", "v", "out")] == [(24,), (12,), (12,), (8,)]
    assert not any(spec.decays for spec in specs if spec.name.endswith("_bias"))
    qkv = DecoderLM(model_config(attention=AttentionConfig(num_heads=4, bias="qkv")), VOCABULARY)
    biases = [spec.name for spec in qkv.parameter_specs() if spec.name.endswith("_bias")]
    assert biases == [f"layers.{layer}.attention.{name}_bias" for layer in (0, 1) for name in ("q", "k", "v")]


@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
@pytest.mark.parametrize("qk_norm", [False, True, "whole"])
def test_parameters_and_products_of_attention_are_counted(qk_norm, bias):
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=qk_norm, bias=bias)
    moe = {"num_shared_experts": 1, "shared_hidden": 5, "shared_mixing": "sigmoid", "every": 2}
    config = model_config(attention=attention, moe=moe)
    specs = DecoderLM(config, VOCABULARY).parameter_specs()
    assert config.parameter_counts(VOCABULARY).total == sum(spec.size for spec in specs)
    vectors = sum(spec.size for spec in specs if len(spec.shape) == 1)
    norms = config.d_model  # the final norm is in no block
    unused = sum(spec.size // 2 for spec in specs if spec.is_expert)
    embedding_and_head = 2 * VOCABULARY * config.d_model
    in_blocks = sum(spec.size for spec in specs) - vectors - unused - embedding_and_head
    heads = 12 * config.num_layers * config.num_heads * config.head_dim * 7
    assert config.block_flops_per_token(7) == 6 * in_blocks + heads
    assert config.block_counts.total == sum(spec.size for spec in specs) - embedding_and_head - norms


def test_tied_embeddings_have_no_head():
    tied, untied = (DecoderLM(model_config(tie_embeddings=tie), VOCABULARY) for tie in (True, False))
    assert [spec.name for spec in untied.parameter_specs()] == (
        [spec.name for spec in tied.parameter_specs()] + ["lm_head.weight"]
    )


def test_weights_that_write_to_the_residual_stream_start_smaller():
    model = DecoderLM(model_config(num_layers=8, moe={"first_dense": 1}), VOCABULARY)
    smaller = {spec.name.split(".", 2)[2] for spec in model.parameter_specs() if spec.std == 0.5 / 4}
    assert smaller == {"attention.out", "mlp.w_out", "moe.experts.w_out"}
    others = {spec.std for spec in model.parameter_specs() if spec.init == "normal"} - {0.5 / 4}
    assert others == {0.5}


@pytest.mark.parametrize(
    ("every", "first_dense", "layers"),
    [(1, 0, (0, 1, 2, 3, 4, 5)), (2, 0, (1, 3, 5)), (1, 2, (2, 3, 4, 5)), (2, 1, (2, 4)), (3, 0, (2, 5))],
)
def test_layers_with_experts(every, first_dense, layers):
    config = ModelConfig(num_layers=6, moe=MoEConfig(every=every, first_dense=first_dense))
    assert config.moe_layers == layers
    assert tuple(block.layer for block in DecoderLM(config, 11).blocks if block.moe) == layers
    fewer = config.model_copy(update={"moe": config.moe.model_copy(update={"dense_layers": layers[:1]})})
    assert fewer.moe_layers == layers[1:]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("moe", [{}, {"first_dense": 1, "num_shared_experts": 2}, {"activation": "gelu"}])
@every_router
def test_parameter_counts_are_those_of_the_specs(router, moe, tie):
    config = model_config(router, moe=moe, tie_embeddings=tie)
    specs = [spec for spec in DecoderLM(config, VOCABULARY).parameter_specs() if spec.trainable]
    counts = config.parameter_counts(VOCABULARY)
    assert counts.total == sum(spec.size for spec in specs)
    experts = sum(spec.size for spec in specs if ".experts." in spec.name)
    assert counts.active == counts.total - experts + experts * config.moe.router.experts_per_token // 4


def test_noise_is_drawn_for_layers_whose_router_wants_it():
    model = DecoderLM(model_config("gshard", moe={"first_dense": 1}), VOCABULARY)
    noise = model.noise(3, 5, seed=0, step=2)
    assert {name: (x.shape, x.dtype) for name, x in noise.items()} == {"1.second_expert": ((3, 5), np.float32)}
    assert DecoderLM(model_config("topk"), VOCABULARY).noise(3, 5, seed=0, step=2) == {}


def test_noise_depends_on_seed_step_and_layer():
    model = DecoderLM(model_config("gshard"), VOCABULARY)
    draws = [model.noise(3, 5, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({noise[f"{layer}.second_expert"].tobytes() for noise in draws for layer in (0, 1)}) == 6
    again = model.noise(3, 5, 0, 0)
    assert all(again[name].tobytes() == value.tobytes() for name, value in draws[0].items())


@every_router
def test_later_tokens_change_nothing_before(router):
    model, evaluation = on_numpy(model_config(router))
    tokens = batch_of(model).token_BS
    changed_tokens = tokens.copy()
    changed_tokens[:, 3:] = (tokens[:, 3:] + 1) % VOCABULARY
    before, after = evaluation.logits(tokens), evaluation.logits(changed_tokens)
    assert_close(after[:, :3], before[:, :3], 1e-13)
    assert (after[:, 3:] != before[:, 3:]).any(axis=-1).all()


LOSS_CASES = {router: (router, {}, True) for router in ROUTER_CONFIGS} | {
    "own head": ("topk", {}, False),
    "every second layer": ("topk", {"every": 2}, True),
    "every second layer, own head": ("topk", {"every": 2}, False),
}


def is_compiled_elsewhere(target, case):
    """tests/backends/test_mindspore.py evaluates every router in a compiled model; compiling takes seconds."""
    return target.static and LOSS_CASES[case][0] != "topk"


@pytest.mark.parametrize(
    ("target", "case"),
    [
        pytest.param(
            *target.values,
            case,
            marks=[*target.marks, *[pytest.mark.slow] * is_compiled_elsewhere(target.values[0], case)],
        )
        for target in parameters(COMPOSED)
        for case in LOSS_CASES
    ],
    ids=str,
)
def test_loss_terms_are_those_of_the_reference(target, case):
    router, moe, tie = LOSS_CASES[case]
    config = model_config(router, moe=moe, tie_embeddings=tie)
    model, reference = on_numpy(config)
    backend, batch = target.build(), batch_of(model)
    want = reference.evaluate(batch)
    got = backend.evaluation_model(model, reference.parameters()).evaluate(batch)
    to_numpy = backend.ops.to_numpy
    tolerance = 8 * TOLERANCE[target.dtype]
    for name in ("loss", "cross_entropy", "load_balance", "router_z", "output_z"):
        assert_close(to_numpy(getattr(got, name)), getattr(want, name), tolerance, name)
    if target.dtype != "bfloat16":
        assert to_numpy(got.chosen_LE).tolist() == want.chosen_LE.tolist()
        assert to_numpy(got.served_LE).tolist() == want.served_LE.tolist()


def test_loss_is_the_weighted_sum_of_its_terms():
    moe = {"load_balance": LoadBalanceConfig(coefficient=0.1), "router_z_loss": 0.01}
    model, evaluation = on_numpy(model_config(moe=moe, num_layers=3))
    terms = evaluation.evaluate(batch_of(model))
    layers = 3
    want = terms.cross_entropy + 0.01 * terms.output_z + layers * (0.1 * terms.load_balance + 0.01 * terms.router_z)
    assert_close(terms.loss, want, 1e-14)
    assert terms.chosen_LE.shape == terms.served_LE.shape == (layers, 4)
    assert terms.chosen_LE.sum(axis=1).tolist() == [2 * 20] * layers


def test_cross_entropy_is_that_of_the_logits(monkeypatch):
    model, evaluation = on_numpy(model_config())
    batch = batch_of(model)
    logits = evaluation.logits(batch.token_BS)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = [log_probs[b, s, batch.target_BS[b, s]] for b, s in np.ndindex(batch.target_BS.shape)]
    terms = evaluation.evaluate(batch)
    assert_close(terms.cross_entropy, -np.mean(picked), 1e-13)
    losses_BS = evaluation.token_losses(batch)
    assert losses_BS.shape == batch.target_BS.shape
    assert_close(losses_BS.ravel(), -np.array(picked), 1e-13)
    monkeypatch.setattr(transformer, "SCORED_LOGITS", 3 * VOCABULARY)
    assert_close(evaluation.token_losses(batch), losses_BS, 1e-13)
    assert_close(terms.output_z, np.mean(np.log(np.exp(logits).sum(axis=-1)) ** 2), 1e-13)


def test_output_z_loss_without_weight_is_reported_but_not_added():
    config = model_config(
        output_z_loss=0.0, moe={"load_balance": LoadBalanceConfig(coefficient=0.0), "router_z_loss": 0}
    )
    model, evaluation = on_numpy(config)
    terms = evaluation.evaluate(batch_of(model))
    assert terms.output_z > 0
    assert terms.loss == terms.cross_entropy


@every_router
def test_sequences_do_not_see_each_other(router):
    model, evaluation = on_numpy(model_config(router))
    batch = batch_of(model)
    whole = evaluation.evaluate(batch)
    parts = [evaluation.evaluate(rows(batch, i, i + 1)) for i in range(4)]
    for name in ("loss", "cross_entropy", "load_balance", "router_z", "output_z"):
        assert_close(getattr(whole, name), np.mean([getattr(part, name) for part in parts]), 1e-13, name)
    assert whole.chosen_LE.tolist() == sum(part.chosen_LE for part in parts).tolist()


def test_router_state_moves_against_the_load():
    model = DecoderLM(model_config("sigmoid_bias", moe={"first_dense": 1}), VOCABULARY)
    name = "layers.1.moe.router.bias"
    assert model.router_state_names() == [name]
    new = model.updated_state({name: np.zeros(4, np.float32)}, np.array([[8, 4, 4, 0]]), np.zeros((1, 4, 4)))
    assert new.keys() == {name}
    assert new[name].tolist() == np.array([-1e-3, 0, 0, 1e-3], np.float32).tolist()


def test_routers_without_state_update_nothing():
    model = DecoderLM(model_config("topk"), VOCABULARY)
    assert model.router_state_names() == []
    assert model.updated_state({}, np.array([[8, 4, 4, 0]] * 2), np.zeros((2, 4, 4))) == {}


def test_vocabulary_of_the_config_wins():
    assert DecoderLM(model_config(vocab_size=32), VOCABULARY).vocab_size == 32


def test_rope_tables_are_float32_at_least():
    model = DecoderLM(model_config(), VOCABULARY)
    for dtype, want in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        cos, sin = map(np.asarray, model.rope(NumpyOps(), 6, dtype))
        assert (str(cos.dtype), str(sin.dtype), cos.shape) == (want, want, (6, 4))


def test_evaluation_ignores_noise():
    model, evaluation = on_numpy(model_config("gshard"))
    batch = batch_of(model)
    quiet = Batch(batch.token_BS, batch.target_BS)
    assert evaluation.evaluate(batch).loss == evaluation.evaluate(quiet).loss
