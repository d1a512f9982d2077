import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config.model import AttentionConfig, CapacityConfig, ModelConfig, MoEConfig
from moeport.conformance import formulas
from moeport.core.parameters import initial_parameters
from moeport.core.routing import RouterContext
from moeport.model.batch import Batch
from moeport.model.block import Block
from moeport.model.decoder import DecoderLM
from moeport.model.forward_pass import Pass
from moeport.model.rope import rope_tables
from moeport.routers.cartesian import CartesianConfig
from moeport.routers.topk import TopKConfig
from tests.model.reference import mixed
from tests.routers.examples import build as build_example
from tests.routers.examples import choices, hidden_states, route, router_params
from tests.support import assert_close, grid, rng

VARIANTS = [CartesianConfig(top_k=1)]
"""Further configs for the tests of all routers."""
EXPERTS, WIDTH, HIDDEN = 4, 6, 5


def test_gates_are_probabilities_over_the_sum_of_the_best():
    """softmax over all, top-k, renormalised, by loops."""
    config = CartesianConfig(top_k=3)
    weight = router_params(build_example(config))["weight"]
    experts, gates = choices(route(config))
    for x, chosen, got in zip(hidden_states(), experts, gates, strict=True):
        probs = formulas.softmax(weight @ x)
        best = np.argsort(-probs, kind="stable")[:3]
        assert chosen.tolist() == best.tolist()
        assert_close(got, probs[best] / probs[best].sum(), 1e-13)


def block(moe):
    config = ModelConfig(
        num_layers=1,
        d_model=WIDTH,
        attention=AttentionConfig(num_heads=1),
        moe=MoEConfig(num_experts=EXPERTS, expert_hidden=HIDDEN, router=CartesianConfig(**moe.pop("router")), **moe),
    )
    made = Block(config, 0, vocab_size=10)
    params = {spec.name: grid(i, *spec.shape) / 2 for i, spec in enumerate(made.parameter_specs())}
    silent = {"attention.out": np.zeros_like(params["attention.out"])}
    return made, params | {name: 1.0 + np.abs(value) for name, value in params.items() if "norm" in name} | silent


def run(made, params, x_TD):
    """Output and metrics of the block, whose attention adds nothing."""
    rope = rope_tables(len(x_TD), WIDTH, 10000.0)
    run = Pass(NumpyOps(), "float64", rope, training=True)
    y_BSD, metrics = made.forward(run, params, x_TD[None], RouterContext(0, True))
    return y_BSD[0], metrics


def rms_norm(x, weight):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight


def sub_layer(params, suffix, x_TD, top_k):
    """x + experts(norm(x)) by loops over tokens, shared experts mixed where there are any."""
    own = {name.removeprefix(f"moe{suffix}."): v for name, v in params.items() if name.startswith(f"moe{suffix}.")}
    u_TD = rms_norm(x_TD, params[f"mlp_norm{suffix}.weight"])
    out_TD = np.zeros_like(x_TD)
    for token, u in enumerate(u_TD):
        probs = formulas.softmax(own["router.weight"] @ u)
        best = np.argsort(-probs)[:top_k]
        for expert in best:
            y = formulas.mlp(u, own["experts.w_in"][expert], own["experts.w_out"][expert], "swiglu")
            out_TD[token] += probs[expert] / probs[best].sum() * y
    if "shared.w_in" in own:
        out_TD = mixed(own, u_TD, out_TD, formulas.mlp(u_TD, own["shared.w_in"], own["shared.w_out"], "swiglu"))
    return x_TD + out_TD


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_block_is_one_sub_layer_after_the_other_with_a_residual_and_a_norm_of_its_own(top_k, shared):
    made, params = block({"router": {"top_k": top_k}, "num_shared_experts": shared})
    x_TD = rng(1).standard_normal((7, WIDTH))
    y_TD, metrics = run(made, params, x_TD)
    assert_close(y_TD, sub_layer(params, "2", sub_layer(params, "", x_TD, top_k), top_k), 1e-12)
    assert [int(m.chosen_E.sum()) for m in metrics] == [7 * top_k, 7 * top_k]
    assert ("moe.mixing.weight" in params) == ("moe2.mixing.weight" in params) == (shared > 0)


