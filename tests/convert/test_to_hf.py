"""Runs to Hugging Face: what is written, what is refused, and that transformers computes the same with it."""

import json

import numpy as np
import pytest

from moeport.backends import get_backend
from moeport.config import config_from_dict
from moeport.config.training import BackendConfig
from moeport.convert import from_hf as reading
from moeport.convert import parts as parts_module
from moeport.convert.export_options import ExportOptions, parse_size
from moeport.convert.from_hf import from_hf
from moeport.convert.to_hf import to_hf
from moeport.errors import CheckpointError, RunError, UserError
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import save_checkpoint
from moeport.training.run import train
from tests.convert.folders import edit_json, hub_folder
from tests.convert.runs import VOCABULARY, run_of
from tests.support import assert_close, rng
from tests.training.whole import load_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

TOKENS = rng(4).integers(0, VOCABULARY, (2, 9))
TOP2 = {"name": "topk", "top_k": 2}


def opened(folder):
    """The model that transformers loads from a folder, which must set every one of its weights."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def their_logits(folder):
    with torch.no_grad():
        return opened(folder)(torch.tensor(TOKENS), use_cache=False).logits.numpy()


def our_logits(run, edit=lambda values: None):
    (path,) = sorted((run / "checkpoints").iterdir())[-1:]
    checkpoint = load_checkpoint(path)
    values = json.loads(json.dumps(checkpoint.meta.config))
    edit(values)
    model = DecoderLM(config_from_dict(values).model, VOCABULARY)
    return (
        get_backend(BackendConfig(name="torch", device="cpu")).evaluation_model(model, checkpoint.model).logits(TOKENS)
    )


LATENT = {
    "kind": "mla",
    "num_kv_heads": None,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}
SCALED = {"type": "yarn", "factor": 8.0, "original_positions": 4, "mscale": 1.0, "mscale_all_dim": 0.5}
RUNS = {
    "mixtral": {},
    "mixtral, softmax after": {"moe": {"router": {**TOP2, "softmax": "after"}}},
    "mixtral, wide heads": {"attention": {"head_dim": 6}, "tie_embeddings": True},
    "qwen3_moe": {
        "attention": {"qk_norm": True, "bias": "all"},
        "num_layers": 4,
        "moe": {"every": 2, "first_dense": 1},
    },
    "qwen3_moe, first layers dense": {
        "attention": {"qk_norm": True},
        "num_layers": 4,
        "moe": {"every": 2, "first_dense": 2, "router": {**TOP2, "normalize_gates": False}},
    },
    "olmoe": {"attention": {"qk_norm": "whole"}, "moe": {"router": {**TOP2, "normalize_gates": False}}},
    "qwen2_moe": {
        "attention": {"bias": "qkv"},
        "moe": {"num_shared_experts": 2, "shared_mixing": "sigmoid", "dense_layers": [0]},
    },
    "deepseek_v3": {
        "attention": LATENT | {"q_lora_rank": 6, "bias": "all", "rope_scaling": SCALED},
        "num_layers": 3,
        "moe": {
            "first_dense": 1,
            "num_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "router": {"name": "sigmoid_bias", "num_groups": 2},
        },
    },
    "deepseek_v2": {
        "attention": LATENT,
        "norm_eps": 1e-3,
        "moe": {"num_shared_experts": 1, "router": {**TOP2, "normalize_gates": False, "num_groups": 2}},
    },
    "llama, equal rotary bases": {
        "attention": {"rope_bases": [50.0]},
        "moe": {"num_experts": 1, "router": {"name": "topk", "top_k": 1}},
    },
    "llama": {"moe": {"num_experts": 1, "router": {"name": "topk", "top_k": 1}}},
    "qwen2": {"attention": {"bias": "qkv"}, "moe": {"num_experts": 1, "router": {"name": "topk", "top_k": 1}}},
    "qwen3": {"attention": {"qk_norm": True}, "moe": {"num_experts": 1, "router": {"name": "topk", "top_k": 1}}},
}


@pytest.mark.parametrize(("name", "model"), RUNS.items(), ids=RUNS)
def test_a_run_that_was_trained_here_opens_in_transformers(tmp_path, name, model):
    run = run_of(tmp_path / "run", **model)
    done = to_hf(run, tmp_path / "hub")
    assert (done.family, done.verified) == (name.partition(",")[0], False)
    assert_close(their_logits(tmp_path / "hub"), our_logits(run), 1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.eos_token_id == 256


SIGMOID = {"num_shared_experts": 1, "router": {"name": "sigmoid_bias"}}
REFUSED = {
    "a rotary base for each key head": (
        {"attention": {"num_kv_heads": 2, "rope_bases": [50.0, 3.0]}},
        r"mixtral, .*: model\.attention\.rope_bases is \[50\.0, 3\.0\], .* nearest setting is one rope_theta, 3\.0",
    ),
    "latent attention without shared experts": (
        {"attention": LATENT, "moe": {"router": {"name": "sigmoid_bias"}}},
        r"deepseek_v3, .*: model\.moe\.shared_hidden is 0, and its nearest setting is 6",
    ),
    "latent vectors with another epsilon": (
        {"attention": {**LATENT, "latent_norm_eps": 1e-5}, "moe": SIGMOID},
        r"deepseek_v3, .*latent_norm_eps is 1e-05, .* is 1e-06",
    ),
    "gates of V2 that are normalised": (
        {"attention": LATENT, "moe": {"num_shared_experts": 1, "router": TOP2}},
        r"deepseek_v2, .*: model\.moe\.router\.normalize_gates is True, and its nearest setting is False",
    ),
    "heads that do not divide the width of V2": (
        {
            "attention": {**LATENT, "num_heads": 3},
            "moe": {"num_shared_experts": 1, "router": {**TOP2, "normalize_gates": False}},
        },
        r"deepseek_v2, .*: model\.attention\.num_heads is 3, and its nearest setting is 1",
    ),
    "groups of one expert": (
        {"attention": LATENT, "moe": {**SIGMOID, "router": {"name": "sigmoid_bias", "num_groups": 4, "top_k": 1}}},
        r"deepseek_v3, .*: model\.moe\.router\.num_groups is 4, and its nearest setting is 2",
    ),
    "groups of experts": ({"moe": {"router": {**TOP2, "num_groups": 2}}}, r"mixtral, .*num_groups is 2, .* is 1"),
    "sigmoid scores in grouped-query attention": (
        {"moe": {"router": {"name": "sigmoid_bias"}}},
        r"mixtral, .*router\.name is sigmoid_bias, and its nearest setting is topk",
    ),
    "another router": ({"moe": {"router": {"name": "switch"}}}, r"model\.moe\.router\.name is switch, and .* is topk"),
    "null experts": ({"moe": {"router": {"name": "adamoe"}}}, r"router\.name is adamoe, .* nearest setting is topk"),
    "a capacity": ({"moe": {"capacity": {"policy": "factor"}}}, r"capacity\.policy is factor, .* is dropless"),
    "added shared experts": (
        {"attention": {"bias": "qkv"}, "moe": {"num_shared_experts": 1}},
        r"qwen2_moe, .*: model\.moe\.shared_mixing is add, and its nearest setting is sigmoid",
    ),
    "mixed shared experts": (
        {"attention": {"bias": "qkv"}, "moe": {"num_shared_experts": 1, "shared_mixing": "softmax"}},
        r"shared_mixing is softmax, and its nearest setting is sigmoid",
    ),
    "a dense block beside": ({"moe": {"residual_hidden": 4}}, r"residual_hidden is 4, .* is 0"),
    "a dense block after": (
        {"moe": {"residual_hidden": 4, "residual_form": "sequential"}},
        r"residual_hidden is 4, .* is 0; model\.moe\.residual_form is sequential",
    ),
    "a scaled output": ({"moe": {"routed_scaling_factor": 2.5}}, r"routed_scaling_factor is 2\.5, .* is 1\.0"),
    "gelu": ({"moe": {"activation": "gelu"}}, r"activation is gelu, .* is swiglu"),
    "plain gates without norms": (
        {"moe": {"router": {**TOP2, "normalize_gates": False}}},
        r"mixtral, .*: model\.moe\.router\.normalize_gates is False, and its nearest setting is True",
    ),
    "two things at once": (
        {"moe": {"activation": "gelu", "residual_hidden": 4}},
        r"activation is gelu, .*; model\.moe\.residual_hidden is 4",
    ),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_family_has_is_refused_with_the_nearest(tmp_path, model, message):
    run_of(tmp_path / "run", **model)
    with pytest.raises(UserError, match=message):
        to_hf(tmp_path / "run", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_family_that_is_asked_for(tmp_path):
    run = run_of(tmp_path / "run")
    with pytest.raises(
        UserError, match=r"qwen3_moe, the family that was asked for, .*model\.attention\.qk_norm is False"
    ):
        to_hf(run, tmp_path / "hub", ExportOptions(family="qwen3_moe"))
    with pytest.raises(UserError, match=r"model_type mixtrall: cannot be converted; .*did you mean mixtral\?"):
        to_hf(run, tmp_path / "hub", ExportOptions(family="mixtrall"))


def test_settings_of_training_that_config_json_cannot_say(tmp_path):
    moe = {
        "router_z_loss": 1e-3,
        "router_dtype": "compute",
        "load_balance": {"scope": "global"},
        "capacity": {"policy": "round", "tile": 2},
    }
    run = run_of(tmp_path / "run", output_z_loss=1e-4, moe=moe)
    notes = to_hf(run, tmp_path / "hub").notes
    for line in (
        "model.output_z_loss: 0.0001",
        "model.moe.router_z_loss: 0.001",
        "model.moe.router_dtype: compute",
        "model.moe.load_balance.scope: global",
        "model.moe.capacity.policy: round",
    ):
        assert any(note.startswith(f"only moeport uses {line};") for note in notes), notes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types_are_rounded_as_torch_rounds(tmp_path, dtype):
    values = {}
    run = run_of(tmp_path / "run", change=values.update)
    params = load_checkpoint(run / "checkpoints" / "step-000003").model
    to_hf(run, tmp_path / "hub", ExportOptions(dtype=dtype))
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["dtype"] == dtype
    from safetensors.torch import load_file

    got = load_file(tmp_path / "hub" / "model.safetensors")
    want = torch.tensor(params["layers.1.moe.router.weight"]).to(getattr(torch, dtype))
    assert torch.equal(got["model.layers.1.block_sparse_moe.gate.weight"], want)
    assert {value.dtype for value in got.values()} == {want.dtype}


def test_numbers_that_the_type_cannot_hold(tmp_path):
    def grow(params):
        params["layers.0.moe.experts.w_out"][2, 0, 0] = 1e6

    run = run_of(tmp_path / "run", change=grow)
    with pytest.raises(
        CheckpointError, match=r"experts\.2\.w2\.weight: 1e\+06 is too large for float16; choose another --"
    ):
        to_hf(run, tmp_path / "hub", ExportOptions(dtype="float16"))
    assert not (tmp_path / "hub").exists()


def test_a_diverged_run(tmp_path):
    def spoil(params):
        params["final_norm.weight"][2] = np.nan

    run = run_of(tmp_path / "run", change=spoil)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds a NaN or an infinity: the run had diverged"):
        to_hf(run, tmp_path / "hub")


def test_a_folder_that_is_in_use(tmp_path):
    run = run_of(tmp_path / "run")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"hub: already exists; choose another folder, or remove it"):
        to_hf(run, tmp_path / "hub")
    with pytest.raises(UserError, match=r"hub: not a run folder"):
        to_hf(tmp_path / "hub", tmp_path / "other")


def test_sizes_of_files():
    sizes = [parse_size(text) for text in ("5GB", "1.5 mb", "200", "3KB", "7B", "2TB")]
    assert sizes == [5 * 10**9, 1500000, 200, 3000, 7, 2 * 10**12]
    for text in ("", "GB", "-1GB", "5PB", "0", "1e3", "9" * 400 + "TB"):
        with pytest.raises(UserError, match=r"is not a size; expected a number with KB, MB, GB or TB, as in 5GB"):
            parse_size(text)


def test_a_run_that_started_from_a_folder_goes_back_to_its_form(tmp_path):
    """Trained in between: family, layout, type and other files are those of the folder, the weights are new."""
    hub_folder(tmp_path / "hub", "qwen3_moe", layout="fused", attention_bias=True)
    from_hf(tmp_path / "hub", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "checkpoints" / "step-000000" / "meta.json").read_text())["config"]
    text = tmp_path / "text"
    text.mkdir()
    for number in range(2):
        (text / f"{number}.txt").write_text(f"def f(x):\n    return x + {number}\n" * 40)
    config["run"]["dir"] = str(tmp_path / "tuned")
    config["data"] |= {
        "source": {"name": "files", "paths": [str(text / "0.txt")], "validation_paths": [str(text / "1.txt")]},
        "cache_dir": str(tmp_path / "cache"),
    }
    config["training"] |= {"steps": 2, "batch_size": 2, "start_from": str(tmp_path / "run")}
    config["metrics"] |= {"tensorboard": False, "report": False, "peak_tflops": 1.0}
    config["backend"]["device"] = "cpu"
    from rich.console import Console

    train(config_from_dict(config), console=Console(quiet=True))
    done = to_hf(tmp_path / "tuned", tmp_path / "back")
    assert (done.family, done.verified) == ("qwen3_moe", False)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "back"))
    assert after == before
    assert (tmp_path / "back" / "generation_config.json").read_text() == (
        tmp_path / "hub" / "generation_config.json"
    ).read_text()
    assert_close(their_logits(tmp_path / "back"), our_logits(tmp_path / "tuned"), 1e-5)
    assert np.abs(our_logits(tmp_path / "tuned") - our_logits(tmp_path / "run")).max() > 1e-4


def test_a_run_whose_conversion_was_killed_has_all_or_no_checkpoint(tmp_path, monkeypatch):
    """The config comes last: without it, a checkpoint already has the tokenizer and the record beside it."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    hub_folder(tmp_path / "hub", "olmoe")
    for step in ("write_record", "write_config"):
        with monkeypatch.context() as patch:
            patch.setattr(reading, step, kill)
            with pytest.raises(Killed):
                from_hf(tmp_path / "hub", tmp_path / "run")
        whole = list((tmp_path / "run/checkpoints").iterdir())
        assert len(whole) == (step == "write_config")
    assert to_hf(tmp_path / "run", tmp_path / "back").verified
    assert (tmp_path / "back/generation_config.json").exists()


