"""Run folders as training leaves them, made without training."""

from moeport.config import config_from_dict
from moeport.core.parameters import initial_parameters
from moeport.data.tokenizer import ByteTokenizer
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import save_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.run_dir import write_config

MODEL: dict = {
    "num_layers": 2,
    "d_model": 8,
    "attention": {"num_heads": 2, "num_kv_heads": 1},
    "moe": {"num_experts": 4, "expert_hidden": 6},
}
VOCABULARY = 257


def config_of(folder, model, **sections):
    """The config of a run with the byte tokenizer; `model` is laid over MODEL."""
    merged = {**MODEL, **model, "moe": {**MODEL["moe"], **model.get("moe", {})}}
    merged["attention"] = {**MODEL["attention"], **model.get("attention", {})}
    values = {
        "run": {"dir": str(folder)},
        "model": merged,
        "data": {"tokenizer": {"name": "byte"}, "sequence_length": 24},
    }
    return config_from_dict({**values, **sections})


def run_of(folder, step=3, change=lambda params: None, **model):
    """A run with one checkpoint of random weights; `change` may alter them."""
    config = config_of(folder, model)
    params = initial_parameters(DecoderLM(config.model, VOCABULARY).parameter_specs(), 0)
    change(params)
    meta = CheckpointMeta(step, 10, None, ByteTokenizer().fingerprint, "data", config.model_dump(mode="json"), "0")
    save_checkpoint(folder / "checkpoints", meta, params, {})
    write_config(folder, config)
    return folder