def test_e_and_e_sub_experts_make_e_times_e_compositions():
    """With biased routers each pair (a, b) is chosen; no two of them give the same output."""
    made, params = block({"router": {"top_k": 1}})
    x_TD = 1.0 + rng(2).random((1, WIDTH))
    outputs = {}
    for a in range(EXPERTS):
        for b in range(EXPERTS):
            favourites = {}
            for suffix, expert in (("", a), ("2", b)):
                weight = np.zeros((EXPERTS, WIDTH))
                middle = x_TD if suffix == "" else sub_layer(params | favourites, "", x_TD, 1)
                weight[expert] = rms_norm(middle, params[f"mlp_norm{suffix}.weight"])[0]
                favourites[f"moe{suffix}.router.weight"] = weight
            y_TD, metrics = run(made, params | favourites, x_TD)
            assert [int(m.chosen_E.argmax()) for m in metrics] == [a, b]
            outputs[a, b] = y_TD[0]
    distances = [np.abs(p - q).max() for i, p in outputs.items() for j, q in outputs.items() if i != j]
    assert len(outputs) == EXPERTS**2
    assert min(distances) > 1e-3


def paper(layers, width, hidden, moe):
    """The models of Table 1: experts in every second block, a vocabulary of 32k, SwiGLU of 4 times the width."""
    attention = AttentionConfig(num_heads=width // 64)
    return ModelConfig(num_layers=layers, d_model=width, dense_hidden=hidden, attention=attention, moe=moe)


def cartesian(hidden):
    return MoEConfig(
        num_experts=16, expert_hidden=hidden // 2, every=2, num_shared_experts=1, router=CartesianConfig(top_k=2)
    )


def fine_grained(hidden):
    return MoEConfig(
        num_experts=32, expert_hidden=hidden // 2, every=2, num_shared_experts=2, router=TopKConfig(top_k=4)
    )


def shared(hidden):
    return MoEConfig(num_experts=16, expert_hidden=hidden, every=2, num_shared_experts=1, router=TopKConfig(top_k=2))


@pytest.mark.parametrize("moe", [cartesian, fine_grained, shared])
@pytest.mark.parametrize(
    ("layers", "width", "hidden", "total", "active"),
    [(12, 768, 3072, 842e6, 247e6), (24, 1024, 4096, 2.88e9, 770e6)],
    ids=["MoE-Base", "MoE-Large"],
)
def test_parameter_counts_of_table_1(layers, width, hidden, total, active, moe):
    """The printed digits come out if routers and mixing, less than 0.1 % of the whole, are left out."""
    config = paper(layers, width, hidden, moe(hidden))
    counts, router = config.parameter_counts(32_000), config.moe.router
    sub_layers = len(config.moe_layers) * router.sub_layers
    gates = sub_layers * router.parameter_count(width, config.moe.num_experts)
    gates += sub_layers * 2 * width if config.moe.mixes_shared_experts else 0
    assert gates < 1e-3 * counts.total
    assert float(f"{counts.total - gates:.3g}") == total
    assert float(f"{counts.active - gates:.3g}") == active


def test_counts_are_those_of_the_arrays():
    config = paper(2, 128, 96, cartesian(96))
    specs = DecoderLM(config, 50).parameter_specs()
    counts = config.parameter_counts(50)
    assert counts.total == sum(spec.size for spec in specs)
    experts = sum(spec.size for spec in specs if ".experts." in spec.name)
    assert counts.total - counts.active == experts * 14 // 16


def test_sub_layers_draw_noise_of_their_own():
    moe = MoEConfig(
        num_experts=4,
        expert_hidden=8,
        router=CartesianConfig(),
        capacity=CapacityConfig(policy="factor", drop="random"),
    )
    model = DecoderLM(ModelConfig(num_layers=1, d_model=16, moe=moe), 7)
    noise = model.noise(2, 3, seed=0, step=0)
    assert sorted(noise) == ["0.2.drop_0", "0.2.drop_1", "0.drop_0", "0.drop_1"]
    seen = {}
    for suffix, layer in model.blocks[0].moe.items():
        layer.forward = spied(layer.forward, seen, suffix)
    params = initial_parameters(model.parameter_specs(), 0)
    tokens = np.zeros((2, 3), int)
    run = model.forward_pass(NumpyOps(), 3, "float32", training=True)
    model.loss(run, params, Batch(tokens, tokens, noise))
    for suffix, prefix in (("", "0."), ("2", "0.2.")):
        for name in ("drop_0", "drop_1"):
            assert (seen[suffix][name] == noise[prefix + name].reshape(-1)).all()


def spied(forward, seen, suffix):
    def run(ops, params, x_TD, context, *rest):
        seen[suffix] = context.noise
        return forward(ops, params, x_TD, context, *rest)

    return run