def rewrite(run, edit):
    """Change the arrays of a converted checkpoint, with checksums that agree."""
    (path,) = (run / "checkpoints").iterdir()
    checkpoint = load_checkpoint(path)
    edit(checkpoint.model)
    save_checkpoint(path.parent, checkpoint.meta, checkpoint.model, {})


def swap(params):
    weights = params["layers.1.moe.experts.w_out"]
    weights[[1, 2]] = weights[[2, 1]]


def test_mutant_an_expert_swapped_on_the_way(tmp_path):
    hub_folder(tmp_path / "hub")
    from_hf(tmp_path / "hub", tmp_path / "run")
    rewrite(tmp_path / "run", swap)
    with pytest.raises(
        RunError, match=r"layers\.1\.block_sparse_moe\.experts\.1\.w2\.weight: is not what was read from"
    ):
        to_hf(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_mutant_an_expert_swapped_in_a_folder_that_was_written_here(tmp_path):
    from safetensors.numpy import load_file, save_file

    hub_folder(tmp_path / "hub")
    from_hf(tmp_path / "hub", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back", ExportOptions(layout="fused"))
    from_hf(tmp_path / "back", tmp_path / "again")
    values = load_file(tmp_path / "back" / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values[name][[0, 3]] = values[name][[3, 0]]
    save_file(values, tmp_path / "back" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"experts\.0\.w1\.weight is not what was written \(nor are 3 others\).*damaged"
    ):
        from_hf(tmp_path / "back", tmp_path / "third")
    assert not list((tmp_path / "third").glob("checkpoints/*"))
    (tmp_path / "back" / "moeport-checksums.json").unlink()
    from_hf(tmp_path / "back", tmp_path / "fourth")


DAMAGES = {
    "format": ("other", r'it has no "format": "moeport-huggingface"; delete it'),
    "format_version": (2, r"format version 2, and this moeport reads 1; delete it"),
    "layout": ("both", r"names a layout or an element type that does not exist"),
    "dtypes": ({"model.norm.weight": "F8"}, r"names a layout or an element type that does not exist"),
}


@pytest.mark.parametrize("key", DAMAGES)
def test_a_damaged_record(tmp_path, key):
    value, message = DAMAGES[key]
    hub_folder(tmp_path / "hub")
    from_hf(tmp_path / "hub", tmp_path / "run")
    edit_json(tmp_path / "run/huggingface/moeport.json", lambda record: record.update({key: value}))
    with pytest.raises(UserError, match=message):
        to_hf(tmp_path / "run", tmp_path / "back")


@pytest.mark.parametrize("place", [0, 5, -1])
def test_mutant_a_part_left_unset(tmp_path, monkeypatch, place):
    """A table that forgets a part, such as an expert's projection, is found before anything is written."""
    hub_folder(tmp_path / "hub")

    def forgetful(*arguments):
        found = parts_module.parts(*arguments)
        del found[place]
        return found

    monkeypatch.setattr(reading, "parts", forgetful)
    with pytest.raises((RunError, UserError), match=r"is not set|unknown"):
        from_hf(tmp_path / "hub", tmp_path / "run")


def test_mutants_of_the_config_change_the_logits_or_are_refused(tmp_path):
    """Gates that are not normalised, another rope base, another epsilon: each is far from transformers."""
    hub_folder(tmp_path / "hub")
    edit_json(tmp_path / "hub" / "config.json", lambda config: config.update(vocab_size=260))
    from_hf(tmp_path / "hub", tmp_path / "run")
    want = their_logits(tmp_path / "hub")
    assert_close(our_logits(tmp_path / "run"), want, 1e-5)

    def plain_gates(values):
        values["model"]["moe"]["router"]["normalize_gates"] = False

    def other_base(values):
        values["model"]["attention"]["rope_base"] = 1e6

    def other_eps(values):
        values["model"]["norm_eps"] = 1e-2

    for mutant in (plain_gates, other_base, other_eps):
        assert np.abs(our_logits(tmp_path / "run", mutant) - want).max() > 1e-3 * np.abs(want).max()


def test_mutants_of_deepseek_change_the_logits(tmp_path):
    """The order of the rotated rows, the gates, the groups, the bias of the scores and their scale."""
    from safetensors.numpy import load_file, save_file

    own = {"factor": 8.0, "original_max_position_embeddings": 4, "mscale": 1.0, "mscale_all_dim": 0.5}
    hub = hub_folder(tmp_path / "hub", "deepseek_v3", rope_scaling={"type": "yarn", **own})
    values = load_file(hub / "model.safetensors")
    values["model.layers.1.mlp.gate.e_score_correction_bias"] *= 0.2  # so that it does not decide alone
    save_file(values, hub / "model.safetensors")
    from_hf(tmp_path / "hub", tmp_path / "run")
    want = their_logits(tmp_path / "hub")
    assert_close(our_logits(tmp_path / "run"), want, 1e-5)

    def edit(path, value):
        def change(values):
            *sections, key = path.split(".")
            section = values["model"]
            for name in sections:
                section = section[name]
            assert section[key] != value
            section[key] = value

        return change

    mutants = {
        "moe.routed_scaling_factor": 1.0,
        "moe.router.normalize_gates": False,
        "moe.router.num_groups": 1,
        "attention.latent_norm_eps": 1e-2,
        "attention.rope_base": 1e6,
        "attention.rope_scaling.mscale_all_dim": 1.0,
        "attention.rope_scaling.mscale": 0.5,
    }
    for path, value in mutants.items():
        assert np.abs(our_logits(tmp_path / "run", edit(path, value)) - want).max() > 1e-3 * np.abs(want).max(), path

    def rows_as_theirs(params):
        params["layers.0.attention.kv_down"][-4:] = params["layers.0.attention.kv_down"][-4:][[0, 2, 1, 3]]

    def no_bias(params):
        params["layers.1.moe.router.bias"][:] = 0

    for mutant in (rows_as_theirs, no_bias):
        rewrite(tmp_path / "run", mutant)
        assert np.abs(our_logits(tmp_path / "run") - want).max() > 1e-3 * np.abs(want).max()
        with pytest.raises(RunError, match=r"is not what was read from"):
            to_hf(tmp_path / "run", tmp_path / "back")


@pytest.mark.parametrize("model", [RUNS["deepseek_v3"]])
def test_the_bias_that_routers_choose_by_stays_float32(tmp_path, model):
    from safetensors.torch import load_file

    run = run_of(tmp_path / "run", **model)
    to_hf(run, tmp_path / "hub", ExportOptions(dtype="bfloat16"))
    types = {name: str(tensor.dtype) for name, tensor in load_file(tmp_path / "hub/model.safetensors").items()}
    wide = {name for name, dtype in types.items() if dtype != "torch.bfloat16"}
    assert {types[name] for name in wide} == {"torch.float32"}
    assert wide == {name for name in types if name.endswith("e_score_correction_bias")} != set()


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_of_multi_token_prediction_are_left_out_on_request_only(tmp_path, key):
    from safetensors.numpy import load_file, save_file

    hub = hub_folder(tmp_path / "hub", "deepseek_v3", num_nextn_predict_layers=1)
    edit_json(hub / "config.json", lambda config: config.update({key: config.pop("num_nextn_predict_layers")}))
    weights = hub / "model.safetensors"
    save_file(load_file(weights) | {"model.layers.2.eh_proj.weight": np.ones((8, 16), np.float32)}, weights)
    with pytest.raises(
        UserError, match=r"1 tensors of multi-token .*model\.layers\.2\.eh_proj\.weight, .*--without-mtp"
    ):
        from_hf(hub, tmp_path / "run")
    notes = from_hf(hub, tmp_path / "run", without_mtp=True).notes
    assert any("1 tensors of multi-token prediction" in note for note in notes)
    to_hf(tmp_path / "run", tmp_path / "back")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "back"))
    assert after == before | {key: 0}
    assert load_file(tmp_path / "back/model.safetensors").keys() == load_file(weights).keys() - {
        "model.layers.2.eh_proj.weight"
    }
    edit_json(hub / "config.json", lambda config: config.update({key: 0}))
    with pytest.raises(UserError, match=r"model\.layers\.2\.eh_proj\.weight: unknown"):
        from_hf(hub, tmp_path / "other", without_mtp=True)


def test_code_of_deepseek_is_left_out_and_its_balance_comes_back(tmp_path):
    code = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    names = {
        key: f"{'configuration' if part == 'Config' else 'modeling'}_deepseek.DeepseekV2{part}"
        for key, part in code.items()
    }
    hub_folder(tmp_path / "hub", "deepseek_v2", auto_map=names, aux_loss_alpha=0.001, seq_aux=True)
    notes = from_hf(tmp_path / "hub", tmp_path / "run").notes
    assert any(note.startswith("auto_map is left out") for note in notes)
    assert to_hf(tmp_path / "run", tmp_path / "back").notes == ()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "back"))
    assert before.pop("auto_map") == names
    assert after == before
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    checkpoint = load_checkpoint(path)
    assert checkpoint.meta.config["model"]["moe"]["load_balance"] == {"coefficient": 0.001, "scope": "sequence"}
    checkpoint.meta.config["model"]["moe"]["load_balance"]["scope"] = "batch"
    save_checkpoint(path.parent, checkpoint.meta, checkpoint.model, {})
    to_hf(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["seq_aux"] is False


def test_keys_that_no_longer_hold_are_rewritten_and_others_stay(tmp_path):
    hub_folder(tmp_path / "hub", "qwen3_moe")
    edit_json(tmp_path / "hub/config.json", lambda config: config.update(use_cache=False))
    from_hf(tmp_path / "hub", tmp_path / "run")
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    checkpoint = load_checkpoint(path)
    checkpoint.meta.config["model"]["moe"]["load_balance"]["coefficient"] = 0.5
    checkpoint.meta.config["model"]["attention"]["rope_base"] = 77.0
    save_checkpoint(path.parent, checkpoint.meta, checkpoint.model, {})
    assert to_hf(tmp_path / "run", tmp_path / "back").verified
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "back"))
    assert after.pop("rope_parameters") == {"rope_type": "default", "rope_theta": 77.0}
    assert (before.pop("rope_theta"), "rope_theta" in after) == (10000.0, False)
    assert after.pop("router_aux_loss_coef") == 0.5  # two layers, two experts a token
    filled = {"attention_bias", "head_dim", "hidden_act", "initializer_range", "rms_norm_eps", "tie_word_embeddings"}
    filled |= {"decoder_sparse_step", "mlp_only_layers"}
    assert after == {**{key: after[key] for key in filled}, **before}
    assert_close(their_logits(tmp_path / "back"), our_logits(tmp_path / "run"), 1e-5)


