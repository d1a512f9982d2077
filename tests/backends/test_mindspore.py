"""What the conformance suite does not cover: whole models, refusals, and a checkpoint trained with torch."""

import json

import numpy as np
import pytest
from rich.console import Console

from moeport.backends import get_backend
from moeport.config.model import ModelConfig
from moeport.config.training import BackendConfig
from moeport.core.parameters import initial_parameters
from moeport.errors import BackendUnavailableError
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.routers import ROUTERS
from moeport.training.generate import generate
from moeport.training.run import train
from tests.model.models import changed
from tests.support import hide_framework
from tests.training.test_checkpoint import write_meta
from tests.training.tiny import tiny_config

mindspore = pytest.importorskip("mindspore")

VOCAB = 29
OPTIONS = {
    "sinkhorn_expert_choice": {"sinkhorn_iterations": 3},
    "sinkhorn_token_choice": {"sinkhorn_iterations": 3},
    "sparsity_constrained_expert_choice": {"solver_iterations": 3},
}
"""Fewer rounds of what graphs unroll."""
LOGITS = ("topk", "random", "soft", "expert_choice", "cartesian", "rre")
"""Routers of each kind of forward pass, whose logits are held to torch's; the loss of an evaluation has the same pass,
and every graph takes its time to compile.
"""


@pytest.mark.parametrize(
    ("router", "dtype", "tolerance"),
    [
        ("topk", "float32", 1e-6),
        *(pytest.param(router, "float32", 1e-6, marks=pytest.mark.slow) for router in sorted({*ROUTERS} - {"topk"})),
        *((router, "float64", 1e-12) for router in sorted(ROUTERS)),
    ],
)
def test_losses_logits_and_gradients_are_those_of_torch(router, dtype, tolerance):
    layers = 2 if router == "topk" else 1  # compiling takes the time, by layers
    values = {"num_layers": layers, "d_model": 16, "attention": {"num_heads": 2, "num_kv_heads": 1, "qk_norm": True}}
    values["moe"] = {
        "num_experts": 4,
        "expert_hidden": 12,
        "num_shared_experts": 1,
        "router": {"name": router, **OPTIONS.get(router, {})},
    }
    assert_same_as_torch(values, dtype, tolerance, with_logits=router in LOGITS or dtype == "float32")


def test_what_checkpoints_from_elsewhere_need_is_as_on_torch():
    """Biases, a norm of all heads together, a gated shared expert, dense blocks; everything away from its start."""
    attention = {"num_heads": 2, "num_kv_heads": 1, "qk_norm": "whole", "bias": "all"}
    moe = {"num_experts": 4, "expert_hidden": 12, "num_shared_experts": 1, "shared_hidden": 9, "dense_layers": [1]}
    values = {"num_layers": 2, "d_model": 16, "attention": attention, "moe": {**moe, "shared_mixing": "sigmoid"}}
    assert_same_as_torch(values, "float64", 1e-12, move=lambda params: changed(params, 1))


