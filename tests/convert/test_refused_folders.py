"""Folders that are damaged, contradict themselves, or hold what moeport does not have: each is refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moeport.convert.from_hf import from_hf
from moeport.errors import UserError
from tests.convert.folders import config_of, edit_json, entry, hub_folder, raw, values_of, write

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GATE = "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

KEYS = {
    "a type of its own": (
        "mixtral",
        {"model_type": "gpt_neox"},
        r"model_type gpt_neox: cannot be converted; expec",
    ),
    "a classifier": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        r'architectures is .*\["LlamaForCau',
    ),
    "a window": ("mixtral", {"sliding_window": 16}, r"sliding_window is 16: .* up to 32 \(max_position_embeddings\)"),
    "a window that is on": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, r"sliding_window is 8"),
    "a window in some layers": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
        r"sliding_window is 8",
    ),
    "types of too few layers": (
        "qwen3",
        {"layer_types": [], "use_sliding_window": True, "sliding_window": 8},
        r"layer_types is \[\]; expected full_attention for each layer",
    ),
    "a billion layers": (
        "llama",
        {"num_hidden_layers": 10**9},
        r"num_hidden_layers is 10+, but .* room for at most 21",
    ),
    "a billion experts": ("mixtral", {"num_local_experts": 10**9}, r"num_local_experts is 10+, but .* for at most 260"),
    "other layers": ("qwen3", {"layer_types": ["linear_attention"] * 2}, r"layer_types is .*expected full_attention"),
    "scaled positions": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        r"rope_scaling is .*dynamic.* the types default, linear, llama3, yarn",
    ),
    "an option of scaled positions that is missing": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        r"rope_scaling is .*yarn.*; expected the numbers factor, original_max_position_embeddings",
    ),
    "an option of scaled positions that is text": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        r"rope_scaling is .*linear.*; expected the numbers factor",
    ),
    "scaled positions of version 5": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            }
        },
        r"rope_parameters is .*mscale.*with the options that transformers documents",
    ),
    "half rotated heads": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        r"rope_parameters is .*the whole width",
    ),
    "two bases": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        r"rope_theta is 500.0 and 10000.0; expected one number",
    ),
    "noise on inputs of the router": (
        "mixtral",
        {"router_jitter_noise": 0.1},
        r"router_jitter_noise is 0\.1.*expected 0\.0",
    ),
    "clipped projections": (
        "olmoe",
        {"clip_qkv": 8.0},
        r"clip_qkv is 8\.0, which moeport does not have; expected null",
    ),
    "dropout": ("llama", {"attention_dropout": 0.1}, r"attention_dropout is 0\.1, which .*; expected 0\.0"),
    "another activation": ("llama", {"hidden_act": "gelu"}, r'hidden_act is "gelu", which .*; expected "silu"'),
    "biases of the blocks": ("llama", {"mlp_bias": True}, r"mlp_bias is true"),
    "products in parts": ("llama", {"pretraining_tp": 2}, r"pretraining_tp is 2"),
    "weights in fp8": (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        r"quantization_config is .*fp8.*convert the weights to bfloat16 first, and remove the key: .*fp8_cast_bf16",
    ),
    "code of its own for DeepSeek": ("deepseek_v3", {"auto_map": {"AutoModel": "modeling.X"}}, r"auto_map is"),
    "grouped heads in latent attention": (
        "deepseek_v3",
        {"num_key_value_heads": 1},
        r"num_key_value_heads is 1; expected 2, as multi-head latent attention has it",
    ),
    "heads of another width than the rotated part": ("deepseek_v3", {"head_dim": 8}, r"head_dim is 8; expected 4"),
    "rotated halves": ("deepseek_v3", {"rope_interleave": False}, r"rope_interleave is false, .*; expected true"),
    "softmax in V3": ("deepseek_v3", {"scoring_func": "softmax"}, r'scoring_func is "softmax", .*"sigmoid"'),
    "choices by another method": ("deepseek_v3", {"topk_method": "greedy"}, r'topk_method is "greedy", .*"noaux_tc"'),
    "choices of V3 in V2": ("deepseek_v2", {"topk_method": "noaux_tc"}, r"topk_method is .*expected greedy or group_"),
    "gates that transformers does not normalise": (
        "deepseek_v2",
        {"norm_topk_prob": True},
        r"norm_topk_prob is true, .*; expected false",
    ),
    "groups of one expert": (
        "deepseek_v3",
        {"n_group": 4},
        r"n_group is 4, of 4 experts; expected groups of two or more",
    ),
    "groups that do not divide the experts": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
        r"num_groups: does not divide the experts",
    ),
    "only dense layers": (
        "deepseek_v2",
        {"first_k_dense_replace": 2},
        r"first_k_dense_replace is 2, of 2 layers; expected at least one with experts",
    ),
    "experts in every other layer": ("deepseek_v2", {"moe_layer_freq": 2}, r"moe_layer_freq is 2, .*; expected 1"),
    "no shared experts": ("deepseek_v3", {"n_shared_experts": None}, r"n_shared_experts is null; expected int"),
    "one of two factors of YaRN": (
        "deepseek_v3",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "mscale_all_dim": 0.5,
            }
        },
        r"rope_scaling is .*code differ with one of mscale and mscale_all_dim; expected both",
    ),
    "quantised weights": ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is .*fp8"),
    "code of its own": ("llama", {"auto_map": {"AutoModel": "modeling.X"}}, r"auto_map is"),
    "an unknown key": (
        "llama",
        {"logit_softcap": 30.0},
        r"logit_softcap = 30\.0\. If one changes none, .*--ignore-key KEY",
    ),
    "a key of another family": ("llama", {"norm_topk_prob": True}, r"norm_topk_prob = true"),
    "two numbers of experts": (
        "qwen3_moe",
        {"num_local_experts": 3},
        r"num_experts and num_local_experts differ \(4 and 3",
    ),
    "a size that is text": ("llama", {"intermediate_size": "6"}, r'intermediate_size is "6"; expected int'),
    "a flag that is text": ("olmoe", {"norm_topk_prob": "yes"}, r'norm_topk_prob is "yes"; expected bool'),
    "no experts": ("mixtral", {"num_local_experts": 0}, r"num_local_experts is 0; expected at least 1"),
    "no layers with experts": (
        "qwen3_moe",
        {"mlp_only_layers": [0, 1]},
        r"mlp_only_layers leave no layer with experts",
    ),
    "dense layers that are no list": (
        "qwen3_moe",
        {"mlp_only_layers": ["0"]},
        r"mlp_only_layers is .*expected numbers of",
    ),
    "heads of odd width": (
        "llama",
        {"head_dim": 3},
        r"describes a model that moeport cannot build:\n.*head_dim: is odd",
    ),
    "more experts than there are": (
        "mixtral",
        {"num_experts_per_tok": 5},
        r"top_k: more experts per token than there are",
    ),
    "a small vocabulary": ("llama", {"vocab_size": 200}, r"vocab_size is 200, but the tokenizer has 257 ids"),
    "heads of olmoe": ("olmoe", {"head_dim": 2}, r"head_dim = 2"),
}


@pytest.mark.parametrize(("family", "changes", "message"), KEYS.values(), ids=KEYS)
def test_a_key_that_cannot_be_translated(tmp_path, family, changes, message):
    config = config_of(family)
    write(tmp_path / "hub", config | changes, values_of(config))
    refused(tmp_path, message)


def refused(tmp_path, message):
    """The folder is refused, and no file is left behind."""
    with pytest.raises(UserError, match=message) as error:
        from_hf(tmp_path / "hub", tmp_path / "run")
    assert error.value.exit_code == 2
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name != "checkpoints"]


def change(edit):
    """A damage to the tensors by name."""

    def damage(hub):
        values = load_file(hub / WEIGHTS)
        edit(values)
        save_file(values, hub / WEIGHTS)

    return damage


def put(name, value):
    def edit(values):
        values[name] = value

    return change(edit)


def poke(name, value):
    def edit(values):
        values[name].flat[3] = value

    return change(edit)


def cut(hub):
    (hub / WEIGHTS).write_bytes((hub / WEIGHTS).read_bytes()[:-4])


def padded(hub):
    (hub / WEIGHTS).write_bytes((hub / WEIGHTS).read_bytes() + b"1234")


def as_bin(hub):
    (hub / WEIGHTS).rename(hub / "pytorch_model.bin")


TENSORS = {
    "a missing tensor": (change(lambda values: values.pop(GATE)), rf"{GATE}: missing"),
    "a missing expert": (change(lambda values: values.pop(EXPERT)), rf"{EXPERT}: missing"),
    "an expert too many": (
        put("model.layers.1.block_sparse_moe.experts.4.w3.weight", np.zeros((6, 8), np.float32)),
        r"experts\.4\.w3\.weight: unknown",
    ),
    "an unknown tensor": (put("model.layers.0.bias", np.zeros(3, np.float32)), r"model\.layers\.0\.bias: unknown"),
    "a transposed expert": (put(EXPERT, np.zeros((8, 6), np.float32)), rf"{EXPERT}: shape \[8, 6\], expected \[6, 8\]"),
    "whole numbers": (put(GATE, np.zeros((4, 8), np.int8)), rf"{GATE}: type I8, expected F64, F32, F16, BF16"),
    "a NaN": (poke(EXPERT, np.nan), rf"{EXPERT} holds a NaN or an infinity"),
    "an infinity": (poke("model.norm.weight", -np.inf), r"model\.norm\.weight holds a NaN or an infinity"),
    "a NaN in float16": (
        put("model.norm.weight", np.array([np.nan] * 8, np.float16)),
        r"model\.norm\.weight holds a NaN or an infinity",
    ),
    "fused names beside the others": (
        put("model.layers.0.mlp.experts.down_proj", np.zeros((4, 8, 6), np.float32)),
        r"model\.layers\.0\.mlp\.experts\.down_proj: unknown",
    ),
    "frequencies of another base": (
        put("model.layers.0.self_attn.rotary_emb.inv_freq", np.array([1.0, 0.5], np.float32)),
        r"inv_freq is not the one that rope_theta gives",
    ),
    "frequencies that differ in the slow pairs only": (
        lambda hub: (
            edit_json(hub / CONFIG, lambda config: config.update(hidden_size=8, rope_theta=1e6)),
            put("model.layers.0.self_attn.rotary_emb.inv_freq", np.array([1.0, 2e-3], np.float32))(hub),
        ),
        r"inv_freq is not the one that rope_theta gives",
    ),
    "settings of the tokenizer that are no JSON": (
        lambda hub: (hub / "tokenizer_config.json").write_text("{"),
        r"tokenizer_config\.json: not JSON",
    ),
    "a file that is cut off": (cut, r"model\.safetensors: has \d+ bytes, but its tensors end at \d+: it is cut off"),
    "bytes too many": (padded, r"model\.safetensors: has \d+ bytes, but its tensors end at"),
    "no safetensors file": (
        lambda hub: (hub / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(50)),
        r"is not a safetensors file",
    ),
    "an empty file": (lambda hub: (hub / WEIGHTS).write_bytes(b""), r"is not a safetensors file, or is cut off"),
    "a pointer of Git LFS": (
        lambda hub: (hub / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        r"is a pointer of Git LFS, not the file itself; run git lfs pull",
    ),
    "a name that is there twice": (
        lambda hub: raw(hub / WEIGHTS, [entry("a", (2,), 0), entry("a", (2,), 8)], bytes(16)),
        r"a occurs twice",
    ),
    "tensors that overlap": (
        lambda hub: raw(hub / WEIGHTS, [entry("a", (2,), 0), entry("b", (2,), 4)], bytes(12)),
        r"the bytes of b begin at 4, expected 8",
    ),
    "a gap": (
        lambda hub: raw(hub / WEIGHTS, [entry("a", (2,), 0), entry("b", (2,), 12)], bytes(20)),
        r"the bytes of b begin at 12, expected 8",
    ),
    "a shape that does not fit": (
        lambda hub: raw(hub / WEIGHTS, ['"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}'], bytes(8)),
        r"a has 8 bytes, which do not fit its shape \(3,\)",
    ),
    "a negative shape": (
        lambda hub: raw(hub / WEIGHTS, ['"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}'], bytes(8)),
        r"describes a in a way that safetensors does not have",
    ),
    "a type of four bits": (
        lambda hub: raw(hub / WEIGHTS, [entry("a", (8,), 0, "F4")], bytes(8)),
        r"a has the type F4; expected F64, F32, F16 or BF16",
    ),
    "a header that is a list": (
        lambda hub: (hub / WEIGHTS).write_bytes(b"\x02" + bytes(7) + b"[]"),
        r"no valid header",
    ),
    "only pickled weights": (
        as_bin,
        r"no model\.safetensors.*only pytorch_model\.bin; load it with transformers and save",
    ),
    "no weights": (lambda hub: (hub / WEIGHTS).unlink(), r"has no model\.safetensors and no .*; expected a folder as"),
    "an index beside": (lambda hub: (hub / INDEX).write_text("{}"), r"has both model\.safetensors and"),
    "no config": (lambda hub: (hub / CONFIG).unlink(), r"config\.json: cannot be read: No such file"),
    "a config that is no JSON": (lambda hub: (hub / CONFIG).write_text("{"), r"config\.json: not JSON: .* at line 1"),
    "a config that is a list": (
        lambda hub: (hub / CONFIG).write_text("[1]"),
        r"config\.json: is \[1\]; expected an object",
    ),
    "a config without a type": (lambda hub: (hub / CONFIG).write_text("{}"), r"config\.json: has no model_type"),
    "no tokenizer": (
        lambda hub: (hub / "tokenizer.json").unlink(),
        r"has no tokenizer\.json, .*--tokenizer FILE .*--without-tokenizer",
    ),
    "a tokenizer without the end of text": (
        lambda hub: (hub / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'),
        r"tokenizer\.json: the vocabulary has no token '</s>'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), TENSORS.values(), ids=TENSORS)
def test_a_damaged_folder(tmp_path, damage, message):
    damage(hub_folder(tmp_path / "hub"))
    refused(tmp_path, message)


def move(hub, name, shard):
    edit_json(hub / INDEX, lambda index: index["weight_map"].__setitem__(name, shard))


def forget(hub):
    edit_json(hub / INDEX, lambda index: index["weight_map"].pop(GATE))


def copy_tensor(hub):
    first, second = sorted(hub.glob("*.safetensors"))
    values = load_file(first)
    save_file(load_file(second) | {name: values[name] for name in list(values)[:1]}, second)


SHARDS = {
    "a tensor in two files": (copy_tensor, r"occurs twice, in model-00001-of-00002\.safetensors and model-00002"),
    "an index that lacks a tensor": (forget, rf"{INDEX}: does not name {GATE}, which is in"),
    "an index with one more": (
        lambda hub: move(hub, "x", "model-00001-of-00002.safetensors"),
        r"model-00001-of-00002\.safetensors: has no x, which .* says it has",
    ),
    "a missing file": (
        lambda hub: (hub / "model-00002-of-00002.safetensors").unlink(),
        r"names the file model-00002-of-00002\.safetensors, which is not in .*; fetch it",
    ),
    "a file elsewhere": (
        lambda hub: move(hub, GATE, "../hub/x.safetensors"),
        r"names the file \.\./hub/x\.safetensors",
    ),
    "an index without a map": (lambda hub: (hub / INDEX).write_text("{}"), r"has no weight_map"),
}


@pytest.mark.parametrize(("damage", "message"), SHARDS.values(), ids=SHARDS)
def test_damaged_shards(tmp_path, damage, message):
    damage(hub_folder(tmp_path / "hub", shards=2))
    refused(tmp_path, message)


def test_the_index_says_which_file(tmp_path):
    hub = hub_folder(tmp_path / "hub", shards=2)
    places = json.loads((hub / INDEX).read_text())["weight_map"]
    move(hub, GATE, next(file for file in places.values() if file != places[GATE]))
    refused(tmp_path, rf"says that {GATE} is in model-0000. *.*, but {places[GATE]} has it")


def test_a_tied_head_that_differs(tmp_path):
    config = config_of("llama")
    values = values_of(config)
    write(tmp_path / "hub", config | {"tie_word_embeddings": True}, values)
    refused(
        tmp_path, r"lm_head\.weight is not model\.embed_tokens\.weight, though config\.json says tie_word_embeddings"
    )


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path, r"hub: is not a folder; expected one with config\.json")


def test_a_run_that_is_there(tmp_path):
    hub_folder(tmp_path / "hub")
    from_hf(tmp_path / "hub", tmp_path / "run")
    with pytest.raises(UserError, match=r"already holds a run, last checkpoint step-000000"):
        from_hf(tmp_path / "hub", tmp_path / "run")


def test_a_tokenizer_from_elsewhere_says_which_token_ends_a_text(tmp_path):
    hub = hub_folder(tmp_path / "hub")
    (hub / "tokenizer_config.json").unlink()
    tokenizer = (hub / "tokenizer.json").rename(tmp_path / "own.json")
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "</s>"))
    from_hf(hub, tmp_path / "run", tokenizer=tokenizer)
    assert "end_of_text: </s>" in (tmp_path / "run/config.yaml").read_text()


def test_a_folder_where_its_record_would_be(tmp_path):
    hub = hub_folder(tmp_path / "run/huggingface")
    before = {path: path.read_bytes() for path in hub.iterdir()}
    for source in (hub, hub_folder(tmp_path / "hub")):
        with pytest.raises(UserError, match=r"run/huggingface: already exists, and not from a conversion; choose"):
            from_hf(source, tmp_path / "run")
    (hub / "moeport.json").write_text("{}")
    with pytest.raises(UserError, match=r"run/huggingface: already exists"):
        from_hf(hub, tmp_path / "run")
    assert {path: path.read_bytes() for path in before} == before
