"""Tensors that say nothing new: the copy of a tied embedding, and frequencies that follow from the config."""

from __future__ import annotations

import hashlib

import numpy as np

from moeport.config.schema import Config
from moeport.convert.floats import decoded
from moeport.convert.folder import Folder
from moeport.errors import DataError
from moeport.model import rope
from moeport.training.tensor_file import StoredTensor


def known_extra(folder: Folder, config: Config) -> list[str]:
    """Tensors of the folder that say nothing new."""
    layers = range(config.model.num_layers)
    names = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in layers}
    names |= {"lm_head.weight"} if config.model.tie_embeddings else set()
    return sorted(names & folder.tensors.keys())


def check_extra(folder: Folder, name: str, config: Config) -> None:
    """Refuse a tensor that should say nothing new, but does."""
    tensor = folder.tensors[name]
    if name == "lm_head.weight":
        embedding = folder.tensors["model.embed_tokens.weight"]
        if (tensor.dtype, tensor.shape, _digest(tensor)) != (embedding.dtype, embedding.shape, _digest(embedding)):
            raise DataError(
                f"{folder.path}: {name} is not model.embed_tokens.weight, though {folder.config_file.name} says "
                "tie_word_embeddings; set it to false if the model has a head of its own"
            )
        return
    half = config.model.rope_dim // 2
    cos_A, sin_A = (table[1, :half] for table in rope.of_config(config.model, 2, "float64"))
    wanted = np.arctan2(sin_A, cos_A)  # the angles of position 1
    if tensor.shape != (half,) or not np.allclose(_values(tensor), wanted, rtol=1e-2, atol=1e-7):
        raise DataError(f"{folder.path}: {name} is not the one that rope_theta gives; expected it to agree")


def _values(tensor: StoredTensor) -> np.ndarray:
    return decoded(b"".join(tensor.blocks()), tensor.dtype)


def _digest(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for block in tensor.blocks():
        digest.update(block)
    return digest.hexdigest()
