"""Small folders as they lie on the hub, made without transformers, so that each can be damaged in one way."""

import json
import math
import struct

import numpy as np
from safetensors.numpy import save_file

from moeport.config.model import ModelConfig
from moeport.convert.config_in import settings_of
from moeport.convert.family import BY_TYPE
from moeport.convert.parts import parts
from moeport.data.tokenizer import ByteTokenizer
from tests.support import rng

SHAPES = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 260,
    "max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 256,
    "torch_dtype": "float32",
}
OWN = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 5,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
OWN["deepseek_v2"] = {**LATENT, "q_lora_rank": None}
OWN["deepseek_v3"] = {**LATENT, "n_group": 2, "topk_group": 1}
OWN["qwen2_moe"]["shared_expert_intermediate_size"] = 5


def config_of(family, **changes):
    """The keys of a config.json."""
    known = BY_TYPE[family]
    keys = {"model_type": family, "architectures": [known.architecture], **SHAPES, **OWN.get(family, {})}
    return {key: value for key, value in {**keys, **changes}.items() if value is not ...}


def values_of(config, seed=0, layout="experts"):
    """Random float32 tensors of a config by name."""
    family = BY_TYPE[config["model_type"]]
    model = ModelConfig.model_validate(settings_of(family, config, "config.json").model)
    shapes = {part.tensor: part.shape for part in parts(family, model, config["vocab_size"], layout)}
    return {
        name: rng((seed, number)).standard_normal(shape).astype(np.float32)
        for number, (name, shape) in enumerate(shapes.items())
    }


def write(folder, config, values, shards=1, tokenizer=True):
    """Write a folder whose tensors are in `shards` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.6}')
    if tokenizer:
        ByteTokenizer().save(folder / "tokenizer.json")
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    if shards == 1:
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(values)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = names[shard::shards]
        save_file({name: values[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in values.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hub_folder(folder, family="mixtral", shards=1, layout="experts", **changes):
    """A whole, valid folder."""
    config = config_of(family, **changes)
    return write(folder, config, values_of(config, layout=layout), shards)


def edit_json(file, edit):
    """Change a JSON file: `edit` takes its value and changes it."""
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def raw(file, entries, data):
    """Write a safetensors file from the text of its header's entries and its data."""
    header = ("{" + ",".join(entries) + "}").encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(name, shape, begin, dtype="F32"):
    """An entry of a header."""
    size = math.prod(shape) * {"F32": 4, "F8_E4M3": 1, "I8": 1, "F4": 1}[dtype]
    offsets = [begin, begin + size]
    return f'"{name}":' + json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": offsets})
