"""Mixtures made from trained models: what they compute, and what cannot be made."""

import json

import numpy as np
import pytest
from rich.console import Console

from moeport.backends import get_backend
from moeport.config import config_from_dict, load_config
from moeport.config.training import BackendConfig
from moeport.convert.from_hf import from_hf
from moeport.convert.to_hf import to_hf
from moeport.convert.upcycle import upcycle
from moeport.convert.upcycle_plan import UpcycleOptions
from moeport.errors import UserError
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.training.fits import check_parameters
from moeport.training.run import train
from tests.convert.folders import hub_folder
from tests.convert.runs import run_of
from tests.support import assert_close, rng
from tests.training.whole import load_checkpoint

TOKENS = rng(5).integers(0, 257, (2, 12))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
ONE = {"num_experts": 1, "expert_hidden": 6, "router": {"name": "topk", "top_k": 1}}


def newest(run):
    (path,) = (run / "checkpoints").iterdir()
    return load_checkpoint(path)


def model_of(run):
    """The evaluation model of a run, in float64, and its parameters, which must be those of its config."""
    checkpoint = newest(run)
    model = DecoderLM(config_from_dict(checkpoint.meta.config).model, 257)
    check_parameters(checkpoint, model.parameter_specs())
    backend = get_backend(BackendConfig(name="numpy", dtype="float64"))
    return backend.evaluation_model(model, checkpoint.model), checkpoint.model


def results(run):
    model, _ = model_of(run)
    return model.logits(BATCH.token_BS), model.evaluate(BATCH).cross_entropy.item()


def made(tmp_path, source, *overrides, **options):
    keys = [f"model.moe.{text}" for text in overrides]
    found = upcycle(source, tmp_path / "new", keys, UpcycleOptions(**options))
    assert load_config(tmp_path / "new" / "config.yaml").model == found.config.model
    return found


SAME = {
    "copies": ({"moe": ONE}, ("num_experts=4", "router.top_k=2")),
    "copies, softmax after": ({"moe": ONE}, ("num_experts=4", "router.top_k=3", "router.softmax=after")),
    "one expert a token": ({"moe": ONE}, ("num_experts=4",)),
    "slices of one copy": ({"moe": ONE}, ("num_experts=3", "expert_hidden=2", "router.top_k=3")),
    "slices of two copies": ({"moe": ONE}, ("num_experts=6", "expert_hidden=2", "router.top_k=3")),
    "slices of four copies, two chosen": ({"moe": ONE}, ("num_experts=8", "expert_hidden=3", "router.top_k=4")),
    "slices of gelu": ({"moe": {**ONE, "activation": "gelu"}}, ("num_experts=6", "expert_hidden=2", "router.top_k=3")),
    "copies of a scaled expert": ({"moe": {**ONE, "routed_scaling_factor": 2.0}}, ("num_experts=4", "router.top_k=2")),
    "every second block": ({"moe": ONE}, ("num_experts=4", "every=2", "router.top_k=2")),
    "finer experts": ({}, ("num_experts=12", "expert_hidden=2", "router.top_k=6")),
    "finer experts, plain gates": (
        {"moe": {"router": {"name": "topk", "top_k": 2, "normalize_gates": False}}},
        ("num_experts=8", "expert_hidden=3", "router.top_k=4"),
    ),
    "finer experts beside shared ones": (
        {"moe": {"num_shared_experts": 1, "shared_hidden": 6, "shared_mixing": "sigmoid"}},
        ("num_experts=8", "expert_hidden=3", "router.top_k=4"),
    ),
    "dense blocks of a mixture": (
        {"dense_hidden": 6, "moe": {"dense_layers": [0], **ONE}},
        ("num_experts=2", "dense_layers=[]", "router.top_k=2"),
    ),
    "nothing new": ({}, ()),
}


