"""Checkpoints as moeport wrote them before format version 3: two files, with all arrays whole."""

import json
from dataclasses import asdict

from safetensors.numpy import save_file

from moeport.training import checkpoint_meta
from moeport.training.checkpoint_meta import FORMAT, checkpoint_name, file_digest


def save_older(directory, meta, model, optimizer, version):
    """Writes a checkpoint of format version 1 or 2; returns its folder."""
    path = directory / checkpoint_name(meta.step)
    path.mkdir(parents=True)
    save_file(dict(model), path / "model.safetensors")
    save_file(dict(optimizer), path / "optimizer.safetensors")
    files = {name: file_digest(path / name) for name in ("model.safetensors", "optimizer.safetensors")}
    values = {"format": FORMAT, "format_version": version, **asdict(meta), "files": files}
    digest = {"digest": checkpoint_meta._digest(values)} if version > 1 else {}
    (path / "meta.json").write_text(json.dumps({**values, **digest}))
    return path


def made_older(path, whole, version=2):
    """Replaces the checkpoint `path`, read as `whole`, by one of an older version."""
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    return save_older(path.parent, whole.meta, whole.model, whole.optimizer, version)