def test_a_config_without_keys_that_are_the_defaults_comes_back(tmp_path):
    hub_folder(tmp_path / "hub", "llama", vocab_size=32000)
    edit_json(tmp_path / "hub/config.json", lambda config: config.pop("vocab_size"))
    from_hf(tmp_path / "hub", tmp_path / "run")
    assert to_hf(tmp_path / "run", tmp_path / "back").verified
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "back"))
    assert after == before


def test_experts_of_several_types_are_fused_in_one_that_holds_them(tmp_path):
    from safetensors.torch import load_file, save_file

    hub = hub_folder(tmp_path / "hub")
    values = load_file(hub / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    values[name] = values[name].to(torch.bfloat16)
    save_file(values, hub / "model.safetensors")
    from_hf(hub, tmp_path / "run")
    assert to_hf(tmp_path / "run", tmp_path / "same").verified
    assert not to_hf(tmp_path / "run", tmp_path / "back", ExportOptions(layout="fused")).verified  # one was widened
    fused = load_file(tmp_path / "back/model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    assert fused.dtype == torch.float32
    for expert in range(4):
        assert torch.equal(fused[expert], values[name.replace("experts.0", f"experts.{expert}")].float())


def test_progress_is_reported(tmp_path):
    hub_folder(tmp_path / "hub")
    lines = []
    from_hf(tmp_path / "hub", tmp_path / "run", report=lambda *line: lines.append(line))
    names, done, totals = zip(*lines, strict=True)
    assert "layers.1.moe.experts.w_in" in names
    assert list(done) == sorted(done)
    assert {*totals} == {done[-1]}