@pytest.mark.parametrize("queries", [None, 6])
def test_latent_attention_is_as_on_torch(queries):
    scaling = {"type": "yarn", "factor": 4.0, "original_positions": 8, "mscale": 1.0, "mscale_all_dim": 0.7}
    widths = {"kv_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 5}
    attention = {"kind": "mla", "num_heads": 3, "q_lora_rank": queries, **widths, "rope_scaling": scaling}
    values = {"num_layers": 1, "d_model": 16, "attention": {**attention, "bias": "all"}}
    moe = {"num_experts": 4, "expert_hidden": 12, "router": {"name": "sigmoid_bias"}}
    assert_same_as_torch({**values, "moe": moe}, "float64", 1e-12, move=lambda params: changed(params, 1))


def assert_same_as_torch(values, dtype, tolerance, move=lambda params: params, with_logits=True):
    lm = DecoderLM(ModelConfig.model_validate({**values, "init_std": 0.2, "output_z_loss": 1e-3}), VOCAB)
    params = move(initial_parameters(lm.parameter_specs(), 0))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 13))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], lm.noise(2, 12, 0, 0))
    results = []
    for name in ("torch", "mindspore"):
        backend = get_backend(BackendConfig(name=name, device="cpu", dtype=dtype))
        ops = backend.ops
        placed = Batch(
            ops.from_numpy(batch.token_BS),
            ops.from_numpy(batch.target_BS),
            {key: ops.from_numpy(u) for key, u in batch.noise.items()},
        )
        run = lm.forward_pass(ops, 12, dtype, training=True)

        def loss(arrays, run=run, placed=placed):
            return lm.loss(run, arrays, placed).loss

        arrays = {key: ops.from_numpy(value.astype(dtype)) for key, value in params.items()}
        value, gradients = backend.value_and_grad(loss)(arrays)
        model = backend.evaluation_model(lm, params)
        logits = model.logits(batch.token_BS) if with_logits else np.zeros(1)
        evaluated = ops.to_numpy(model.evaluate(Batch(batch.token_BS, batch.target_BS)).loss)
        results.append((ops.to_numpy(value), evaluated, logits, {k: ops.to_numpy(g) for k, g in gradients.items()}))
    (value, evaluated, logits, gradients), (value2, evaluated2, logits2, gradients2) = results
    np.testing.assert_allclose([value2, evaluated2], [value, evaluated], rtol=tolerance)
    np.testing.assert_allclose(logits2, logits, atol=10 * tolerance * np.abs(logits).max())
    assert gradients2.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(np.abs(gradient).max(), 1e-12)
        np.testing.assert_allclose(gradients2[name], gradient, atol=10 * tolerance * scale, err_msg=name)


def test_a_checkpoint_trained_with_torch_generates_the_same_text(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 40})
    train(config, console=Console(quiet=True))
    with_torch = generate(config.run.dir, "def f", temperature=0, max_tokens=8)
    for meta in config.run.dir.rglob("meta.json"):
        text = meta.read_text()
        assert '"name": "torch"' in text
        write_meta(meta.parent, json.loads(text.replace('"name": "torch"', '"name": "mindspore"')))
    assert generate(config.run.dir, "def f", temperature=0, max_tokens=8) == with_torch


def test_parameters_can_be_read_and_replaced():
    lm = DecoderLM(ModelConfig(num_layers=1, d_model=16), VOCAB)
    params = initial_parameters(lm.parameter_specs(), 0)
    model = get_backend(BackendConfig(name="mindspore")).evaluation_model(lm, params)
    model.load_parameters({"final_norm.weight": np.full(16, 2.0)})
    read = model.parameters(["final_norm.weight", "embedding.weight"])
    assert read["final_norm.weight"].tolist() == [2.0] * 16
    np.testing.assert_array_equal(read["embedding.weight"], params["embedding.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "npu"},
            f"backend.device: npu is not usable: MindSpore {mindspore.__version__} finds no Ascend runtime; set "
            "backend.device to auto or cpu, or install the driver and CANN and source its set_env.sh before starting",
        ),
        ({"device": "cuda"}, "backend.device: mindspore runs on cpu or npu (got cuda)"),
        (
            {"dtype": "bfloat16"},
            "backend.dtype: MindSpore's CPU target does not compute in bfloat16; expected float32 or float64",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(BackendUnavailableError) as error:
        get_backend(BackendConfig(name="mindspore", **options))
    assert str(error.value) == message


def test_without_mindspore_one_sentence_says_how_to_install_it(monkeypatch):
    hide_framework(monkeypatch, "mindspore")
    with pytest.raises(BackendUnavailableError) as error:
        get_backend(BackendConfig(name="mindspore"))
    assert str(error.value) == (
        "backend.name: mindspore needs mindspore, which is not installed; install it with: "
        "pip install 'moeport[mindspore]'"
    )