@pytest.mark.parametrize(("model", "overrides"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("router", ["normal", "zeros"])
def test_the_first_loss_and_the_logits_are_those_of_the_source(tmp_path, model, overrides, router):
    run_of(tmp_path / "old", **model)
    found = made(tmp_path, tmp_path / "old", *overrides, router=router)
    assert found.is_same
    (logits, loss), (new_logits, new_loss) = results(tmp_path / "old"), results(tmp_path / "new")
    assert_close(new_logits, logits, 1e-10)
    assert_close(new_loss, loss, 1e-12)


OTHER = {
    "some slices": ({"moe": ONE}, ("num_experts=4", "router.top_k=2", "router.normalize_gates=false"), {}),
    "noise": ({"moe": ONE}, ("num_experts=4", "router.top_k=2"), {"noise": 0.1}),
    "a capacity": (
        {"moe": ONE},
        ("num_experts=4", "router.top_k=2", "capacity.policy=factor", "capacity.factor=0.2"),
        {},
    ),
    "a scale": ({"moe": ONE}, ("num_experts=4", "router.top_k=2", "routed_scaling_factor=2.0"), {}),
    "a scale that the source does not have": (
        {"moe": {**ONE, "routed_scaling_factor": 2.0}},
        ("num_experts=4", "router.top_k=2", "routed_scaling_factor=1.0"),
        {},
    ),
    "no capacity after one": (
        {"moe": {**ONE, "capacity": {"policy": "factor", "factor": 0.2}}},
        ("num_experts=4", "router.top_k=2", "capacity.policy=dropless"),
        {},
    ),
    "fewer experts a token": ({}, ("router.top_k=1",), {}),
    "null experts": ({}, ("router={name: adamoe, top_k: 3, null_experts: 4}",), {}),
    "another router": ({}, ("router={name: sigmoid_bias, top_k: 2}",), {}),
}


@pytest.mark.parametrize(("model", "overrides", "options"), OTHER.values(), ids=OTHER)
def test_what_computes_something_else_says_so(tmp_path, model, overrides, options):
    run_of(tmp_path / "old", **model)
    found = made(tmp_path, tmp_path / "old", *overrides, **options)
    assert not found.is_same
    assert abs(results(tmp_path / "new")[1] - results(tmp_path / "old")[1]) > 1e-9


def test_null_experts_are_added_below_the_rows_of_the_router(tmp_path):
    run_of(tmp_path / "old")
    made(tmp_path, tmp_path / "old", "router={name: adamoe, top_k: 3, null_experts: 5}")
    old, new = newest(tmp_path / "old").model, newest(tmp_path / "new").model
    for layer in (0, 1):
        rows = new[f"layers.{layer}.moe.router.weight"]
        assert rows.shape == (9, 8)
        np.testing.assert_array_equal(rows[:4], old[f"layers.{layer}.moe.router.weight"])
        assert rows[4:].std() > 0.005
        for name in ("w_in", "w_out"):
            name = f"layers.{layer}.moe.experts.{name}"
            np.testing.assert_array_equal(new[name], old[name])


def test_another_router_keeps_the_experts_and_begins_anew_where_it_must(tmp_path):
    run_of(tmp_path / "old")
    made(tmp_path, tmp_path / "old", "router={name: xmoe, top_k: 2, routing_dim: 3}")
    old, new = newest(tmp_path / "old").model, newest(tmp_path / "new").model
    assert {name for name in new if name not in old} == {
        name for name in new if ".moe.router." in name and not name.endswith("router.weight")
    }
    np.testing.assert_array_equal(new["layers.1.moe.experts.w_in"], old["layers.1.moe.experts.w_in"])


def test_copies_with_noise_differ_by_the_noise(tmp_path):
    run_of(tmp_path / "old", moe=ONE)
    made(tmp_path, tmp_path / "old", "num_experts=64", "router.top_k=2", noise=0.25, seed=3)
    old, new = (newest(tmp_path / name).model["layers.1.moe.experts.w_in"] for name in ("old", "new"))
    assert (new - old).std() / old.std() == pytest.approx(0.25, rel=0.05)
    assert len({expert.tobytes() for expert in new}) == 64


REFUSED = {
    "a width that does not divide": (
        {"moe": ONE},
        ("expert_hidden=4",),
        r"expert_hidden: 4 does not divide 6, the hidden width of the source's blocks; expected 6 or a divisor",
    ),
    "half a copy": (
        {"moe": ONE},
        ("num_experts=4", "expert_hidden=2", "router.top_k=3"),
        r"num_experts: 4 experts cannot be made from 1 in layer 0, each cut into 3; expected a multiple of 3",
    ),
    "part of a copy chosen": (
        {"moe": ONE},
        ("num_experts=6", "expert_hidden=2", "router.top_k=2"),
        r"model\.moe\.router: 2 experts per token are not a whole number of copies, .*; expected a multiple of 3",
    ),
    "copies of experts": ({}, ("num_experts=8",), r"8 experts cannot be made from 4 in layer 0, .*; expected 4"),
    "a shared expert that the source lacks": (
        {},
        ("num_shared_experts=1",),
        r"layers\.0\.moe\.shared\.w_in: the new model needs \(12, 8\), and the source has nothing",
    ),
    "experts that become a dense block": (
        {},
        ("every=2",),
        r"layers\.0\.mlp\.w_in: the new model needs .*, and the source has nothing",
    ),
    "another activation": (
        {},
        ("activation=gelu",),
        r"layers\.0\.moe\.experts\.w_in: the new model needs \(6, 8\), and the source has \(4, 12, 8\); upcycling",
    ),
    "shared experts that are lost": (
        {"moe": {"num_shared_experts": 1}},
        ("num_shared_experts=0",),
        r"layers\.0\.moe\.shared\.w_in: the source has it, and the new model has no place for it; upcycling changes",
    ),
    "a router with a table": (
        {},
        ("router={name: hash}",),
        r"router\.name: hash has a table made from the training data",
    ),
    "a router of two layers": ({}, ("router={name: cartesian}",), r"router\.name: cartesian has two layers in a block"),
    "a wrong key": ({}, ("num_expertz=8",), r"num_expertz: unknown key; did you mean model\.moe\.num_experts\?"),
}


@pytest.mark.parametrize(("model", "overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made(tmp_path, model, overrides, message):
    run_of(tmp_path / "old", **model)
    with pytest.raises(UserError, match=message):
        made(tmp_path, tmp_path / "old", *overrides)
    assert not (tmp_path / "new").exists()


def test_what_is_no_business_of_upcycling(tmp_path):
    run_of(tmp_path / "old", moe=ONE)
    with pytest.raises(
        UserError, match=r"embedding\.weight: the new model needs \(257, 16\), and the source has \(257, 8"
    ):
        upcycle(tmp_path / "old", tmp_path / "new", ["model.d_model=16"])
    with pytest.raises(UserError, match=r"lm_head\.weight: the source has it, and the new model has no place for it"):
        upcycle(tmp_path / "old", tmp_path / "new", ["model.tie_embeddings=true"])
    with pytest.raises(UserError, match=r"missing: is not a run folder: it has no config\.yaml"):
        upcycle(tmp_path / "missing", tmp_path / "new", [])


def test_from_a_dense_folder_to_a_trained_mixture_and_back(tmp_path):
    """Llama to moeport, upcycled, trained, and out as Mixtral, with the first loss of the dense model."""
    hub_folder(tmp_path / "hub", "llama", vocab_size=257, attention_bias=False)
    from_hf(tmp_path / "hub", tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", ["model.moe.num_experts=4", "model.moe.router.top_k=2"])
    text = tmp_path / "text"
    text.mkdir()
    for number in range(2):
        (text / f"{number}.txt").write_text(f"def f(x):\n    return x + {number}\n" * 40)
    losses = []
    for name in ("dense", "moe"):
        values = newest(tmp_path / name).meta.config
        values["run"]["dir"] = str(tmp_path / f"{name}-trained")
        source = {"name": "files", "paths": [str(text / "0.txt")], "validation_paths": [str(text / "1.txt")]}
        values["data"] |= {"source": source, "cache_dir": str(tmp_path / "cache")}
        values["training"] |= {"steps": 1, "batch_size": 2, "start_from": str(tmp_path / name)}
        values["metrics"] |= {"tensorboard": False, "report": False, "peak_tflops": 1.0}
        values["backend"]["device"] = "cpu"
        train(config_from_dict(values), console=Console(quiet=True))
        lines = (tmp_path / f"{name}-trained/metrics.jsonl").read_text().splitlines()
        losses.append(next(record["loss"] for record in map(json.loads, lines) if "loss" in record))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    done = to_hf(tmp_path / "moe-trained", tmp_path / "back")
    assert (done.family, done.verified) == ("mixtral", False)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["num_local_experts"], config["eos_token_id"]) == (4, 256)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()


def test_finer_experts_go_back_to_the_family(tmp_path):
    hub_folder(tmp_path / "hub", "qwen3_moe", vocab_size=257, norm_topk_prob=False)
    from_hf(tmp_path / "hub", tmp_path / "run")
    made(tmp_path, tmp_path / "run", "num_experts=8", "expert_hidden=2", "router.top_k=4")
    with pytest.raises(UserError, match=r"qwen3_moe, .*routed_scaling_factor is 2\.0, and its nearest setting is 1\.0"):
        to_hf(tmp_path / "new", tmp_path / "back")
    made(tmp_path / "second", tmp_path / "run", "num_experts=4", "load_balance.coefficient=0.5")
    done = to_hf(tmp_path / "second/new", tmp_path / "back")
    assert (done.family, done.verified) == ("qwen3_moe", False)
    assert (tmp_path / "second/new/tokenizer.json").read_bytes() == (tmp_path / "hub/tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["router_aux_loss_coef"], config["torch_dtype"]) == (0.5, "float32")
